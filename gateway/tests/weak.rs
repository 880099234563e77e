//! `fulmar weak` as a person runs it: the real binary, a real gateway process, real sockets through a bad network.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a step that fails is a test that fails")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulmar"));
    command.arg("weak").args(arguments).current_dir(folder).env("TMPDIR", folder);
    command
}

fn fulmar(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What runs left behind: everything but the test's own files.
fn left_behind(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("fulmar-weak-")).collect()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_short_run_passes_and_leaves_page_and_figures() {
    let folder = tempfile::tempdir().unwrap();
    let arguments =
        ["--profile", "lossy", "--seconds", "4", "--phones", "2", "--html", "r.html", "--json", "r.json"];
    let ran = fulmar(folder.path(), &arguments);
    let (table, progress) = (text(&ran.stdout), text(&ran.stderr));
    assert_eq!(ran.status.code(), Some(0), "{table}\n{progress}");
    assert!(table.contains("Passed: each of 18 messages"), "{table}");
    assert!(progress.contains("lossy: connecting") && progress.contains("lossy: passed"), "{progress}");

    let figures = json(&folder.path().join("r.json"));
    let profile = &figures["profiles"][0];
    assert_eq!((&figures["passed"], &profile["profile"]), (&true.into(), &"lossy".into()));
    // Two phones, four seconds, a message each, and a burst of five each.
    assert_eq!(profile["messages"].as_array().unwrap().len(), 18);
    for (field, want) in [("lost", 0), ("duplicates", 0), ("out_of_order", 0), ("sent", 18)] {
        assert_eq!(profile[field], want, "{field}");
    }
    // Two ways through a network of 50 ms each.
    assert!(profile["deliver_ms"]["p50"].as_f64().unwrap() >= 90.0, "{profile}");
    assert!(profile["wire_bytes_per_message"].as_f64().unwrap() > 50.0, "{profile}");
    assert!(profile["connections"].as_u64().unwrap() >= 2, "{profile}");
    let page = std::fs::read_to_string(folder.path().join("r.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    assert_eq!(page.matches("<circle").count(), 18);
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[test]
fn where_udp_is_blocked_messages_go_by_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let ran = fulmar(folder.path(), &["--profile", "hotel-wifi", "--phones", "2", "--json", "r.json"]);
    let (table, progress) = (text(&ran.stdout), text(&ran.stderr));
    assert_eq!(ran.status.code(), Some(0), "{table}\n{progress}");
    let figures = json(&folder.path().join("r.json"));
    let attempts = figures["profiles"][0]["attempts"].as_array().unwrap();
    let won: Vec<_> = attempts.iter().filter(|attempt| attempt["ended"] == "won").collect();
    assert!(!won.is_empty() && won.iter().all(|attempt| attempt["way"] != "QUIC"), "{attempts:?}");
}

#[test]
fn an_interrupted_run_still_writes_its_report() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--profile", "lossy", "--profile", "clean", "--seconds", "600", "--phones", "2"];
    let mut child = command(folder.path(), &arguments)
        .args(["--html", "r.html", "--json", "r.json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It is in the middle once it says that something was delivered.
    let mut said = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let started = Instant::now();
    let playing = said.any(|line| {
        let line = line.unwrap();
        assert!(started.elapsed() < Duration::from_secs(90), "{line}");
        line.contains(" delivered, p50")
    });
    assert!(playing);
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // Its words are read on, so that no full pipe stops it.
    let words: Vec<String> = said.map_while(Result::ok).collect();
    let ran = child.wait_with_output().unwrap();
    assert_eq!(ran.status.code(), Some(130), "{}\n{words:?}", text(&ran.stdout));
    assert!(text(&ran.stdout).contains("Interrupted: nothing was wrong"), "{}", text(&ran.stdout));
    let figures = json(&folder.path().join("r.json"));
    assert_eq!(figures["interrupted"], true);
    assert_eq!(figures["unplayed"], serde_json::json!(["clean"]));
    assert!(!figures["profiles"][0]["messages"].as_array().unwrap().is_empty());
    assert!(std::fs::read_to_string(folder.path().join("r.html")).unwrap().contains("<circle"));
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[test]
fn wrong_flags_say_what_would_be_right() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, code, want) in [
        (
            &["--profile", "moon"][..],
            2,
            "known are: metro, lift, rural-edge, hotel-wifi, wifi-walkout, airplane",
        ),
        (&["--phones", "3"], 1, "phones chat in pairs"),
        (&["--html", "no/such/folder.html"], 1, "no/such/folder.html can't be written"),
    ] {
        let ran = fulmar(folder.path(), arguments);
        let said = text(&ran.stderr);
        assert_eq!(ran.status.code(), Some(code), "{said}");
        assert!(said.contains(want), "{said}");
    }
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}
