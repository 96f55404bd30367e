//! System calls that nix does not wrap or that need a word more, each as one safe function.
//!
//! What `host` reads and `action` does with them stands there; nothing here knows why it is called.

mod boot;
mod error_text;
mod follow;
mod hold;
mod limit;
mod memory;
mod pidfd;
mod priority;
mod residency;
mod stored;
mod swap;
mod time;
mod watched;

pub use boot::since_boot;
pub use error_text::error_text;
pub use follow::end_with_parent;
pub use hold::hold_range;
pub use limit::limit_child;
pub use memory::{lock_memory, refuse_huge_pages, release_memory, with_huge_pages};
pub use pidfd::{pid_of, pidfd_open, pidfd_send_signal};
pub use priority::wait_for_priority;
pub use residency::{ResidencyError, resident_bytes};
pub use stored::stored_descriptors;
pub use swap::{no_copy_on_write, swap_off, swap_on};
pub use time::local_time;
pub use watched::watched;
