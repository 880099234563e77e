//! `fulmar chat` line by line, through the real binary: two people, and a gateway that is away for a while.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Long enough for any machine; a test that meets it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn fulmar(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulmar"));
    command.args(arguments).current_dir(folder);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FULMAR_") {
            command.env_remove(name);
        }
    }
    command
}

/// A gateway that is killed when the test ends.
struct Gateway(Child);

impl Gateway {
    fn start(folder: &Path, port: u16) -> Self {
        let listen = format!("127.0.0.1:{port}");
        let mut command = fulmar(folder, &["serve", "--data", "data", "--listen", &listen, "--http", "off"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Its certificate is the last thing a chat needs to find it.
        let until = Instant::now() + PATIENCE;
        while !folder.join("data/tls/cert.pem").exists() {
            assert!(Instant::now() < until, "the gateway did not start");
            std::thread::yield_now();
        }
        Self(child)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Somebody who chats.
struct Chat {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Chat {
    fn start(folder: &Path, port: u16, arguments: &[&str]) -> Self {
        let server = format!("localhost:{port}");
        let mut command = fulmar(folder, &["chat", "--data", "data", "--server", &server]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, input, lines }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The next line it prints.
    fn hears(&self, want: &str) {
        assert_eq!(self.lines.recv_timeout(PATIENCE).as_deref(), Ok(want));
    }

    /// Ends the input; it leaves when everything is stored.
    fn leave(mut self) {
        self.input = None;
        assert!(self.child.wait().unwrap().success());
        let more = self.lines.recv_timeout(PATIENCE);
        assert_eq!(more, Err(RecvTimeoutError::Disconnected), "something was printed that nobody waited for");
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn two_people_and_a_gateway_that_is_away_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let gateway = Gateway::start(folder, port);
    let mut alice = Chat::start(folder, port, &["alice", "--with", "bob"]);
    alice.say("hello bob");
    let mut bob = Chat::start(folder, port, &["bob", "--with", "alice"]);
    bob.hears("alice: hello bob");
    bob.say("hello alice");
    bob.say("//slash");
    alice.hears("bob: hello alice");
    alice.hears("bob: /slash");

    // Killed and started again: what is typed meanwhile arrives, once and in order.
    drop(gateway);
    for line in ["one", "two \u{1b}[31mthree", "四 👍"] {
        alice.say(line);
    }
    let _gateway = Gateway::start(folder, port);
    bob.hears("alice: one");
    bob.hears("alice: two  [31mthree");
    bob.hears("alice: 四 👍");
    alice.leave();

    // The next run of alice has her history in the database and hears only what is new.
    let alice = Chat::start(folder, port, &["alice"]);
    bob.say("still there?");
    alice.hears("bob: still there?");
    bob.leave();
    alice.leave();
}

#[test]
fn what_is_missing_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let certificate = folder.path().join("cert.pem");
    std::fs::write(&certificate, "nothing").unwrap();
    let certificate = certificate.display().to_string();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for (arguments, want) in [
        (
            &["chat", "alice"][..],
            "fulmar: no gateway has run in fulmar-data: start `fulmar serve` there first",
        ),
        (
            &["chat", "alice", "--server", "nowhere", "--token", "t", "--certificate", &certificate],
            "fulmar: --server",
        ),
        (
            &["chat", "alice", "--server", &closed, "--token", "t", "--certificate", &certificate],
            "fulmar: the certificate to trust can't be read",
        ),
    ] {
        let mut command = fulmar(folder.path(), arguments);
        let ran = command.env("XDG_DATA_HOME", folder.path()).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(1), "{said}");
        assert!(said.starts_with(want), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}
