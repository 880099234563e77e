//! The tools the checks need beyond a Rust toolchain: finding them, and installing what is missing.
//!
//! - A tool on the machine is used if it is new enough; otherwise the pinned version is built into `target/tools`.
//!   Nothing outside the target folder changes, except that a missing C++ compiler is installed where the system's
//!   package manager may be asked without a password.
//! - Tools are built without optimisation: they run for seconds, and building them is what takes long.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::run::{Workspace, ask, run};

/// A cargo subcommand.
#[derive(Debug)]
pub(crate) struct Tool {
    package: &'static str,
    /// A program it brings.
    program: &'static str,
    /// Arguments after the program's name that make it tell its version.
    version_args: &'static [&'static str],
    /// Version that is installed if there is none or an old one.
    pinned: &'static str,
    /// Oldest version that will do.
    at_least: [u32; 3],
    install_args: &'static [&'static str],
    /// What building it takes on two cores.
    minutes: &'static str,
}

/// Runs the tests.
pub(crate) const NEXTEST: Tool = Tool {
    package: "cargo-nextest",
    program: "cargo-nextest",
    version_args: &["nextest", "--version"],
    pinned: "0.9.151",
    at_least: [0, 9, 100],
    install_args: &["--no-default-features", "--features", "default-no-update"],
    minutes: "two minutes",
};

/// Judges licences, bans, sources and advisories.
pub(crate) const DENY: Tool = Tool {
    package: "cargo-deny",
    program: "cargo-deny",
    version_args: &["--version"],
    pinned: "0.20.2",
    at_least: [0, 18, 6],
    install_args: &[],
    minutes: "one minute",
};

/// Builds and runs fuzz targets.
pub(crate) const FUZZ: Tool = Tool {
    package: "cargo-fuzz",
    program: "cargo-fuzz",
    version_args: &["--version"],
    pinned: "0.13.2",
    at_least: [0, 13, 0],
    install_args: &[],
    minutes: "half a minute",
};

/// Draws flame graphs.
pub(crate) const INFERNO: Tool = Tool {
    package: "inferno",
    program: "inferno-flamegraph",
    // It does not tell its version.
    version_args: &["--help"],
    pinned: "0.12.8",
    at_least: [0, 0, 0],
    install_args: &[],
    minutes: "one minute",
};

impl Tool {
    /// Makes sure that `cargo` run by [`Workspace::cargo`] finds this tool, installing it if need be.
    ///
    /// # Errors
    /// When it is missing and can't be installed.
    pub(crate) fn ensure(&self, workspace: &Workspace) -> anyhow::Result<()> {
        // The folder of installed tools comes first in `PATH`, so one question covers both places.
        let told = ask(workspace.command(self.program).args(self.version_args));
        let found = told.as_deref().map(|told| version(told).unwrap_or_default());
        if found.is_some_and(|found| found >= self.at_least) {
            return Ok(());
        }
        let tools = workspace.tools();
        let why = if told.is_some() { "the one on this machine is too old" } else { "it is not installed" };
        eprintln!(
            "installing {} {} into {} ({why}); this takes about {} on two cores, once",
            self.package,
            self.pinned,
            tools.display(),
            self.minutes,
        );
        let start = Instant::now();
        let build = tools.join("build");
        let mut install =
            workspace.cargo(["install", "--locked", "--debug", "--version", self.pinned, "--root"]);
        install.arg(&tools).args(self.install_args).arg(self.package);
        install.env("CARGO_TARGET_DIR", &build).env("CARGO_PROFILE_DEV_DEBUG", "0");
        let installed = run(&mut install, Duration::from_secs(30 * 60), |_| ())?;
        if !installed {
            bail!(
                "could not install {name} {version}; is crates.io reachable? \
                 Or install it yourself: cargo install --locked {name}",
                name = self.package,
                version = self.pinned,
            );
        }
        std::fs::remove_dir_all(&build).with_context(|| format!("can't remove {}", build.display()))?;
        eprintln!("installed {} in {} s", self.package, start.elapsed().as_secs());
        Ok(())
    }
}

/// The first `a.b.c` in `text`.
fn version(text: &str) -> Option<[u32; 3]> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.split(['.', '-', '+']).map(|n| n.parse().ok());
        Some([numbers.next()??, numbers.next()??, numbers.next()??])
    })
}

/// Makes sure that there are compilers for the dependencies that build C (SQLite, ring) and C++ (libFuzzer).
///
/// # Errors
/// When one is missing and can't be installed without asking.
pub(crate) fn ensure_compilers(workspace: &Workspace) -> anyhow::Result<()> {
    let missing: Vec<&str> = [("CC", "cc", "gcc"), ("CXX", "c++", "g++")]
        .into_iter()
        .filter(|(variable, program, _)| std::env::var_os(variable).is_none() && on_path(program).is_none())
        .map(|(_, _, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(workspace, &["libc6-dev"], &missing, "SQLite, ring and libFuzzer are built from source")
}

/// Makes sure that there is a program of Debian's.
///
/// # Errors
/// When it is missing and can't be installed without asking.
pub(crate) fn ensure_package(
    workspace: &Workspace,
    program: &str,
    package: &'static str,
    why: &str,
) -> anyhow::Result<()> {
    if on_path(program).is_some() { Ok(()) } else { install(workspace, &[], &[package], why) }
}

/// Installs packages, `besides` with them, where the system's package manager may be asked without a password.
fn install(workspace: &Workspace, besides: &[&str], missing: &[&str], why: &str) -> anyhow::Result<()> {
    let named = missing.join(" ");
    if !rustix::process::geteuid().is_root() || on_path("apt-get").is_none() {
        bail!("{named} is missing ({why}): install it (Debian: sudo apt-get install {named})");
    }
    eprintln!("installing {named} with apt-get: {why}");
    let limit = Duration::from_secs(10 * 60);
    let mut update = workspace.command("apt-get");
    update.args(["update", "--quiet"]);
    let mut install = workspace.command("apt-get");
    install.args(["install", "--yes", "--quiet", "--no-install-recommends"]);
    install.args(besides).args(missing).env("DEBIAN_FRONTEND", "noninteractive");
    if run(&mut update, limit, |_| ())? && run(&mut install, limit, |_| ())? {
        return Ok(());
    }
    bail!("apt-get could not install {named}");
}

/// The program of this name in `PATH`.
fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file: &PathBuf| Path::is_file(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_tools_say() {
        for (text, want) in [
            ("cargo-nextest 0.9.143 (60fa45f63 2026-08-04)\nrelease: 0.9.143", Some([0, 9, 143])),
            ("cargo-deny 0.20.2", Some([0, 20, 2])),
            ("cargo-fuzz 0.13.0-rc.1", Some([0, 13, 0])),
            ("error: no such command", None),
        ] {
            assert_eq!(version(text), want, "{text}");
        }
    }

    #[test]
    fn pinned_versions_are_new_enough() {
        for tool in [NEXTEST, DENY, FUZZ] {
            assert!(version(tool.pinned).unwrap() >= tool.at_least, "{}", tool.package);
        }
    }
}
