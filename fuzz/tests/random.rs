//! A short walk through random inputs, for toolchains without libFuzzer.

/// Runs `target` on inputs from a fixed seed.
fn walk(target: fn(&[u8]), inputs: usize, longest: u64) {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    };
    for _ in 0..inputs {
        let len = next() % longest;
        let bytes: Vec<u8> = (0..len).map(|_| next().to_le_bytes()[0]).collect();
        target(&bytes);
    }
}

#[test]
fn frame_decode() {
    walk(fulmar_fuzz::frame_decode, 20_000, 300);
}

#[test]
fn frame_round_trip() {
    walk(fulmar_fuzz::frame_round_trip, 2_000, 500);
}

#[test]
fn session_ops() {
    walk(fulmar_fuzz::session_ops, 2_000, 1_500);
}

#[test]
fn session_pair() {
    walk(fulmar_fuzz::session_pair, 100, 2_000);
}

#[test]
fn qmux() {
    walk(fulmar_fuzz::qmux, 2_000, 2_000);
}
