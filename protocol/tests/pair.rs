//! Two halves over a link that drops, repeats, reorders and cuts anywhere give exactly once, in order.

use proptest::prelude::*;

use crate::world::pair::{Bug, World};

fn schedules() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..400),
        proptest::collection::vec(any::<u8>(), 1_000..4_000),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_converges_exactly_once_and_in_order(bytes in schedules()) {
        World::run(&bytes, None);
    }
}

#[test]
fn an_empty_world_comes_to_rest() {
    World::run(&[], None);
}

/// Schedules from a fixed seed; whether one of them breaks a promise.
fn is_found(bug: Bug) -> bool {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..1_000).any(|_| {
        let bytes: Vec<u8> = (0..1_500)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect();
        std::panic::catch_unwind(|| World::run(&bytes, Some(bug))).is_err()
    });
    std::panic::set_hook(quiet);
    found
}

/// The checks are worth something: each of these faults, planted, is found.
#[test]
fn planted_bugs_are_found() {
    for bug in [
        Bug::AckBeforeCommit,
        Bug::NoAgain,
        Bug::NoEarly,
        Bug::ForgetLanes,
        Bug::CommitBeforeDisk,
        Bug::RefuseBeforeCommit,
    ] {
        assert!(is_found(bug), "{bug:?} stayed hidden");
    }
}
