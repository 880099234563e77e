//! The open-file limit: raised at start as far as the system allows, with a clear word when that is not far.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What came of raising the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFiles {
    /// Files the process may have open now.
    pub limit: u64,
    /// Files it asked for.
    pub wanted: u64,
}

impl OpenFiles {
    /// One line when the limit stayed below what was asked for.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        (self.limit < self.wanted).then(|| {
            format!(
                "the open-file limit is {}, limits.open_files asks for {}: raise the hard limit (LimitNOFILE={} in the \
                 service, or ulimit -Hn), or lower limits.open_files",
                self.limit, self.wanted, self.wanted
            )
        })
    }
}

/// Raises the soft limit to `wanted`, at most to the hard one; never lowers it.
#[must_use]
pub fn raise(wanted: u64) -> OpenFiles {
    let before = getrlimit(Resource::Nofile);
    if let Some(current) = target(before, wanted) {
        // Refused by a sandbox, perhaps: what counts is what the limit is afterwards.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..before });
    }
    OpenFiles { limit: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), wanted }
}

/// What the soft limit should become; `None` when it is enough or can't grow.
fn target(limit: Rlimit, wanted: u64) -> Option<u64> {
    let current = limit.current?;
    let target = wanted.min(limit.maximum.unwrap_or(u64::MAX));
    (target > current).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_grows_to_what_is_wanted_or_allowed() {
        for (current, maximum, wanted, want) in [
            (Some(1024), Some(4096), 2048, Some(2048)),
            (Some(1024), Some(4096), 65_536, Some(4096)),
            (Some(1024), None, 65_536, Some(65_536)),
            (Some(4096), Some(4096), 65_536, None),
            (Some(65_536), Some(1 << 20), 1024, None),
            (None, None, 1024, None),
        ] {
            assert_eq!(
                target(Rlimit { current, maximum }, wanted),
                want,
                "{current:?} of {maximum:?} for {wanted}"
            );
        }
    }

    #[test]
    fn a_low_limit_is_named_with_its_number() {
        assert_eq!(OpenFiles { limit: 2048, wanted: 2048 }.warning(), None);
        assert_eq!(
            OpenFiles { limit: 1024, wanted: 2048 }.warning().as_deref(),
            Some(
                "the open-file limit is 1024, limits.open_files asks for 2048: raise the hard limit (LimitNOFILE=2048 in \
                 the service, or ulimit -Hn), or lower limits.open_files"
            )
        );
    }

    #[test]
    fn raising_never_lowers() {
        let before = getrlimit(Resource::Nofile).current;
        let after = raise(1);
        assert_eq!(Some(after.limit), before.or(Some(u64::MAX)));
    }
}
