//! The checks of engines that are container images.

use std::collections::BTreeMap;
use std::path::Path;

use super::checks::Finding;
use crate::cli::container;
use crate::config::{Daemon, EngineSource, Image};
use crate::engine::check_executable;
use crate::engine::container::PODMAN;

/// What has the control group of a unit left alone.
const RUNTIME: &str = "crun";

/// What is found where an image is configured; images are root's, so that only root can look for them.
pub fn check(daemon: &Daemon, is_root: bool) -> Vec<Finding> {
    let images: BTreeMap<&String, &Image> = daemon
        .engines
        .values()
        .filter_map(|source| match source {
            EngineSource::Image(image) => Some((&image.name, image)),
            EngineSource::Path { .. } => None,
        })
        .collect();
    if images.is_empty() {
        return Vec::new();
    }
    if let Err(error) = check_executable(Path::new(PODMAN)) {
        return vec![Finding::problem(
            "podman",
            format!("{error}, and an engine is a container image"),
            "install podman and crun with the distribution's package manager",
        )];
    }
    if !is_root {
        let text = "what it runs containers with, and whether the images are there, is seen by root only";
        return vec![Finding::note("podman", text)];
    }
    let mut found = vec![runtime(container::runtime())];
    if container::init().is_none() {
        let text = "catatonit is not installed: a model in a container that is stopped while it loads takes all of its \
                    unit's TimeoutStopSec= to end";
        found.push(Finding { fix: Some("install catatonit".to_owned()), ..Finding::note("podman", text) });
    }
    found.extend(images.into_values().map(|image| match container::check(image) {
        Ok(()) => Finding::ok("image", &image.name),
        Err(failure) => Finding::problem(
            "image",
            failure.message,
            failure.hint.unwrap_or_else(|| format!("run '{PODMAN} info' as root to see why")),
        ),
    }));
    found
}

fn runtime(said: Result<String, String>) -> Finding {
    match said {
        Ok(name) if name == RUNTIME => Finding::ok("podman", format!("it runs containers with {RUNTIME}")),
        Ok(name) => Finding::problem(
            "podman",
            format!("it runs containers with {name}, which can't leave them in their unit's control group"),
            format!(
                "install {RUNTIME}, and write runtime = \"{RUNTIME}\" under [engine] in /etc/containers/containers.conf"
            ),
        ),
        Err(why) => Finding::problem(
            "podman",
            format!("it does not work: {why}"),
            format!("run '{PODMAN} info' as root"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::checks::Level;

    #[test]
    fn only_a_runtime_that_needs_no_control_group_will_do() {
        assert_eq!(runtime(Ok("crun".to_owned())).level, Level::Ok);
        let other = runtime(Ok("runc".to_owned()));
        assert_eq!(other.level, Level::Problem);
        assert!(other.fix.unwrap().contains("runtime = \"crun\""));
        assert!(runtime(Err("no storage".to_owned())).text.ends_with("no storage"));
    }

    #[test]
    fn nothing_is_said_where_no_image_is_configured() {
        assert!(check(&Daemon::default(), true).is_empty());
    }
}
