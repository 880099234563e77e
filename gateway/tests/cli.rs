//! The binary as an operator meets it: exit codes, one-line errors, first start, second process, signals.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a step that fails is a test that fails")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn fulmar(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulmar"));
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FULMAR_") {
            command.env_remove(name);
        }
    }
    command
}

fn output(arguments: &[&str]) -> Output {
    fulmar(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A gateway on loopback that is killed when the test ends.
struct Gateway {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: String,
    http: String,
    fingerprint: String,
    /// What was logged until it listened.
    seen: String,
}

impl Gateway {
    fn start(data: &Path) -> Self {
        let data = data.display().to_string();
        let arguments = [
            "serve",
            "--data",
            &data,
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--log-format",
            "json",
        ];
        let mut child = fulmar(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut gateway = Self {
            child,
            stderr,
            address: String::new(),
            http: String::new(),
            fingerprint: String::new(),
            seen: String::new(),
        };
        let mut seen = String::new();
        while gateway.address.is_empty() {
            let mut line = String::new();
            let read = gateway.stderr.read_line(&mut line).unwrap();
            assert!(read > 0, "it ended before it listened:\n{seen}");
            seen.push_str(&line);
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "listening" {
                let field = |name: &str| line[name].as_str().unwrap().to_owned();
                gateway.address = field("address");
                gateway.http = field("http");
                gateway.fingerprint = field("fingerprint");
            }
        }
        gateway.seen = seen;
        gateway
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// The exit code, and what was logged until then.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_gateway_starts_answers_and_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let first = Gateway::start(&data);
    let mut ready = first.get("/readyz");
    while !ready.starts_with("HTTP/1.1 200") {
        assert!(ready.contains("starting"), "{ready}");
        ready = first.get("/readyz");
    }
    let health = first.get("/healthz");
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let metrics = first.get("/metrics");
    assert!(metrics.contains("\nfulmar_connections 0\n"), "{metrics}");
    let fingerprint = first.fingerprint.clone();

    // Another process on the same folder, and one on the same port.
    let shown = data.display().to_string();
    let same_folder = output(&["serve", "--data", &shown, "--listen", "127.0.0.1:0", "--http", "off"]);
    let error = text(&same_folder.stderr);
    let line = error.lines().last().unwrap();
    assert_eq!(same_folder.status.code(), Some(1));
    assert_eq!(
        line,
        format!(
            "fulmar: data folder {shown} is in use by another fulmar (process {}): stop that one, or give this one its \
             own with --data",
            first.child.id()
        )
    );
    let other = folder.path().join("other").display().to_string();
    let same_port = output(&["serve", "--data", &other, "--listen", &first.address, "--http", "off"]);
    let error = text(&same_port.stderr);
    assert_eq!(same_port.status.code(), Some(1));
    assert_eq!(
        error.lines().last().unwrap(),
        format!(
            "fulmar: can't listen on {}: another program has it; stop that one, or choose another with --listen or \
             listen.address",
            first.address
        )
    );

    let (code, log) = first.end(Signal::TERM);
    assert_eq!(code, Some(0), "{log}");
    let second = Gateway::start(&data);
    assert_eq!(second.fingerprint, fingerprint, "the certificate stays");
    assert_eq!(second.end(Signal::INT).0, Some(0));
}

#[test]
fn a_killed_gateway_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for _ in 0..3 {
        let gateway = Gateway::start(&data);
        assert_eq!(gateway.end(Signal::KILL).0, None);
    }
    let (code, log) = Gateway::start(&data).end(Signal::TERM);
    assert_eq!(code, Some(0), "{log}");
}

/// The one line with which `fulmar serve` refuses a data folder.
fn refusal(data: &Path, more: &[&str]) -> String {
    let shown = data.display().to_string();
    let arguments = [&["serve", "--data", &shown, "--listen", "127.0.0.1:0", "--http", "off"], more].concat();
    let output = output(&arguments);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    error.lines().last().unwrap().to_owned()
}

#[test]
fn a_folder_that_can_not_be_used_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    assert_eq!(Gateway::start(&data).end(Signal::TERM).0, Some(0));
    let (store, marker) = (data.join("store"), data.join("store/FORMAT"));
    let shown = store.display();
    let good = std::fs::read_to_string(&marker).unwrap();
    let format = good.lines().find(|line| line.starts_with("format = ")).unwrap();
    let known = format.trim_start_matches("format = ");
    let with = |line: &str| {
        std::fs::write(&marker, good.replace(format, line)).unwrap();
        refusal(&data, &[])
    };
    assert_eq!(
        with("format = 99"),
        format!(
            "fulmar: the data folder {shown} has format 99, this program knows formats up to {known}: use a newer program"
        )
    );
    assert_eq!(
        with("format = new"),
        format!(
            "fulmar: the FORMAT file of {shown} is damaged (format is not a number): restore the folder from a backup"
        )
    );
    std::fs::write(&marker, &good).unwrap();
    assert_eq!(
        refusal(&data, &["--set", "data.engine=fjall"]),
        format!(
            "fulmar: the data folder {shown} was made with the engine \"sled\", not \"fjall\": change it with `fulmar store \
             migrate --to fjall`, or set the engine to \"sled\" (data.engine)"
        )
    );
    let full = refusal(&data, &["--set", "data.reserve_mib=1048576"]);
    assert!(full.starts_with(&format!("fulmar: the disk of {shown} is full: ")), "{full}");
    assert!(full.ends_with("; make room, or lower data.reserve_mib"), "{full}");
    std::fs::remove_file(&marker).unwrap();
    assert_eq!(
        refusal(&data, &[]),
        format!(
            "fulmar: {shown} is not empty and not a Fulmar data folder (no readable FORMAT file): choose an empty or new \
             folder"
        )
    );
    std::fs::write(&marker, &good).unwrap();
    assert_eq!(Gateway::start(&data).end(Signal::TERM).0, Some(0), "nothing of that did harm");
}

#[test]
fn a_damaged_log_is_refused_and_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    // Killed, so that the log is not settled: it has to be proven at the next start.
    assert_eq!(Gateway::start(&data).end(Signal::KILL).0, None);
    let shard = data.join("store/shard-000");
    let logs = std::fs::read_dir(&shard).unwrap().map(|entry| entry.unwrap().path());
    let logs: Vec<_> =
        logs.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect();
    assert!(!logs.is_empty());
    for path in &logs {
        let mut bytes = std::fs::read(path).unwrap();
        // Behind the last commit there is nothing but room.
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[end / 2] ^= 0x10;
        std::fs::write(path, bytes).unwrap();
    }
    let line = refusal(&data, &[]);
    assert!(
        line.starts_with("fulmar: shard 0: ") && line.contains("restore the folder from a backup"),
        "{line}"
    );
}

/// A disk that is mounted read-only, in a mount namespace of the test's own where the system lets it have one.
#[test]
fn a_read_only_disk_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    assert_eq!(Gateway::start(&data).end(Signal::TERM).0, Some(0));
    let shown = data.display().to_string();
    let mount = "mount --bind \"$1\" \"$1\" && mount -o remount,ro,bind \"$1\" || exit";
    let inside = |script: &str| {
        let fulmar = env!("CARGO_BIN_EXE_fulmar");
        let script = format!("{mount}\n{script}");
        Command::new("unshare").args(["-Urm", "sh", "-c", &script, "sh", &shown, fulmar]).output()
    };
    match inside("true") {
        Ok(probe) if probe.status.success() => {
            let output = inside("exec \"$2\" serve --data \"$1\" --listen 127.0.0.1:0 --http off").unwrap();
            let error = text(&output.stderr);
            let want = format!(
                "fulmar: can't lock the data folder with {shown}/LOCK: the file system is read-only; choose a data folder \
                 elsewhere with --data"
            );
            assert_eq!(output.status.code(), Some(1), "{error}");
            assert_eq!(error.lines().last(), Some(want.as_str()), "{error}");
        }
        // No namespaces here. Whoever may write everywhere can't be refused otherwise.
        _ if rustix::process::geteuid().is_root() => {}
        _ => {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(data.join("LOCK"), std::fs::Permissions::from_mode(0o400)).unwrap();
            let line = refusal(&data, &[]);
            let want = format!("fulmar: can't lock the data folder with {shown}/LOCK: user ");
            assert!(line.starts_with(&want) && line.ends_with("with --data"), "{line}");
        }
    }
    assert_eq!(Gateway::start(&data).end(Signal::TERM).0, Some(0));
}

#[test]
fn less_than_the_default_is_never_silent() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("fulmar.toml"), "[data]\ndurability = \"process\"\n").unwrap();
    let gateway = Gateway::start(&data);
    let metrics = gateway.get("/metrics");
    assert!(metrics.contains("\nfulmar_durability{level=\"process\"} 1\n"), "{metrics}");
    assert!(metrics.contains("\nfulmar_storage_writable{shard=\"0\"} 1\n"), "{metrics}");
    let health = gateway.get("/healthz");
    assert!(
        health.starts_with("HTTP/1.1 200") && health.contains("a power cut may lose the newest"),
        "{health}"
    );
    assert!(
        gateway.seen.contains("\"level\":\"WARN\"") && gateway.seen.contains("data.durability"),
        "{}",
        gateway.seen
    );
    assert_eq!(gateway.end(Signal::TERM).0, Some(0));
}

#[test]
fn mistakes_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let config = at("bad.toml");
    std::fs::write(&config, "[listen]\nadress = \"127.0.0.1:0\"\n").unwrap();
    let missing = at("none/data");
    let none = at("none.toml");
    for (arguments, code, want) in [
        (
            &["serve", "--config", &config][..],
            2,
            format!("fulmar: {config}:2: [listen] has no key \"adress\"; did you mean \"address\"?"),
        ),
        (
            &["serve", "--config", &none],
            2,
            format!(
                "fulmar: {none}: there is no such file: leave out --config to use the defaults, or write one with \
                 `fulmar serve --print-config`"
            ),
        ),
        (
            &["serve", "--data", &missing, "--listen", "127.0.0.1:0", "--http", "off"],
            1,
            format!(
                "fulmar: can't make data folder {missing}: its parent {} does not exist; make that first, or choose \
                 another with --data",
                at("none")
            ),
        ),
        (
            &["serve", "--data", &at("d"), "--listen", "here"],
            2,
            "fulmar: flag --listen: listen.address = \"here\": expected an address and port, such as \"0.0.0.0:4433\" or \
             \"[::]:4433\""
                .to_owned(),
        ),
        (&["inspect", "0zz"], 1, "fulmar: \"0zz\" is not hexadecimal at character 2: give pairs of 0-9 and a-f".to_owned()),
    ] {
        let output = output(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert_eq!(text(&output.stderr), format!("{want}\n"), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
}

#[test]
fn the_printed_configuration_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let printed = output(&["serve", "--print-config"]);
    assert!(printed.status.success());
    let path = folder.path().join("fulmar.toml");
    std::fs::write(&path, &printed.stdout).unwrap();
    let checked = output(&["serve", "--check-config", "--config", &path.display().to_string()]);
    assert_eq!(text(&checked.stdout), "the configuration is good\n", "{}", text(&checked.stderr));
}

#[test]
fn a_token_is_one_line_and_makes_the_key_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data").display().to_string();
    let plain = output(&["token", "--data", &data, "--user", "alice"]);
    let token = text(&plain.stdout);
    assert_eq!((plain.status.code(), token.lines().count(), token.matches('.').count()), (Some(0), 1, 2));
    let object = output(&["token", "--data", &data, "--user", "bob", "--ttl", "1h", "--json"]);
    let object: Value = serde_json::from_slice(&object.stdout).unwrap();
    assert_eq!((object["app"].as_str(), object["user"].as_str()), (Some("demo"), Some("bob")));
    let header = jsonwebtoken::decode_header(object["token"].as_str().unwrap()).unwrap();
    assert_eq!(header.kid.as_deref(), object["kid"].as_str());
    assert_eq!(jsonwebtoken::decode_header(token.trim()).unwrap().kid, header.kid, "the key is made once");
}
