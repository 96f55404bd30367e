//! `plimsoll run --container`: started by root, because podman has to be, and the engine's user for all that it does itself.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, getgrouplist, getresuid, setgroups, setresgid, setresuid};

use super::failure::Failure;

/// Whom engines run as (plimsoll.sysusers.conf, `User=` of llm@.service).
const ENGINES: &str = "plimsoll-llm";
const ROOT: (Uid, Gid) = (Uid::from_raw(0), Gid::from_raw(0));

/// The user that engines run as, which this process is too; for a moment, or at its end, it can be root again.
#[derive(Debug)]
pub struct EngineUser {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl EngineUser {
    /// Becomes that user. Files are opened, and the daemon is asked, with its rights from here on.
    ///
    /// # Errors
    /// This process is not root, or there is no such user.
    pub fn become_it() -> Result<Self, Failure> {
        if !getresuid().is_ok_and(|ids| ids.effective.is_root()) {
            return Err(Failure::usage("'plimsoll run --container' is started by root")
                .hint("it is what the unit llm@NAME.service runs when the engine is a container image"));
        }
        let user = User::from_name(ENGINES).ok().flatten().ok_or_else(|| {
            Failure::config(format!("there is no user {ENGINES}, which engines run as"))
                .hint("'systemd-sysusers plimsoll.conf' as root makes it")
        })?;
        let groups = CString::new(ENGINES).ok().and_then(|name| getgrouplist(&name, user.gid).ok());
        // Without them its devices would be missing.
        let groups = groups
            .ok_or_else(|| Failure::failed(format!("the groups of the user {ENGINES} can't be looked up")))?;
        let user = Self { uid: user.uid, gid: user.gid, groups };
        user.drop_rights()?;
        Ok(user)
    }

    /// Its numbers: the user and its group.
    pub fn ids(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Its further groups, in order.
    pub fn further_groups(&self) -> Vec<u32> {
        let further = self.groups.iter().filter(|group| **group != self.gid);
        let mut further: Vec<u32> = further.map(|group| group.as_raw()).collect();
        further.sort_unstable();
        further
    }

    /// Does `work` as root.
    ///
    /// # Errors
    /// The rights can't be changed.
    pub fn as_root<T>(&self, work: impl FnOnce() -> T) -> Result<T, Failure> {
        become_root()?;
        let done = work();
        self.drop_rights()?;
        Ok(done)
    }

    /// Becomes root for good, to execute podman.
    ///
    /// # Errors
    /// The rights can't be changed.
    pub fn give_up(self) -> Result<(), Failure> {
        become_root()
    }

    fn drop_rights(&self) -> Result<(), Failure> {
        let (root, root_group) = ROOT;
        // The user last: without root's rights the groups can't be changed any more. Its saved number stays root's.
        setgroups(&self.groups)
            .and_then(|()| setresgid(self.gid, self.gid, root_group))
            .and_then(|()| setresuid(self.uid, self.uid, root))
            .map_err(|errno| Failure::failed(format!("can't become the user {ENGINES}: {}", errno.desc())))
    }
}

fn become_root() -> Result<(), Failure> {
    let (root, group) = ROOT;
    setresuid(root, root, root)
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setgroups(&[]))
        .map_err(|errno| Failure::failed(format!("can't become root again: {}", errno.desc())))
}
