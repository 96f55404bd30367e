//! A virtual machine with a real systemd, the distribution's real llama-server and generated models.

pub mod guest;
pub mod image;
pub mod qemu;

pub use guest::Guest;
pub use image::ImageOptions;
pub use qemu::{Machine, MachineOptions};

use anyhow::Result;
use std::time::{Duration, Instant};

/// Starts llama-server by hand on a generated model and gets a completion over the forwarded port.
pub fn prove(guest: &Guest, model: &str) -> Result<u8> {
    let started = Instant::now();
    println!(
        "booted: {}",
        guest.ok("systemctl is-system-running; systemd-analyze | head -n 1; ls -s /srv/models")?
    );
    guest.ok(&format!(
        "systemd-run --quiet --unit=prove llama-server -m /srv/models/{model}.gguf --host 0.0.0.0 --port 8001 -c 1024 -np 1"
    ))?;
    guest.wait_for("the model is healthy", Duration::from_secs(180), |guest| {
        Ok(matches!(guest.http(8001, "/health", None), Ok((200, _))).then_some(()))
    })?;
    println!("healthy after {:.1} s", started.elapsed().as_secs_f32());
    let (status, body) = guest.http(8001, "/completion", Some(r#"{"prompt":"The mark","n_predict":8}"#))?;
    println!("{status} after {:.1} s: {body}", started.elapsed().as_secs_f32());
    guest.ok("systemctl stop prove")?;
    Ok(u8::from(status != 200))
}
