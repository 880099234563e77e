//! How long to wait before the next attempt: full jitter, doubling (pure; the random number comes from outside).

use std::time::Duration;

/// The first ceiling.
const FIRST: Duration = Duration::from_millis(250);

/// The last ceiling.
const LAST: Duration = Duration::from_secs(8);

/// A wait between nothing and the ceiling after `failures` attempts that failed in a row; `random` is uniform.
pub(crate) fn full_jitter(failures: u32, random: u64) -> Duration {
    let ceiling = FIRST.saturating_mul(1 << failures.min(16)).min(LAST);
    let millis = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(random % (millis + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_eight_seconds() {
        let ceiling = |failures| {
            (0..20_000u64).map(|random| full_jitter(failures, random * 7_919)).max().unwrap().as_millis()
        };
        let ceilings: Vec<_> = [0, 1, 2, 3, 4, 5, 6, 30, u32::MAX].map(ceiling).to_vec();
        assert_eq!(ceilings, [250, 500, 1_000, 2_000, 4_000, 8_000, 8_000, 8_000, 8_000]);
        assert_eq!(full_jitter(5, 0), Duration::ZERO, "full jitter reaches down to nothing");
    }
}
