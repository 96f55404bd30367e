//! Who holds what: footprints, reservations and the pools that they are charged to.
//!
//! Pure arithmetic over plain data; nothing here reads the machine.

pub mod footprint;
pub mod machine;
pub mod pools;
pub mod reservation;
pub mod swap;

pub use footprint::{Footprint, Mapped};
pub use machine::{Busy, FileId, Gpu, GpuKind, Machine, Measured, Memory, Pressure, Unit, UnitState};
pub use pools::{Charges, PerPool, Pool, capacity, unified_bytes};
pub use reservation::{Basis, Phase, Reservation};
pub use swap::{SwapArea, SwapName, SwapOwner, swapfile_bytes};
