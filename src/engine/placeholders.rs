//! The words in braces that `command` may hold.

use super::error::Error;
use crate::config::{Instance, Model, nearest};

const NAMES: [&str; 4] = ["host", "instance", "model", "port"];

/// The arguments of `command` with their placeholders replaced, argument by argument and without a
/// shell. Other braces (JSON, say) stand as they are.
pub(super) fn replaced(
    command: &[String],
    model: &Model,
    instance: &Instance,
    port: u16,
) -> Result<Vec<String>, Error> {
    let value = |name: &str| match name {
        "host" => Some(model.host.clone()),
        "instance" => Some(instance.to_string()),
        "model" => model.model.as_ref().map(|path| path.to_string_lossy().into_owned()),
        "port" => Some(port.to_string()),
        _ => None,
    };
    command
        .iter()
        .map(|argument| {
            let mut out = String::new();
            let mut rest = argument.as_str();
            while let Some((before, after)) = rest.split_once('{') {
                out.push_str(before);
                let word = &after[..after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len())];
                let closed = after[word.len()..].strip_prefix('}');
                rest = match (closed, value(word)) {
                    (Some(tail), Some(value)) => {
                        out.push_str(&value);
                        tail
                    }
                    (Some(_), None) if nearest(word, NAMES).is_some() => {
                        return Err(Error::Placeholder {
                            found: word.to_owned(),
                            near: nearest(word, NAMES).unwrap_or_default(),
                            place: model.place("command"),
                        });
                    }
                    _ => {
                        out.push('{');
                        after
                    }
                };
            }
            out.push_str(rest);
            Ok(out)
        })
        .collect()
}
