//! The interfaces as a client sees them.
#![expect(missing_docs, reason = "the macro writes the types; the interfaces are documented in client.rs")]

use std::collections::HashMap;

use zbus::{Fd, OwnedObjectPath, OwnedVariant, proxy};

/// Arguments and environment to execute an admitted engine with.
pub type Admitted = (Vec<String>, HashMap<String, String>);

#[proxy(
    interface = "org.plimsoll1.Manager",
    default_service = "org.plimsoll1",
    default_path = "/org/plimsoll1"
)]
pub trait Manager {
    fn fit(&self, name: &str, contexts: &[u64]) -> zbus::Result<String>;
    fn plan(&self, instance: &str, context: u64) -> zbus::Result<String>;
    fn admit(
        &self,
        instance: &str,
        files: &[(&str, Fd<'_>)],
        environment: &HashMap<String, String>,
        engine: &HashMap<String, String>,
    ) -> zbus::Result<Admitted>;
    fn list_models(&self) -> zbus::Result<Vec<HashMap<String, OwnedVariant>>>;
    fn status(&self) -> zbus::Result<String>;
    fn explain(&self, instance: &str) -> zbus::Result<String>;

    #[zbus(signal)]
    fn admit_progress(&self, instance: String, text: String);
    #[zbus(signal)]
    fn about_to_evict(&self, instance: String, for_instance: String, deadline_usec: u64);
    #[zbus(signal)]
    fn job_removed(&self, job: OwnedObjectPath, instance: String, result: String, message: String);

    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn mode(&self) -> zbus::Result<String>;
}

#[proxy(
    interface = "org.plimsoll1.Job",
    default_service = "org.plimsoll1",
    default_path = "/org/plimsoll1/job/0"
)]
pub trait Job {
    #[zbus(property)]
    fn instance(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn kind(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
}
