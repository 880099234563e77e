//! Whether a shard's commits succeed, and who may try while they don't. Pure: the clock is an argument.
//!
//! - A commit that failed is void. From then on writes are refused before anything is decided about them, so that
//!   nothing in memory runs ahead of the disk; reads are not concerned.
//! - After a pause one batch is a trial. What comes while it is under way is refused with a short wait. It succeeds:
//!   everything goes on; no restart is needed.
//!
//! Not here: the commits (`shard`), trying the disk again (the store does, by itself).

use std::time::{Duration, Instant};

use fulmar_protocol::close::RefusalCode;
use fulmar_store::{CommitError, ReadError};

use super::command::Refusal;

/// Between a failed commit and the next trial. The store has its own pauses and answers at once meanwhile.
const TRIAL_PAUSE: Duration = Duration::from_millis(250);

/// How long a trial may be due without anybody who wants to write, until the shard makes one of its own.
const PROBE_AFTER: Duration = Duration::from_secs(1);

/// What those who come during a trial are told to wait: it is decided by then.
const TRIAL_WAIT_MS: u32 = 500;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Storage {
    failing: Option<Failing>,
}

#[derive(Debug)]
struct Failing {
    code: RefusalCode,
    since: Instant,
    trial_at: Instant,
    trying: bool,
}

/// What a failed commit says about the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// No commit will do for now.
    Storage(RefusalCode),
    /// This batch would not do: a mistake, or something it builds on is damaged.
    Batch,
}

impl Failure {
    pub(super) fn of(error: &CommitError) -> Self {
        match error {
            CommitError::Full { .. } => Self::Storage(RefusalCode::StorageFull),
            CommitError::Invalid(_) | CommitError::Read(ReadError::Damaged { .. }) => Self::Batch,
            _ => Self::Storage(RefusalCode::StorageUnavailable),
        }
    }

    /// What the askers are told.
    pub(super) const fn code(self) -> RefusalCode {
        match self {
            Self::Storage(code) => code,
            Self::Batch => RefusalCode::StorageUnavailable,
        }
    }
}

impl Storage {
    pub(super) const fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Whether something may be written now; `batch_is_empty`: the batch being filled holds no other write.
    pub(super) fn admits(&self, batch_is_empty: bool, now: Instant) -> Result<(), Refusal> {
        let Some(failing) = &self.failing else { return Ok(()) };
        if failing.trying || (now >= failing.trial_at && !batch_is_empty) {
            return Err(Refusal { code: failing.code, retry_after_ms: TRIAL_WAIT_MS });
        }
        if now < failing.trial_at { Err(Refusal::new(failing.code)) } else { Ok(()) }
    }

    /// Whether the shard should make a trial although nobody wants to write.
    pub(super) fn wants_probe(&self, now: Instant) -> bool {
        self.failing.as_ref().is_some_and(|failing| !failing.trying && now >= failing.trial_at + PROBE_AFTER)
    }

    /// A batch with writes goes to disk.
    pub(super) const fn began(&mut self) {
        if let Some(failing) = &mut self.failing {
            failing.trying = true;
        }
    }

    /// A batch with writes is on disk. Answers for how long none was, if that is over now.
    pub(super) fn committed(&mut self, now: Instant) -> Option<Duration> {
        let failing = self.failing.take()?;
        Some(now.saturating_duration_since(failing.since))
    }

    /// A batch failed. Answers whether that is news: nothing failed before, or for another reason.
    pub(super) fn failed(&mut self, failure: Failure, now: Instant) -> bool {
        let trial_at = now + TRIAL_PAUSE;
        match (failure, &mut self.failing) {
            (Failure::Storage(code), Some(failing)) => {
                let news = failing.code != code;
                *failing = Failing { code, since: failing.since, trial_at, trying: false };
                news
            }
            (Failure::Storage(code), failing @ None) => {
                *failing = Some(Failing { code, since: now, trial_at, trying: false });
                true
            }
            (Failure::Batch, failing) => {
                if let Some(failing) = failing {
                    failing.trying = false;
                }
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Failure {
        Failure::of(&CommitError::Full { reason: "0 bytes are left".to_owned() })
    }

    fn told(result: Result<(), Refusal>) -> (RefusalCode, u32) {
        let refusal = result.unwrap_err();
        (refusal.code, refusal.retry_after_ms)
    }

    #[test]
    fn writes_are_refused_until_one_trial_succeeds() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut storage = Storage::default();
        storage.began();
        assert_eq!(storage.admits(false, at(0)), Ok(()), "nothing fails: many share a batch");
        assert_eq!(storage.committed(at(1)), None);
        assert!(storage.failed(full(), at(10)), "that is news");
        assert_eq!(told(storage.admits(true, at(11))), (RefusalCode::StorageFull, 5_000));
        assert_eq!(storage.admits(true, at(260)), Ok(()), "the trial");
        assert_eq!(told(storage.admits(false, at(260))), (RefusalCode::StorageFull, 500), "one is enough");
        storage.began();
        assert_eq!(told(storage.admits(true, at(261))), (RefusalCode::StorageFull, 500), "it is under way");
        assert!(!storage.failed(full(), at(262)), "no news");
        assert!(storage.admits(true, at(500)).is_err());
        assert!(storage.failed(
            Failure::of(&CommitError::Unavailable { reason: "an input/output error".to_owned() }),
            at(501)
        ));
        assert_eq!(told(storage.admits(true, at(502))), (RefusalCode::StorageUnavailable, 1_000));
        assert!(!storage.wants_probe(at(1_000)) && storage.wants_probe(at(1_751)));
        storage.began();
        assert!(!storage.wants_probe(at(9_000)), "a trial is under way");
        assert_eq!(storage.committed(at(2_010)), Some(Duration::from_millis(2_000)));
        assert_eq!(storage.admits(false, at(2_011)), Ok(()));
    }

    #[test]
    fn a_batch_that_will_not_do_says_nothing_about_the_disk() {
        let now = Instant::now();
        let mut storage = Storage::default();
        let invalid = Failure::of(&CommitError::Invalid("a mistake".to_owned()));
        assert_eq!((invalid, invalid.code()), (Failure::Batch, RefusalCode::StorageUnavailable));
        storage.began();
        assert!(storage.failed(invalid, now));
        assert!(!storage.is_failing());
        assert_eq!(storage.admits(false, now), Ok(()));
        storage.failed(full(), now);
        storage.began();
        storage.failed(invalid, now + TRIAL_PAUSE);
        assert_eq!(
            storage.admits(true, now + TRIAL_PAUSE),
            Ok(()),
            "it was no answer: the next trial is due"
        );
    }
}
