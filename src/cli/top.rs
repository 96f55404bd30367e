//! `plimsoll top`: the status, again and again.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use zbus::fdo::DBusProxy;
use zbus::names::BusName;

use super::args::{Common, Top as Args};
use super::failure::Failure;
use super::output::{Painter, eprint};
use super::status::{fetch, overview, read};
use crate::dbus::{CallError, NAME};

/// Shows it until Ctrl-C, until whoever reads has gone away, or as often as was asked for.
///
/// # Errors
/// The daemon does not answer the first time, or the output can't be written. A daemon that is away for a while later on
/// (it is restarted, say) is waited for.
pub(super) fn top(common: &Common, args: &Args) -> Result<(), Failure> {
    let (mut rounds, mut away) = (0, false);
    let live = !args.json && io::stdout().is_terminal();
    loop {
        // To ask one that was stopped would start it again.
        let there = if rounds == 0 { Ok(()) } else { is_there(common) };
        let text = there.and_then(|()| fetch(common)).and_then(|value| {
            if args.json { Ok(format!("{value}\n")) } else { Ok(overview(&read(value)?, Painter::stdout())) }
        });
        match text {
            Ok(text) => {
                away = false;
                let frame = if live { redrawn(&text) } else { text };
                if let Err(error) = show(&frame) {
                    // Whoever has gone away would be shown nothing for ever.
                    return Failure::from_output(&error).map_or(Ok(()), Err);
                }
            }
            Err(failure) if rounds == 0 => return Err(failure),
            Err(failure) if !away => {
                away = true;
                eprint(&format!("plimsoll: {}; it is tried again", failure.message));
            }
            Err(_) => {}
        }
        rounds += 1;
        if args.count.is_some_and(|count| rounds >= count) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(args.interval));
    }
}

/// That the daemon has its name on the bus.
fn is_there(common: &Common) -> Result<(), Failure> {
    let there = super::block_on(async {
        let client = super::connect(common).await?;
        let bus = DBusProxy::new(client.connection()).await.map_err(CallError::from)?;
        let name = BusName::try_from(NAME).map_err(|error| CallError::Protocol(error.to_string()))?;
        let owned = bus.name_has_owner(name).await;
        Ok(owned.map_err(|error| CallError::from(zbus::Error::from(error)))?)
    })?;
    if there { Ok(()) } else { Err(Failure::unavailable("plimsolld does not run")) }
}

fn show(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// In place of what stood there: from the upper left corner, each line up to its end, and nothing below. A screen that
/// was emptied first would flicker.
fn redrawn(text: &str) -> String {
    format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stood_there_is_overwritten_to_the_end_of_each_line() {
        assert_eq!(redrawn("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
