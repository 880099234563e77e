//! Counting: how many checks passed, failed and were left out, read from what test runners print.
//!
//! - Only the runners' own closing lines are counted; a run that succeeded without one is a failure, because a
//!   check that ran nothing proves nothing.
//!
//! Not here: running anything (`run`).

use std::fmt;
use std::ops::AddAssign;

/// Checks by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Checks that ran and held.
    pub(crate) passed: u64,
    /// Checks that ran and did not hold, or could not run.
    pub(crate) failed: u64,
    /// Checks left out: ignored tests, or an outside service that can't be reached.
    pub(crate) skipped: u64,
}

impl Tally {
    /// One check with this outcome.
    pub(crate) fn of_one(passed: bool) -> Self {
        Self { passed: u64::from(passed), failed: u64::from(!passed), skipped: 0 }
    }

    /// Whether nothing failed.
    pub(crate) fn is_success(self) -> bool {
        self.failed == 0
    }

    /// This tally, for a runner that ended with `success`: its word and its count must agree.
    pub(crate) fn confirmed(mut self, success: bool) -> Self {
        if !success && self.failed == 0 {
            self.failed = 1;
        }
        self
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// The closing line that people and CI read; `skipped` is named only if there is any.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// Reads nextest's `Summary [ 1.2s] 7 tests run: 5 passed (1 slow), 2 failed, 1 skipped`; `None` for other lines.
pub(crate) fn of_nextest(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim().strip_prefix("Summary [")?.split_once(']')?;
    let (run, outcomes) = counts.split_once(" run:")?;
    let run = run.trim().strip_suffix("tests").or_else(|| run.trim().strip_suffix("test"))?.trim();
    let mut tally = Tally::default();
    for (count, outcome) in without_brackets(outcomes).split(',').filter_map(count_and_outcome) {
        match outcome {
            "passed" => tally.passed += count,
            "skipped" => tally.skipped += count,
            // failed, timed out, exec failed, and whatever else is not a pass.
            _ => tally.failed += count,
        }
    }
    // `3/10 tests run`: the run was cut short, the others did not pass.
    if let Some((done, all)) = run.split_once('/') {
        let missing = all.trim().parse::<u64>().ok()?.saturating_sub(done.trim().parse().ok()?);
        tally.failed += missing;
    }
    Some(tally)
}

/// Reads libtest's `test result: ok. 3 passed; 0 failed; 1 ignored; ..`; `None` for other lines.
pub(crate) fn of_libtest(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for (count, outcome) in counts.split(';').filter_map(count_and_outcome) {
        match outcome {
            "passed" => tally.passed += count,
            "failed" => tally.failed += count,
            "ignored" => tally.skipped += count,
            _ => {}
        }
    }
    Some(tally)
}

/// Reads the closing line of a store rig, `300 passed, 0 failed`; `None` for other lines.
pub(crate) fn of_rig(line: &str) -> Option<Tally> {
    let (passed, failed) = line.trim().split_once(" passed, ")?;
    let failed = failed.strip_suffix(" failed")?;
    Some(Tally { passed: passed.parse().ok()?, failed: failed.parse().ok()?, skipped: 0 })
}

fn count_and_outcome(part: &str) -> Option<(u64, &str)> {
    let (count, outcome) = part.trim().split_once(' ')?;
    Some((count.parse().ok()?, outcome.trim()))
}

fn without_brackets(text: &str) -> String {
    let mut depth = 0_u32;
    text.chars()
        .filter(|c| {
            let outside = depth == 0 && *c != '(';
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            outside
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Option<Tally> {
        Some(Tally { passed, failed, skipped })
    }

    #[test]
    fn reads_what_nextest_says() {
        for (line, want) in [
            ("     Summary [   0.010s] 1 test run: 1 passed, 0 skipped", tally(1, 0, 0)),
            ("     Summary [   1.2s] 12 tests run: 12 passed (2 slow, 1 leaky), 3 skipped", tally(12, 0, 3)),
            (
                "     Summary [  61.0s] 5 tests run: 2 passed, 1 failed, 1 timed out, 1 exec failed, 2 skipped",
                tally(2, 3, 2),
            ),
            ("     Summary [   3.1s] 4/10 tests run: 3 passed, 1 failed, 0 skipped", tally(3, 7, 0)),
            ("     Summary [   0.0s] 0 tests run: 0 passed, 9 skipped", tally(0, 0, 9)),
            ("        PASS [   0.004s] xtask tally::tests::reads", None),
            ("Summary of 3 tests run: 3 passed", None),
        ] {
            assert_eq!(of_nextest(line), want, "{line}");
        }
    }

    #[test]
    fn reads_what_libtest_says() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.1s";
        assert_eq!(of_libtest(line), tally(3, 2, 1));
        assert_eq!(of_libtest("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured"), tally(0, 0, 0));
        assert_eq!(of_libtest("running 3 tests"), None);
    }

    #[test]
    fn reads_what_a_rig_says() {
        assert_eq!(of_rig("1999 passed, 1 failed"), tally(1999, 1, 0));
        assert_eq!(of_rig("100 of 2000 images, 0 failed, 1 recordings, 2 s"), None);
        assert_eq!(of_rig("test result: ok. 3 passed; 0 failed; 1 ignored"), None);
    }

    #[test]
    fn a_runner_that_failed_counts_at_least_once() {
        let passed = Tally { passed: 4, failed: 0, skipped: 0 };
        assert_eq!(passed.confirmed(false).failed, 1);
        assert_eq!(passed.confirmed(true), passed);
        assert_eq!(Tally { failed: 3, ..passed }.confirmed(false).failed, 3);
    }

    #[test]
    fn the_closing_line_names_skipped_only_if_there_is_any() {
        assert_eq!(Tally { passed: 2, failed: 0, skipped: 0 }.to_string(), "2 passed, 0 failed");
        assert_eq!(Tally { passed: 2, failed: 1, skipped: 3 }.to_string(), "2 passed, 1 failed, 3 skipped");
    }
}
