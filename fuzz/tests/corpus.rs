//! The committed seeds, replayed on every toolchain.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;

fn replay(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut seeds: Vec<_> = std::fs::read_dir(&folder)
        .expect("the corpus is committed")
        .map(|entry| entry.expect("readable").path())
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
    for seed in seeds {
        eprintln!("{}", seed.display());
        target(&std::fs::read(seed).expect("readable"));
    }
}

#[test]
fn frame_decode() {
    replay("frame_decode", fulmar_fuzz::frame_decode);
}

#[test]
fn frame_round_trip() {
    replay("frame_round_trip", fulmar_fuzz::frame_round_trip);
}

#[test]
fn session_ops() {
    replay("session_ops", fulmar_fuzz::session_ops);
}

#[test]
fn session_pair() {
    replay("session_pair", fulmar_fuzz::session_pair);
}

#[test]
fn qmux() {
    replay("qmux", fulmar_fuzz::qmux);
}
