//! Logging: set up once, and kept from being a weapon.
//!
//! - Lines go to standard error; standard output belongs to what a command was asked for.
//! - Spans follow the message with the same field names at every step (`conversation`, `seq`, `user`, `session`), so one
//!   filter shows one message's path.
//! - What a stranger can cause is logged once per kind and interval, with the number of times it was left out: a flood
//!   of bad frames costs a counter each.
//!
//! Not here: counting for Prometheus ([`crate::metrics`]).

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Logging can't be set up; one line that says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TelemetryError(String);

/// Starts logging for the whole process.
///
/// # Errors
/// The filter can't be read, or logging was started before.
pub fn start(log: &LogConfig) -> Result<(), TelemetryError> {
    let filter = filter(&log.filter)?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let started = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| TelemetryError(format!("logging can't be started: {e}")))
}

fn filter(text: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(text).map_err(|e| {
        TelemetryError(format!(
            "log.filter = {text:?} can't be read ({e}): expected a filter such as \"info\" or \
             \"info,fulmar_gateway=debug\""
        ))
    })
}

/// Lets one complaint per kind and interval through.
#[derive(Debug)]
pub struct Complaints {
    every: Duration,
    kinds: Mutex<HashMap<&'static str, Kind>>,
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    last: Instant,
    suppressed: u64,
}

impl Complaints {
    /// One per kind in each interval of this length.
    #[must_use]
    pub fn new(every: Duration) -> Self {
        Self { every, kinds: Mutex::default() }
    }

    /// Whether a complaint of this kind is due at `now`: if so, how many were left out since the last one.
    ///
    /// Kinds are words of this program, so their number is bounded.
    #[must_use]
    pub fn due(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.get_mut(kind) {
            None => {
                kinds.insert(kind, Kind { last: now, suppressed: 0 });
                Some(0)
            }
            Some(known) if now.saturating_duration_since(known.last) >= self.every => {
                let suppressed = known.suppressed;
                *known = Kind { last: now, suppressed: 0 };
                Some(suppressed)
            }
            Some(known) => {
                known.suppressed = known.suppressed.saturating_add(1);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_heard_once_per_interval_and_the_rest_is_counted() {
        let complaints = Complaints::new(Duration::from_secs(10));
        let start = Instant::now();
        for (seconds, kind, want) in [
            (0, "bad frame", Some(0)),
            (0, "bad frame", None),
            (1, "bad token", Some(0)),
            (9, "bad frame", None),
            (10, "bad frame", Some(2)),
            (11, "bad token", Some(0)),
            (11, "bad frame", None),
            (5, "bad frame", None),
            (30, "bad frame", Some(2)),
            (40, "bad frame", Some(0)),
        ] {
            assert_eq!(
                complaints.due(kind, start + Duration::from_secs(seconds)),
                want,
                "{kind} at {seconds}"
            );
        }
    }

    #[test]
    fn filters_are_checked() {
        for (text, good) in [
            ("info", true),
            ("info,fulmar_gateway=debug", true),
            ("info,fulmar_gateway[{conversation=1025}]=trace", true),
            ("fulmar_gateway=loud", false),
        ] {
            assert_eq!(filter(text).is_ok(), good, "{text}");
        }
        let error = filter("x=loud").unwrap_err().to_string();
        assert!(error.starts_with("log.filter = \"x=loud\" can't be read ("), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
