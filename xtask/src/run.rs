//! Running other programs: where the workspace is, what they find in their environment, what they print, how long
//! they may take.
//!
//! - A program's lines are passed on as they come and shown to one observer; nothing is collected.
//! - A program that outlives its limit is asked to end, then killed; that is a failure.
//!
//! Not here: what the lines mean (`tally`), which programs there are (`tool`, `steps`).

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Lines that may wait for the observer; a program that prints faster waits.
const LINES_WAITING_MAX: usize = 256;

/// How often a silent program is looked at, to see whether it is over its limit.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What a program gets between being asked to end and being killed.
const GRACE: Duration = Duration::from_secs(20);

/// The workspace this command was built from.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the root beside this crate, and the target folder where cargo puts it.
    ///
    /// # Errors
    /// When the folder this command was built in is gone.
    pub(crate) fn locate() -> anyhow::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let root = root.canonicalize().context("the workspace this command was built in is gone")?;
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        Ok(Self { target: root.join(target), root })
    }

    /// The workspace's root folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target folder.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where missing tools are installed; `bin` below it comes first in every program's `PATH`.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// A program that will run in the root, with the installed tools in its `PATH` and without the variables that
    /// cargo set for this one.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(&name);
            }
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let all = std::iter::once(self.tools().join("bin")).chain(std::env::split_paths(&path));
        if let Ok(path) = std::env::join_paths(all) {
            command.env("PATH", path);
        }
        if std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        command
    }

    /// Cargo, with the toolchain this command was started with.
    pub(crate) fn cargo<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command("cargo");
        command.args(args);
        command
    }
}

/// Whether this runs on a CI machine.
pub(crate) fn on_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

/// Runs `command` to its end and tells whether it succeeded.
///
/// Both of its outputs go to standard error, line by line; `observe` sees each line without colours.
///
/// # Errors
/// When the program can't be started, or did not end within `limit`.
pub(crate) fn run(
    command: &mut Command,
    limit: Duration,
    mut observe: impl FnMut(&str),
) -> anyhow::Result<bool> {
    let shown = show(command);
    eprintln!("$ {shown}");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start `{shown}`"))?;
    let (sender, lines) = sync_channel(LINES_WAITING_MAX);
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, sender.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, sender.clone());
    }
    drop(sender);
    let mut pass_on = |line: &str| {
        eprintln!("{line}");
        observe(&without_colours(line));
    };
    let ended = follow(&mut child, &lines, limit, &mut pass_on)?;
    // Read before waiting: a program that is being ended may still have lines to get rid of.
    let success = child.wait().with_context(|| format!("lost `{shown}`"))?.success();
    anyhow::ensure!(ended, "`{shown}` did not end within {} s and was ended", limit.as_secs());
    Ok(success)
}

/// Runs `command` silently and gives what it wrote to standard output; `None` if it failed or is not there.
pub(crate) fn ask(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Passes lines on until the program ends; `false` if it had to be ended.
fn follow(
    child: &mut Child,
    lines: &Receiver<String>,
    limit: Duration,
    pass_on: &mut impl FnMut(&str),
) -> anyhow::Result<bool> {
    let start = Instant::now();
    let mut asked_to_end = None;
    loop {
        match lines.recv_timeout(LOOK_EVERY) {
            Ok(line) => pass_on(&line),
            Err(RecvTimeoutError::Disconnected) => return Ok(asked_to_end.is_none()),
            // Something it left behind may keep its outputs open; once it has ended, silence is the end.
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_some() => {
                return Ok(asked_to_end.is_none());
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        match asked_to_end {
            None if start.elapsed() > limit => {
                let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid {
                    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
                }
                asked_to_end = Some(Instant::now());
            }
            Some(asked) if asked.elapsed() > GRACE => {
                child.kill()?;
                return Ok(false);
            }
            _ => {}
        }
    }
}

fn forward(from: impl Read + Send + 'static, to: SyncSender<String>) {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if to.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
}

fn show(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let name = name.to_string_lossy();
        let shown = !matches!(&*name, "PATH" | "CARGO_TERM_COLOR");
        value.filter(|_| shown).map(|value| format!("{name}={} ", quoted(value)))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(quoted);
    format!("{}{}", variables.collect::<String>(), words.collect::<Vec<_>>().join(" "))
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = word.chars().all(|c| c.is_alphanumeric() || "-_=./:,+@%".contains(c));
    if plain && !word.is_empty() { word.into_owned() } else { format!("'{word}'") }
}

/// `line` without terminal control sequences.
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            chars.by_ref().find(|c| c.is_ascii_alphabetic());
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_of_both_outputs_are_seen_without_colours() {
        let mut seen = Vec::new();
        let mut command = sh("echo one; printf '\\033[1;32mtwo\\033[0m\\n' >&2; printf three");
        assert!(run(&mut command, Duration::from_secs(60), |line| seen.push(line.to_owned())).unwrap());
        seen.sort();
        assert_eq!(seen, ["one", "three", "two"]);
    }

    #[test]
    fn a_failure_is_told() {
        assert!(!run(&mut sh("exit 3"), Duration::from_secs(60), |_| ()).unwrap());
        assert!(run(&mut Command::new("/no/such/program"), Duration::from_secs(60), |_| ()).is_err());
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let error = run(&mut sh("exec sleep 600"), Duration::ZERO, |_| ()).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
    }

    #[test]
    fn commands_are_shown_as_they_would_be_typed() {
        let mut command = Command::new("cargo");
        command.args(["doc", "a b"]).env("RUSTDOCFLAGS", "-D warnings").env("PATH", "/x");
        assert_eq!(show(&command), "RUSTDOCFLAGS='-D warnings' cargo doc 'a b'");
    }
}
