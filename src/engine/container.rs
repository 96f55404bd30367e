//! An engine that is a container image: the command line of podman, and what its unit needs beyond others.
//!
//! podman is started by root, so that images are the system's own and devices and groups are those of the machine;
//! what it runs is the unprivileged user that every engine runs as, with no capability, on a root file system that it
//! can't write to. No control group is made for it: all processes stay in that of the unit, where limits, measurement
//! and the end of the unit reach them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{Image, Instance};

/// The program. Never looked for: root runs it.
pub const PODMAN: &str = "/usr/bin/podman";
/// Where programs are that podman starts.
pub const SEARCHED: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What an image's llama-server is called when nobody says otherwise.
const PROGRAM: &str = "llama-server";
/// `podman image inspect --format`: what [`About::parse`] reads.
pub const FORMAT: &str =
    r#"{"id":{{json .ID}},"entrypoint":{{json .Config.Entrypoint}},"environment":{{json .Config.Env}}}"#;

/// What root can do in the unit, each with its reason. What the engine can do is nothing of it.
const CAPABILITIES: [(&str, &str); 13] = [
    ("SYS_ADMIN", "mounts and namespaces"),
    ("SYS_CHROOT", "the container's root directory"),
    ("SETUID", "become the engine's user"),
    ("SETGID", "and have its groups"),
    ("SETPCAP", "take every capability from the engine"),
    ("SYS_RESOURCE", "set its limits"),
    ("MKNOD", "device nodes in its /dev"),
    ("CHOWN", "files of the container belong to their owners"),
    ("FOWNER", "the same"),
    ("FSETID", "the same"),
    ("DAC_OVERRIDE", "reach what belongs to the engine's user, and mount models of others"),
    ("KILL", "end the engine"),
    ("MAC_ADMIN", "podman loads its AppArmor profile, where there is AppArmor"),
];

/// What the image itself says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct About {
    /// Stands for its contents.
    pub id: String,
    entrypoint: Option<Vec<String>>,
    environment: Option<Vec<String>>,
}

impl About {
    /// Reads what podman prints for [`FORMAT`].
    ///
    /// # Errors
    /// It is something else: one sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str(text)
            .map_err(|error| format!("podman describes the image in an unknown way: {error}"))
    }

    /// What is run in the container: as configured, or what the image starts itself if that is a llama-server, or the
    /// one on its PATH.
    #[must_use]
    pub fn program(&self, image: &Image) -> Vec<String> {
        let own = self.entrypoint.clone().unwrap_or_default();
        let is_server = own.last().is_some_and(|word| word.rsplit('/').next() == Some(PROGRAM));
        match &image.program {
            Some(program) => vec![program.clone()],
            None if is_server => own,
            None => vec![PROGRAM.to_owned()],
        }
    }

    /// Variables by which the image itself would change settings that were priced.
    fn settings(&self) -> impl Iterator<Item = &str> {
        let names = self.environment.iter().flatten().filter_map(|word| Some(word.split_once('=')?.0));
        names.filter(|name| name.starts_with("LLAMA_ARG_"))
    }
}

/// What of the machine is to be seen inside.
#[derive(Clone, Debug, Default)]
pub struct Inside {
    /// The user and its group.
    pub user: (u32, u32),
    /// Its further groups, to which devices belong.
    pub groups: Vec<u32>,
    /// Device nodes, directories of them, or names of CDI.
    pub devices: Vec<String>,
    /// The program that is process 1 there, where podman's own is installed: without one a signal that the engine does not
    /// handle yet does nothing, and it can't be stopped while it loads.
    pub init: Option<PathBuf>,
    /// A directory that the engine may write to.
    pub cache: Option<PathBuf>,
}

/// A container to run.
#[derive(Clone, Debug)]
pub struct Container<'a> {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: &'a Image,
    /// What that says of itself.
    pub about: &'a About,
    /// What of the machine it sees.
    pub inside: &'a Inside,
    /// Files that it reads, each by itself and at its own place: symbolic links are followed on the host, and of the
    /// directories around them nothing else is to be seen.
    pub files: &'a BTreeSet<PathBuf>,
    /// Variables with their values.
    pub environment: &'a BTreeMap<String, String>,
    /// Names of variables whose values podman's own environment has, so that no list of processes shows them.
    pub secrets: &'a BTreeSet<String>,
    /// Ended after so many seconds.
    pub timeout: Option<u64>,
}

/// The name of an instance's container. Two instances never have the same: a model's name may have dots and hyphens, but
/// only what stands before the first hyphen tells the number.
#[must_use]
pub fn name(instance: &Instance) -> String {
    match instance.number {
        0 | 1 => format!("plimsoll-{}", instance.model),
        number => format!("plimsoll.{number}-{}", instance.model),
    }
}

/// The name of the container in which its engine is asked what it can do. Two instances that ask at the same time have one
/// each.
#[must_use]
pub fn ask_name(instance: &Instance) -> String {
    name(instance).replacen("plimsoll", "plimsoll.ask", 1)
}

impl Container<'_> {
    /// The command line that runs its llama-server with `arguments`.
    #[must_use]
    pub fn argv(&self, arguments: &[String]) -> Vec<String> {
        let Inside { user: (user, group), groups, devices, init, cache } = self.inside;
        let mut argv = [
            PODMAN,
            "run",
            "--rm",
            "--replace",
            // In the unit's control group, where its device policy and its limits hold.
            "--cgroups=disabled",
            "--network=host",
            // Tens of gigabytes are not for a start to wait for.
            "--pull=never",
            // `wait-ready` tells systemd, and the engine's own words go where the unit's go.
            "--sdnotify=ignore",
            "--log-driver=passthrough",
            "--read-only",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            // SELinux would want the models relabelled, which are the user's.
            "--security-opt=label=disable",
            // Volumes and health checks of the image: the one would be left over, the other run elsewhere.
            "--image-volume=ignore",
            "--no-healthcheck",
        ]
        .map(str::to_owned)
        .to_vec();
        argv.push(format!("--name={}", self.name));
        argv.push(format!("--user={user}:{group}"));
        argv.extend(groups.iter().map(|group| format!("--group-add={group}")));
        argv.extend(devices.iter().map(|device| format!("--device={device}")));
        if let Some(init) = init {
            argv.extend(["--init".to_owned(), format!("--init-path={}", init.display())]);
        }
        argv.extend(self.timeout.map(|seconds| format!("--timeout={seconds}")));
        argv.extend(self.files.iter().map(|file| mount(file, "ro=true")));
        argv.extend(cache.as_deref().map(|cache| mount(cache, "ro=false")));
        let ours = |name: &str| self.environment.contains_key(name) || self.secrets.contains(name);
        let foreign = self.about.settings().filter(|name| !ours(name));
        argv.extend(foreign.map(|name| format!("--unsetenv={name}")));
        argv.extend(self.environment.iter().map(|(name, value)| format!("--env={name}={value}")));
        argv.extend(self.secrets.iter().map(|name| format!("--env={name}")));
        argv.push(format!("--entrypoint={}", entrypoint(&self.about.program(self.image))));
        argv.push(self.image.name.clone());
        argv.extend(arguments.iter().cloned());
        argv
    }
}

/// One program as it is, several words as the list that podman reads.
fn entrypoint(program: &[String]) -> String {
    match program {
        [program] => program.clone(),
        words => serde_json::Value::from(words.to_vec()).to_string(),
    }
}

/// A path of the machine at the same place in the container. The fields are those of a line of CSV.
fn mount(path: &Path, rights: &str) -> String {
    let path = path.to_string_lossy();
    let field = |key: &str| {
        let field = format!("{key}={path}");
        if field.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", field.replace('"', "\"\""))
        } else {
            field
        }
    };
    format!("--mount=type=bind,{},{},{rights}", field("src"), field("dst"))
}

/// The drop-in for the unit of an instance whose engine is an image (`50-plimsoll-container.conf`): what podman needs of
/// what `llm@.service` takes away.
#[must_use]
pub fn drop_in(instance: &Instance) -> String {
    let capabilities = CAPABILITIES.map(|(name, why)| format!("#   CAP_{name:12} {why}\n")).concat();
    let bounding = CAPABILITIES.map(|(name, _)| format!("CAP_{name}")).join(" ");
    let names = [name(instance), ask_name(instance)].join(" ");
    format!(
        "# Written by plimsoll's generator: the engine of this model is a container image.

[Unit]
RequiresMountsFor=/var/lib/containers

[Service]
# '!': root starts podman. `plimsoll run` itself reads models as the unit's user, and the engine runs as that.
ExecStart=
ExecStart=!/usr/bin/plimsoll run --container %i
# What a container leaves that was killed. Not with the unit's HOME=, where the engine can write: podman's own settings
# may lie there.
ExecStopPost=-!/usr/bin/env --ignore-environment HOME=/root PATH={SEARCHED} {PODMAN} rm --force --ignore {names}
# The image has no such program.
RestartPreventExitStatus=126 127
# Of root in this unit; the engine has none of them:
{capabilities}CapabilityBoundingSet={bounding}
# Profiles of AppArmor and SELinux are entered at execution. podman gives the engine no new privileges.
NoNewPrivileges=no
# Images may lie anywhere, and what runs is noted below /run.
ProtectSystem=full
# Namespaces, and in them a host name, a /proc and a /sys.
RestrictNamespaces=no
ProtectHostname=no
ProtectProc=default
ProtectKernelTunables=no
# Modes of files in the container.
RestrictSUIDSGID=no
# podman has a filter of its own for the engine.
SystemCallFilter=
# m: nodes in the container's /dev.
DeviceAllow=char-drm rwm
DeviceAllow=char-kfd rwm
DeviceAllow=char-nvidia* rwm
DeviceAllow=char-accel rwm
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(program: Option<&str>) -> Image {
        Image { name: "ghcr.io/ggml-org/llama.cpp:server".to_owned(), program: program.map(str::to_owned) }
    }

    fn words(text: &[&str]) -> Vec<String> {
        text.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_command_line_confines_what_it_runs() {
        let about = About {
            environment: Some(words(&["PATH=/usr/bin", "LLAMA_ARG_HOST=0.0.0.0", "LLAMA_ARG_MLOCK=1"])),
            ..About::default()
        };
        let inside = Inside {
            user: (990, 991),
            groups: vec![44, 104],
            devices: words(&["/dev/kfd", "/dev/dri"]),
            init: Some("/usr/libexec/podman/catatonit".into()),
            cache: Some("/var/cache/plimsoll/m".into()),
        };
        let environment = BTreeMap::from([
            ("HSA_OVERRIDE_GFX_VERSION".to_owned(), "11.5.1".to_owned()),
            ("LLAMA_ARG_MLOCK".to_owned(), "0".to_owned()),
        ]);
        let container = Container {
            name: name(&"m".parse().unwrap()),
            image: &image(None),
            about: &about,
            inside: &inside,
            files: &["/srv/models/a b.gguf", "/srv/models/c,d.gguf"].map(PathBuf::from).into(),
            environment: &environment,
            secrets: &BTreeSet::from(["HF_TOKEN".to_owned()]),
            timeout: None,
        };
        let argv = container.argv(&words(&["--port", "8001"]));
        let (fixed, rest) = argv.split_at(15);
        for option in [
            "--cgroups=disabled",
            "--pull=never",
            "--read-only",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--security-opt=label=disable",
            "--no-healthcheck",
        ] {
            assert!(fixed.iter().any(|word| word == option), "no {option} in {fixed:?}");
        }
        assert_eq!(
            rest,
            words(&[
                "--name=plimsoll-m",
                "--user=990:991",
                "--group-add=44",
                "--group-add=104",
                "--device=/dev/kfd",
                "--device=/dev/dri",
                "--init",
                "--init-path=/usr/libexec/podman/catatonit",
                "--mount=type=bind,src=/srv/models/a b.gguf,dst=/srv/models/a b.gguf,ro=true",
                "--mount=type=bind,\"src=/srv/models/c,d.gguf\",\"dst=/srv/models/c,d.gguf\",ro=true",
                "--mount=type=bind,src=/var/cache/plimsoll/m,dst=/var/cache/plimsoll/m,ro=false",
                "--unsetenv=LLAMA_ARG_HOST",
                "--env=HSA_OVERRIDE_GFX_VERSION=11.5.1",
                "--env=LLAMA_ARG_MLOCK=0",
                "--env=HF_TOKEN",
                "--entrypoint=llama-server",
                "ghcr.io/ggml-org/llama.cpp:server",
                "--port",
                "8001",
            ])
        );
    }

    #[test]
    fn the_program_is_the_configured_one_or_the_images_own_or_found() {
        let starts = |entrypoint: &[&str]| About { entrypoint: Some(words(entrypoint)), ..About::default() };
        for (about, program, run) in [
            (About::default(), None, "llama-server"),
            (starts(&["/app/llama-server"]), None, "/app/llama-server"),
            (starts(&["/app/tools.sh"]), None, "llama-server"),
            (starts(&["/app/llama-server"]), Some("/opt/x"), "/opt/x"),
            (starts(&["/env.sh", "/app/llama-server"]), None, r#"["/env.sh","/app/llama-server"]"#),
        ] {
            assert_eq!(entrypoint(&about.program(&image(program))), run);
        }
    }

    #[test]
    fn what_podman_says_of_an_image_is_read() {
        let about =
            About::parse("{\"id\":\"sha256:1f\",\"entrypoint\":null,\"environment\":[\"A=b\",\"odd\"]}\n")
                .unwrap();
        assert_eq!((about.id.as_str(), about.settings().count()), ("sha256:1f", 0));
        assert!(About::parse("Error: no such image").is_err());
    }

    #[test]
    fn no_two_instances_have_one_container() {
        let names = ["a", "a@2", "2-a", ".2-a", "a@22"].iter().filter_map(|text| text.parse().ok());
        let names: Vec<String> = names.map(|instance| name(&instance)).collect();
        assert_eq!(names, ["plimsoll-a", "plimsoll.2-a", "plimsoll-2-a", "plimsoll.22-a"]);
    }

    #[test]
    fn the_drop_in_replaces_the_start_and_cleans_up() {
        let text = drop_in(&"m@2".parse().unwrap());
        let lines: Vec<&str> = text.lines().collect();
        let start = lines.iter().position(|line| *line == "ExecStart=").unwrap();
        assert_eq!(lines[start + 1], "ExecStart=!/usr/bin/plimsoll run --container %i");
        let clean = lines.iter().find(|line| line.starts_with("ExecStopPost=-!")).unwrap();
        assert!(
            clean.ends_with(" /usr/bin/podman rm --force --ignore plimsoll.2-m plimsoll.ask.2-m"),
            "{clean}"
        );
        assert!(clean.contains(" --ignore-environment HOME=/root "), "{clean}");
        assert!(text.contains("\nCapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_CHROOT "), "{text}");
        assert!(
            lines.iter().all(|line| line.is_empty() || line.starts_with(['#', '[']) || line.contains('='))
        );
    }
}
