//! Tells the compiler that `cfg(fuzzing)`, which cargo-fuzz sets, is no typing error.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(fuzzing)");
}
