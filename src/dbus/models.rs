//! The objects of models on the bus: `org.plimsoll1.Model`, one for each instance that `ListModels` lists.

use std::collections::BTreeSet;

use zbus::{ObjectServer, OwnedObjectPath, interface};

use super::PATH;
use super::error::{Error, Kind};
use crate::daemon::report;

/// `org.plimsoll1.Model`: what changes seldom enough to be told by signals. What is measured is for those who ask.
#[derive(Debug)]
struct ModelObject {
    name: String,
    instance: String,
    state: String,
    priority: u32,
    pinned: bool,
    context: u64,
    predicted_bytes: u64,
}

impl From<report::Model> for ModelObject {
    fn from(model: report::Model) -> Self {
        Self {
            predicted_bytes: model.predicted.total().0,
            name: model.name,
            instance: model.instance,
            state: model.state,
            priority: u32::from(model.priority),
            pinned: model.pinned,
            context: model.context,
        }
    }
}

#[interface(name = "org.plimsoll1.Model", introspection_docs = false)]
impl ModelObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn instance(&self) -> String {
        self.instance.clone()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.state.clone()
    }

    #[zbus(property)]
    fn priority(&self) -> u32 {
        self.priority
    }

    #[zbus(property)]
    fn pinned(&self) -> bool {
        self.pinned
    }

    #[zbus(property)]
    fn context(&self) -> u64 {
        self.context
    }

    #[zbus(property)]
    fn predicted_bytes(&self) -> u64 {
        self.predicted_bytes
    }
}

/// The path of an instance's object: what is neither an ASCII letter nor a digit is `_` and its code in hexadecimal,
/// as systemd does it for units.
fn path(instance: &str) -> Result<OwnedObjectPath, Error> {
    let mut path = format!("{PATH}/model/");
    for byte in instance.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => path.push(char::from(byte)),
            other => path.push_str(&format!("_{other:02x}")),
        }
    }
    OwnedObjectPath::try_from(path).map_err(|error| Error::new(Kind::Failed, error.to_string()))
}

/// The instances that have an object.
#[derive(Debug, Default)]
pub(super) struct Models(BTreeSet<String>);

impl Models {
    /// Has the objects be those of `models`, and tells what that changes.
    ///
    /// # Errors
    /// A signal can't be sent: there is no bus any more.
    pub(super) async fn show(
        &mut self,
        server: &ObjectServer,
        models: Vec<report::Model>,
    ) -> Result<(), Error> {
        let now: BTreeSet<String> = models.iter().map(|model| model.instance.clone()).collect();
        let before = std::mem::replace(&mut self.0, now);
        for instance in before.difference(&self.0) {
            server.remove::<ModelObject, _>(path(instance)?).await?;
        }
        for model in models {
            let path = path(&model.instance)?;
            if before.contains(&model.instance) {
                change(server, path, model.into()).await?;
            } else {
                server.at(path, ModelObject::from(model)).await?;
            }
        }
        Ok(())
    }
}

async fn change(server: &ObjectServer, path: OwnedObjectPath, model: ModelObject) -> Result<(), Error> {
    let object = server.interface::<_, ModelObject>(path).await?;
    let emitter = object.signal_emitter();
    let mut now = object.get_mut().await;
    let before = std::mem::replace(&mut *now, model);
    if now.state != before.state {
        now.state_changed(emitter).await?;
    }
    if now.priority != before.priority {
        now.priority_changed(emitter).await?;
    }
    if now.pinned != before.pinned {
        now.pinned_changed(emitter).await?;
    }
    if now.context != before.context {
        now.context_changed(emitter).await?;
    }
    if now.predicted_bytes != before.predicted_bytes {
        now.predicted_bytes_changed(emitter).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test fails by panicking

    use super::*;

    #[test]
    fn every_instance_has_a_path_of_its_own() {
        let path = |instance| path(instance).unwrap().to_string();
        assert_eq!(path("qwen3-coder"), "/org/plimsoll1/model/qwen3_2dcoder");
        assert_eq!(path("a@2"), "/org/plimsoll1/model/a_402");
        assert_eq!(path("a_402"), "/org/plimsoll1/model/a_5f402");
    }
}
