//! SIGTERM and SIGHUP as inputs of the loop.

use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::UnboundedSender;

use super::Input;

/// From now on SIGTERM ends the loop and SIGHUP has the configuration read again. `by_hand`:
/// SIGINT ends it as well, and SIGHUP is left alone.
///
/// # Errors
/// One sentence.
pub fn watch(sender: &UnboundedSender<Input>, by_hand: bool) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("signals can't be watched: {error}");
    on(SIGTERM, sender, || Input::Terminate).map_err(failed)?;
    if by_hand {
        on(SIGINT, sender, || Input::Terminate).map_err(failed)
    } else {
        on(SIGHUP, sender, || Input::Reload).map_err(failed)
    }
}

fn on(signal: i32, sender: &UnboundedSender<Input>, input: fn() -> Input) -> std::io::Result<()> {
    let (ours, handlers) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    pipe::register(signal, handlers)?;
    let mut ours = tokio::net::UnixStream::from_std(ours)?;
    let sender = sender.clone();
    tokio::spawn(async move {
        let mut seen = [0; 16];
        while ours.read(&mut seen).await.is_ok_and(|count| count > 0) {
            if sender.send(input()).is_err() {
                return;
            }
        }
    });
    Ok(())
}
