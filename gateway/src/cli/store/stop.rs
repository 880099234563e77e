//! Being told to stop: SIGTERM or Ctrl-C.

use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// What the first signal does; the second one ends the process in any case.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// The work is told, and leaves nothing of what it began.
    Undo,
    /// The process ends at once, which every step of the work bears, as it bears a power cut. The line says how to go on.
    End(&'static str),
}

/// Watches for signals from now on. The flag is set by the first one.
pub(super) fn watch(then: Then) -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&flag);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("signals can't be waited for")?;
    // Before the thread starts, so that no signal finds nobody.
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                match then {
                    Then::Undo if !told.swap(true, Ordering::Relaxed) => {
                        eprintln!("fulmar: stopping; what was begun is removed");
                    }
                    Then::Undo => exit(1),
                    Then::End(line) => {
                        eprintln!("fulmar: stopped; {line}");
                        exit(1);
                    }
                }
            }
        });
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).context("a thread can't be started")?;
    Ok(flag)
}
