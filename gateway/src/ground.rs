//! What a gateway stands on besides its sockets: the wall clock, and threads for work that blocks.
//!
//! - As a rule both are the operating system's.
//! - On a thread that is a simulated world ([`simulate`]) everything happens on that thread: the wall clock goes with tokio's,
//!   which may be paused, and blocking work is done in place. So a run depends on its seed only.
//!
//! Monotonic time is tokio's everywhere.

use std::{
    cell::Cell,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fulmar_protocol::id::UnixMillis;
use tokio::{task::JoinError, time::Instant};

thread_local! {
    static SIMULATED: Cell<Option<(UnixMillis, Instant)>> = const { Cell::new(None) };
}

/// From now on this thread is a simulated world, in which it is `wall` o'clock. May be called again: the clock jumps.
pub fn simulate(wall: UnixMillis) {
    SIMULATED.set(Some((wall, Instant::now())));
}

/// Whether this thread is a simulated world.
#[must_use]
pub fn is_simulated() -> bool {
    SIMULATED.get().is_some()
}

/// The wall clock.
#[must_use]
pub fn unix_now() -> UnixMillis {
    let now = match SIMULATED.get() {
        Some((wall, at)) => Duration::from_millis(wall.get()) + at.elapsed(),
        None => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
    };
    UnixMillis::new(u64::try_from(now.as_millis()).unwrap_or(0)).unwrap_or_default()
}

/// Monotonic time.
#[must_use]
pub fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Does work that may block, where it does not hold others up.
///
/// # Errors
/// It panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if is_simulated() { Ok(work()) } else { tokio::task::spawn_blocking(work).await }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_simulated_world_has_its_own_time_on_one_thread() {
        let wall = |millis| UnixMillis::new(millis).unwrap();
        let here = std::thread::current().id();
        assert!(unix_now().get() > 1_700_000_000_000 && !is_simulated());
        assert_ne!(blocking(|| std::thread::current().id()).await.unwrap(), here);
        simulate(wall(1_000));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(unix_now(), wall(3_000));
        simulate(wall(500));
        assert_eq!(unix_now(), wall(500), "the clock jumped");
        assert_eq!(blocking(|| std::thread::current().id()).await.unwrap(), here);
        assert!(std::thread::spawn(|| !is_simulated()).join().unwrap(), "other threads are none of it");
    }
}
