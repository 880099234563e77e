//! The other servers' programs: where they are, and how they can be had.
//!
//! - What is in `PATH` is taken first, then what was built into the folder for programs (`target/peers` from `cargo xtask peers`).
//! - Nothing is installed unless that is asked for.
//!
//! Not here: how they are started (`server`).

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

use crate::plan::Peer;

/// rumqttd's version that is built.
const RUMQTTD: &str = "0.20.0";

/// A package of its own around rmqtt's library.
const RMQTT_MANIFEST: &str = include_str!("../programs/rmqtt.toml");
const RMQTT_MAIN: &str = include_str!("../programs/rmqtt.rs");

/// How a program comes to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Built from this workspace.
    Workspace,
    /// The system's package of this name.
    Package(&'static str),
    /// A crate with a program, built for itself.
    Crate(&'static str, &'static str),
    /// Our own few lines around a crate, built for themselves.
    Around,
}

/// The program of a server and where it comes from.
pub(crate) const fn program(peer: Peer) -> (&'static str, Source) {
    match peer {
        Peer::Fulmar => ("fulmar", Source::Workspace),
        Peer::Mosquitto => ("mosquitto", Source::Package("mosquitto")),
        Peer::Nats | Peer::Jetstream => ("nats-server", Source::Package("nats-server")),
        Peer::Rumqttd => ("rumqttd", Source::Crate("rumqttd", RUMQTTD)),
        Peer::RmqttTls | Peer::RmqttQuic => ("rmqtt-mini", Source::Around),
    }
}

/// How a program that is not here can be had, in words.
pub(crate) fn advice(peer: Peer) -> String {
    match program(peer) {
        (name, Source::Workspace) => format!("{name} is not built: cargo build --release --bin {name}"),
        (name, Source::Package(package)) => {
            format!("{name} is not installed: apt-get install {package}, or --install")
        }
        (name, Source::Crate(..) | Source::Around) => {
            format!("{name} is not built: --install does, some minutes")
        }
    }
}

/// Where the program is; `None`: not here.
pub(crate) fn find(peer: Peer, programs: &Path) -> Option<PathBuf> {
    let (name, source) = program(peer);
    if source == Source::Workspace {
        let beside = std::env::current_exe().ok()?.with_file_name(name);
        return beside.is_file().then_some(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin"].into_iter().map(PathBuf::from);
    let folders = std::env::split_paths(&path).chain(usual).chain([programs.join("bin")]);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Brings the program here.
///
/// # Errors
/// It can't be had; the text says why.
pub(crate) fn install(peer: Peer, programs: &Path) -> anyhow::Result<()> {
    let (name, source) = program(peer);
    match source {
        Source::Workspace => anyhow::bail!("{}", advice(peer)),
        Source::Package(package) => {
            ensure!(
                rustix::process::geteuid().is_root(),
                "{name} is a package of the system, and we are not root: apt-get install {package}"
            );
            // The service it may start is not used.
            let mut command = Command::new("apt-get");
            command.args(["install", "--yes", "--no-install-recommends", package]);
            carry_out(command.env("DEBIAN_FRONTEND", "noninteractive"))
        }
        Source::Crate(package, version) => {
            let mut command = Command::new(cargo());
            // Not --locked: what rumqttd 0.20.0 names there does not compile any more.
            command.args(["install", package, "--version", version, "--root"]).arg(programs);
            carry_out(command.env("CARGO_TARGET_DIR", programs.join("build")))
        }
        Source::Around => {
            let package = programs.join("rmqtt");
            fs::create_dir_all(package.join("src"))?;
            fs::write(package.join("Cargo.toml"), RMQTT_MANIFEST)?;
            fs::write(package.join("src/main.rs"), RMQTT_MAIN)?;
            let mut command = Command::new(cargo());
            command.args(["install", "--force", "--path"]).arg(&package).arg("--root").arg(programs);
            carry_out(command.env("CARGO_TARGET_DIR", programs.join("build")))
        }
    }
}

fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn carry_out(command: &mut Command) -> anyhow::Result<()> {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.join(std::ffi::OsStr::new(" ")).to_string_lossy().into_owned();
    eprintln!("$ {line}");
    // What it says belongs to the progress, not to the results.
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    ensure!(status.with_context(|| line.clone())?.success(), "failed: {line}");
    Ok(())
}

/// The first line of what a program says its version is.
pub(crate) fn version(peer: Peer, file: &Path) -> String {
    match program(peer).1 {
        Source::Around => {
            return RMQTT_MANIFEST
                .lines()
                .find_map(|line| {
                    Some(line.strip_prefix("rmqtt = ")?.split('"').nth(1)?.trim_start_matches('=').to_owned())
                })
                .unwrap_or_default();
        }
        Source::Crate(_, version) => return version.to_owned(),
        Source::Workspace | Source::Package(_) => {}
    }
    let flag = if peer == Peer::Mosquitto { "-h" } else { "--version" };
    let said = Command::new(file).arg(flag).stdin(Stdio::null()).output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    let first = said.lines().next().unwrap_or("unknown");
    first.rsplit(' ').next().unwrap_or(first).trim_start_matches('v').to_owned()
}

/// Whether a version of nats-server can sync after each write: from 2.10 on.
pub(crate) fn syncs_always(version: &str) -> bool {
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) >= (2, 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_here_is_told_with_how_to_get_it() {
        let nowhere = tempfile::tempdir().unwrap();
        for peer in Peer::ALL {
            assert!(advice(peer).contains(program(peer).0));
        }
        assert_eq!(find(Peer::RmqttQuic, nowhere.path()), None);
        fs::create_dir(nowhere.path().join("bin")).unwrap();
        let file = nowhere.path().join("bin/rmqtt-mini");
        fs::write(&file, "").unwrap();
        assert_eq!(find(Peer::RmqttQuic, nowhere.path()), Some(file));
    }

    #[test]
    fn the_package_around_rmqtt_stands_alone_and_says_its_version() {
        assert!(RMQTT_MANIFEST.contains("[workspace]") && RMQTT_MANIFEST.contains("rmqtt-mini"));
        let version = version(Peer::RmqttTls, Path::new("/no/such/program"));
        assert!(version.split('.').all(|number| number.parse::<u32>().is_ok()), "{version}");
    }

    #[test]
    fn who_can_sync_always_is_known_by_the_version() {
        for (version, can) in
            [("2.9.10", false), ("2.10.0", true), ("3.0", true), ("", false), ("x.y", false)]
        {
            assert_eq!(syncs_always(version), can, "{version}");
        }
    }
}
