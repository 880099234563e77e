//! Leaving in order: the first signal starts the drain, the second one ends the process.
//!
//! - A drain starts once, with a deadline, and is never taken back.
//! - Everybody who has work to finish holds a [`Drain`] and learns of it; who comes late learns of it too.
//! - Whatever is left at the deadline is cut off: nothing acknowledged is lost by that.
//!
//! Not here: what is done in a drain (GOAWAY, flushing: `gateway`).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Why the gateway leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// SIGTERM: a service manager.
    Terminate,
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// The program asked for it.
    Request,
}

/// A drain that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draining {
    /// When the process ends, whatever is left.
    pub deadline: Instant,
    /// Why.
    pub cause: Cause,
}

impl Draining {
    /// Time left; zero when there is none.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Starts the drain. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DrainTrigger {
    deadline: Duration,
    state: watch::Sender<Option<Draining>>,
}

/// Learns of the drain. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain {
    state: watch::Receiver<Option<Draining>>,
}

/// A drain that takes at most `deadline` once it starts.
#[must_use]
pub fn drain(deadline: Duration) -> (DrainTrigger, Drain) {
    let (sender, receiver) = watch::channel(None);
    (DrainTrigger { deadline, state: sender }, Drain { state: receiver })
}

impl DrainTrigger {
    /// Starts the drain; `false` when it was started before, by whatever cause.
    pub fn start(&self, cause: Cause) -> bool {
        self.state.send_if_modified(|state| {
            let first = state.is_none();
            if first {
                *state = Some(Draining { deadline: Instant::now() + self.deadline, cause });
            }
            first
        })
    }

    /// One more who learns of it.
    #[must_use]
    pub fn subscribe(&self) -> Drain {
        Drain { state: self.state.subscribe() }
    }
}

impl Drain {
    /// Waits until the drain starts. Never ends if that can't happen any more because every trigger is gone.
    pub async fn started(&mut self) -> Draining {
        loop {
            if let Some(draining) = *self.state.borrow_and_update() {
                return draining;
            }
            if self.state.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The drain, if it has started.
    #[must_use]
    pub fn now(&self) -> Option<Draining> {
        *self.state.borrow()
    }

    /// Whether it has started.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.now().is_some()
    }

    /// Waits until the deadline of a started drain has passed.
    pub async fn deadline(&mut self) {
        let draining = self.started().await;
        tokio::time::sleep_until(draining.deadline).await;
    }
}

/// Starts the drain at the first SIGTERM or Ctrl-C, and returns at the second.
///
/// # Errors
/// The process can't listen for signals.
pub async fn watch_signals(trigger: DrainTrigger) -> std::io::Result<Cause> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        let cause = tokio::select! {
            Some(()) = terminate.recv() => Cause::Terminate,
            Some(()) = interrupt.recv() => Cause::Interrupt,
            else => std::future::pending().await,
        };
        if !trigger.start(cause) {
            return Ok(cause);
        }
        tracing::info!(?cause, "draining; the same signal again ends at once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_starts_once_and_everybody_learns_of_it() {
        let (trigger, early) = drain(Duration::from_secs(30));
        assert!(!early.is_draining());
        let mut waiting = early.clone();
        let waiting = tokio::spawn(async move { waiting.started().await });
        let started_at = Instant::now();
        assert!(trigger.start(Cause::Terminate));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(!trigger.start(Cause::Interrupt), "the second does not move the deadline");
        let mut late = trigger.subscribe();
        for seen in [waiting.await.unwrap(), late.started().await, early.now().unwrap()] {
            assert_eq!(
                seen,
                Draining { deadline: started_at + Duration::from_secs(30), cause: Cause::Terminate }
            );
        }
        assert_eq!(early.now().unwrap().left(), Duration::from_secs(20));
        late.deadline().await;
        assert!(Instant::now() >= started_at + Duration::from_secs(30));
        assert_eq!(early.now().unwrap().left(), Duration::ZERO);
    }
}
