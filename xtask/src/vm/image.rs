//! The root image of the guest: Debian forky, made once by mmdebstrap and kept in the cache.

use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The release that brings systemd 262, kernel 7.2 and llama.cpp's own packages.
const SUITE: &str = "forky";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// What is in the guest beside the essential packages.
const PACKAGES: &[&str] = &[
    "btrfs-progs",
    "ca-certificates",
    "conmon",
    "crun",
    "curl",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "earlyoom",
    "initramfs-tools",
    "kmod",
    "linux-image-cloud-amd64",
    "llama.cpp-tools",
    "llama.cpp-tools-extra",
    "mount",
    "netavark",
    "openssh-server",
    "passwd",
    "podman",
    "polkitd",
    "procps",
    "systemd",
    "systemd-oomd",
    "systemd-sysv",
    "udev",
    "util-linux",
    "xfsprogs",
];

/// Run in the new root, with its path as `$1`, after the packages are configured. `$KEYS` holds
/// the machine's ssh keys.
const CUSTOMISE: &str = r#"
set -eu
root="$1"
echo plimsoll-guest > "$root/etc/hostname"
printf '127.0.0.1 localhost plimsoll-guest\n::1 localhost\n' > "$root/etc/hosts"
cat > "$root/etc/fstab" <<'EOT'
/dev/vda / ext4 rw,relatime 0 1
LABEL=models /srv/models ext4 nofail,x-systemd.device-timeout=300s 0 2
EOT
mkdir -p "$root/srv/models" "$root/root/.ssh" "$root/var/log/journal"
install -m 0600 "$KEYS/client.pub" "$root/root/.ssh/authorized_keys"
rm -f "$root"/etc/ssh/ssh_host_*
install -m 0600 "$KEYS/host" "$root/etc/ssh/ssh_host_ed25519_key"
install -m 0644 "$KEYS/host.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"
cat > "$root/etc/ssh/sshd_config.d/plimsoll.conf" <<'EOT'
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxSessions 100
MaxStartups 100
PrintMotd no
EOT
cat > "$root/etc/systemd/network/80-virtio.network" <<'EOT'
[Match]
Driver=virtio_net
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
EOT
# Nothing of its own accord that would disturb a measurement.
chroot "$root" systemctl --quiet enable systemd-networkd ssh
for unit in apt-daily.timer apt-daily-upgrade.timer man-db.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer dpkg-db-backup.timer systemd-networkd-wait-online.service getty@tty1.service; do
  chroot "$root" systemctl --quiet mask "$unit" 2>/dev/null || true
done
# Installed for the scenarios that start them.
for unit in earlyoom.service systemd-oomd.service systemd-oomd.socket podman.service podman.socket \
    podman-auto-update.timer podman-auto-update.service podman-restart.service podman-clean-transient.service \
    xfs_scrub_all.timer; do
  chroot "$root" systemctl --quiet disable "$unit" 2>/dev/null || true
done
printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n' > "$root/etc/systemd/journald.conf"
# A small initial RAM disk: unpacking it takes long under emulation.
printf 'MODULES=list\nCOMPRESS=zstd\n' > "$root/etc/initramfs-tools/conf.d/plimsoll"
printf 'virtio_pci\nvirtio_blk\next4\n' >> "$root/etc/initramfs-tools/modules"
rm -f "$root"/usr/share/initramfs-tools/hooks/btrfs "$root"/usr/share/initramfs-tools/hooks/dmsetup
chroot "$root" update-initramfs -u -k all
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/*
: > "$root/etc/machine-id"
"#;

/// How to build the image.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ImageOptions {
    /// Debian mirror for the guest (default: the one that this machine's apt uses)
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Accept a mirror whose release file is past its date (implied where this machine's apt does)
    #[arg(long)]
    pub no_check_valid_until: bool,
}

/// A finished image in the cache.
#[derive(Debug, Clone)]
pub struct Image {
    /// Holds `root.img`, `vmlinuz`, `initrd.img` and `keys/`.
    pub directory: PathBuf,
}

impl Image {
    /// The root filesystem, raw ext4; never written to after it was built.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root.img")
    }
    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }
    /// The guest's initial RAM disk.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd.img")
    }
    /// The private key that root logs in with.
    pub fn client_key(&self) -> PathBuf {
        self.directory.join("keys/client")
    }
    /// The known-hosts file with the guest's own key.
    pub fn known_hosts(&self) -> PathBuf {
        self.directory.join("keys/known_hosts")
    }

    /// The image from the cache, built first when it is not there.
    pub fn ensure(options: &ImageOptions) -> Result<Image> {
        let cache = host::cache_directory()?;
        let recipe = format!("{SUITE}\n{}\n{CUSTOMISE}\n{IMAGE_SIZE}", PACKAGES.join(" "));
        let directory = cache.join(format!("guest-{}", host::fingerprint(&recipe)));
        let image = Image { directory };
        if image.root().exists() {
            return Ok(image);
        }
        // Two of us may want it at once: the second waits and finds it finished.
        let lock = fs::File::create(cache.join("guest.lock"))?;
        lock.lock()?;
        if !image.root().exists() {
            host::ensure_image_tools()?;
            image.build(options)?;
        }
        Ok(image)
    }

    fn build(&self, options: &ImageOptions) -> Result<()> {
        let started = Instant::now();
        let mirror = options.mirror.clone().unwrap_or_else(host_mirror);
        println!("building the guest: Debian {SUITE} from {mirror}, into {}", self.directory.display());
        if self.directory.exists() {
            fs::remove_dir_all(&self.directory)?;
        }
        let keys = self.directory.join("keys");
        fs::create_dir_all(&keys)?;
        make_keys(&keys)?;
        let hook = self.directory.join("customise.sh");
        fs::write(&hook, CUSTOMISE)?;

        let tree = self.directory.join("tree");
        let log = self.directory.join("build.log");
        let mut command = host::as_root("env")?;
        command.arg(format!("KEYS={}", keys.display())).arg("mmdebstrap");
        command.args(["--mode=root", "--variant=apt", "--aptopt=APT::Install-Recommends \"false\""]);
        command.args(
            ["doc", "man", "locale", "info"]
                .map(|kind| format!("--dpkgopt=path-exclude=/usr/share/{kind}/*")),
        );
        if options.no_check_valid_until || host_ignores_valid_until() {
            command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        command.arg(format!("--include={}", PACKAGES.join(",")));
        command.arg(format!("--customize-hook=sh {} \"$1\"", hook.display()));
        command.arg(SUITE).arg(&tree).arg(&mirror);
        command.stdout(fs::File::create(&log)?).stderr(fs::File::options().append(true).open(&log)?);
        host::run(&mut command).with_context(|| format!("mmdebstrap's output is in {}", log.display()))?;

        copy_newest(&tree.join("boot"), "vmlinuz-", &self.kernel())?;
        copy_newest(&tree.join("boot"), "initrd.img-", &self.initrd())?;
        let partial = self.directory.join("root.img.partial");
        let mut mke2fs = host::as_root("mke2fs")?;
        mke2fs.args(["-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-E", "lazy_itable_init=0"]);
        mke2fs.arg("-d").arg(&tree).arg(&partial).arg(IMAGE_SIZE);
        host::output(&mut mke2fs)?;
        host::run(host::as_root("rm")?.arg("-rf").arg(&tree))?;
        if !host::is_root() {
            let owner = std::env::var("USER").context("USER is not set")?;
            host::run(host::as_root("chown")?.arg("-R").arg(owner).arg(&self.directory))?;
        }
        fs::rename(&partial, self.root())?;
        host::prune(&host::cache_directory()?, "guest-", &self.directory)?;
        println!("built the guest in {} s", started.elapsed().as_secs());
        Ok(())
    }
}

/// Room for swapfiles and a journal; the image is sparse.
const IMAGE_SIZE: &str = "8G";

fn make_keys(directory: &Path) -> Result<()> {
    let keygen = host::find("ssh-keygen").context("ssh-keygen is not installed")?;
    for name in ["client", "host"] {
        let mut command = std::process::Command::new(&keygen);
        command
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "plimsoll-guest", "-f"])
            .arg(directory.join(name));
        host::output(&mut command)?;
    }
    let public = fs::read_to_string(directory.join("host.pub"))?;
    fs::write(directory.join("known_hosts"), format!("plimsoll-guest {public}"))?;
    Ok(())
}

fn copy_newest(directory: &Path, prefix: &str, to: &Path) -> Result<()> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    let Some(newest) = found.pop() else { bail!("no {prefix}* in {}", directory.display()) };
    // The initial RAM disk belongs to root and is not world-readable.
    host::run(host::as_root("install")?.arg("-m0644").arg(&newest).arg(to))
}

/// The Debian mirror of this machine's apt, or the public one: on Ubuntu, or when apt is not here.
pub fn host_mirror() -> String {
    let mut apt = std::process::Command::new("apt-get");
    let targets = host::output(apt.args([
        "indextargets",
        "--format",
        "$(SITE) $(ORIGIN)|$(RELEASE)|",
        "Created-By: Packages",
    ]))
    .unwrap_or_default();
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(site, rest)| rest.starts_with("Debian|") && !site.contains("security"))
        .map_or_else(|| DEFAULT_MIRROR.to_owned(), |(site, _)| site.trim_end_matches('/').to_owned())
}

/// True when this machine's administrator told apt not to look at `Valid-Until`: the same mirror
/// then serves the guest's release in the same state.
pub fn host_ignores_valid_until() -> bool {
    let mut apt = std::process::Command::new("apt-config");
    let setting =
        host::output(apt.args(["shell", "VALUE", "Acquire::Check-Valid-Until/b"])).unwrap_or_default();
    setting.contains("false")
}
