//! A client of the daemon: what every verb that asks it talks through.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::pin::Pin;

use futures_core::Stream;
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::{Connection, DynamicType, OwnedObjectPath, Variant};

use super::error::CallError;
use super::proxy::{JobProxy, ManagerProxy};
use crate::os::error_text;

/// A connection to the bus and the daemon's manager on it.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Connection,
    manager: ManagerProxy<'static>,
    interactive: bool,
}

/// How a model is to be loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Context length in tokens; the configured one when absent.
    pub context: Option<u64>,
    /// Models that may be stopped for it whatever their priority.
    pub instead_of: Vec<String>,
    /// Load even though the estimate is unknown or says no.
    pub force: bool,
    /// Whoever is stopped for it stays stopped when it ends.
    pub no_restore: bool,
}

/// Memory to be held for something that is no model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseOptions {
    /// How much of the host's memory; bytes.
    pub bytes: u64,
    /// How much of the first GPU's; bytes.
    pub gpu_bytes: u64,
    /// As much as this model takes instead.
    pub like: Option<String>,
    /// At this context length instead of the configured one; tokens.
    pub context: Option<u64>,
    /// 0 to 100: only strictly lower ones are evicted for it.
    pub priority: u8,
    /// Wait until there is room, rather than be refused.
    pub wait: bool,
}

impl Client {
    /// Connects to the bus at `address`, or to the system's. `interactive`: polkit may ask the
    /// user for a password.
    ///
    /// # Errors
    /// [`CallError::Unreachable`] when there is no such bus. The daemon itself is not looked for.
    pub async fn connect(address: Option<&str>, interactive: bool) -> Result<Self, CallError> {
        let builder = match address {
            Some(address) => zbus::connection::Builder::address(address),
            None => zbus::connection::Builder::system(),
        };
        let connection = builder.build().await.map_err(|error| {
            let bus = address.map_or_else(|| "the system bus".to_owned(), |a| format!("the bus at {a}"));
            let reason = match &error {
                zbus::Error::Connection(source, _) => error_text(source),
                other => other.to_string(),
            };
            CallError::Unreachable(format!("no connection to {bus}: {reason}"))
        })?;
        let manager =
            ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { connection, manager, interactive })
    }

    /// The connection to the bus.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The manager's methods that only read, and its signals.
    #[must_use]
    pub fn manager(&self) -> &ManagerProxy<'static> {
        &self.manager
    }

    /// Starts loading `instance`; answers with the path of the job.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn load(&self, instance: &str, options: &LoadOptions) -> Result<OwnedObjectPath, CallError> {
        let mut map: HashMap<&str, Variant<'_>> = HashMap::new();
        if let Some(context) = options.context {
            map.insert("context", context.into());
        }
        if !options.instead_of.is_empty() {
            map.insert("instead-of", options.instead_of.clone().into());
        }
        if options.force {
            map.insert("force", true.into());
        }
        if options.no_restore {
            map.insert("restore", false.into());
        }
        self.change("Load", &(instance, map)).await
    }

    /// Starts unloading `instance`; answers with the path of the job.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn unload(&self, instance: &str) -> Result<OwnedObjectPath, CallError> {
        self.change("Unload", &(instance,)).await
    }

    /// Never evict `instance`, or allow it again.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn set_pinned(&self, instance: &str, pinned: bool) -> Result<(), CallError> {
        self.change(if pinned { "Pin" } else { "Unpin" }, &(instance,)).await
    }

    /// Reads the configuration again; answers with the problems found in it.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn reload(&self) -> Result<Vec<String>, CallError> {
        self.change("Reload", &()).await
    }

    /// `enforce` or `observe`.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn set_mode(&self, mode: &str) -> Result<(), CallError> {
        self.change("SetMode", &(mode,)).await
    }

    /// Holds memory for as long as the descriptor is open and this process lives. Waits, where that is asked for.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn acquire_lease(&self, name: &str, options: &LeaseOptions) -> Result<OwnedFd, CallError> {
        let mut map: HashMap<&str, Variant<'_>> =
            HashMap::from([("priority", u32::from(options.priority).into()), ("wait", options.wait.into())]);
        if options.gpu_bytes > 0 {
            map.insert("gpu-bytes", options.gpu_bytes.into());
        }
        if let Some(like) = &options.like {
            map.insert("like", like.as_str().into());
        }
        if let Some(context) = options.context {
            map.insert("context", context.into());
        }
        let held: (zbus::OwnedFd, OwnedObjectPath) =
            self.change("AcquireLease", &(name, options.bytes, map)).await?;
        Ok(held.0.into())
    }

    /// Makes a swapfile of this size; returns once it is in use.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn add_swap(&self, bytes: u64) -> Result<(), CallError> {
        self.change("AddSwap", &(bytes,)).await
    }

    /// Takes a swapfile out of use and removes it.
    ///
    /// # Errors
    /// Whatever the daemon refuses it with.
    pub async fn remove_swap(&self, name: &str) -> Result<(), CallError> {
        self.change("RemoveSwap", &(name,)).await
    }

    /// The object of a job that `load` or `unload` answered with.
    ///
    /// # Errors
    /// [`CallError`] when the bus fails.
    pub async fn job(&self, path: &OwnedObjectPath) -> Result<JobProxy<'static>, CallError> {
        Ok(JobProxy::builder(&self.connection).path(path.clone()).build().await?)
    }

    /// A call that polkit decides on.
    async fn change<B, R>(&self, method: &'static str, body: &B) -> Result<R, CallError>
    where
        B: serde::Serialize + DynamicType,
        R: for<'d> zbus::wire::DynamicDeserialize<'d>,
    {
        let flags = if self.interactive { MethodFlags::ALLOW_INTERACTIVE_AUTH } else { MethodFlags::empty() };
        let reply = self.manager.inner().call_with_flags(method, flags, body).await?;
        reply.ok_or_else(|| CallError::Protocol(format!("{method} has no reply")))
    }
}

/// The next item of a stream, or `None` at its end.
pub async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}
