//! Drives [`fulmar_fuzz::qmux`]; without libFuzzer, replays the files named on the command line.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fulmar_fuzz::qmux(bytes));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    fulmar_fuzz::replay(fulmar_fuzz::qmux)
}
