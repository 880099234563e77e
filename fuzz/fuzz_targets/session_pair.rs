//! Drives [`fulmar_fuzz::session_pair`]; without libFuzzer, replays the files named on the command line.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fulmar_fuzz::session_pair(bytes));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    fulmar_fuzz::replay(fulmar_fuzz::session_pair)
}
