//! The daemon on the real machine and the system bus.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::daemon::journal;

/// Threads for what blocks: headers of models, page cache, state files.
const BLOCKING_THREADS: usize = 4;

/// Runs a daemon to its end, on this thread.
pub fn run(daemon: impl Future<Output = Result<(), String>>) -> ExitCode {
    journal::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(daemon);
            // What still blocks (a disk that does not answer) must not hold up the end.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(format!("the runtime can't be started: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Serves this machine on the system bus until SIGTERM.
///
/// # Errors
/// One sentence.
pub async fn serve(root: &Path, bus: Option<&str>) -> Result<(), String> {
    let _ = (root, bus);
    Err("not yet".to_owned())
}
