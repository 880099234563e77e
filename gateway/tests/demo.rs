//! `fulmar demo` as a person runs it: the real binary, a real second process that is killed, real UDP.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a step that fails is a test that fails")]

use std::path::Path;
use std::process::{Command, Output};

fn fulmar(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fulmar"))
        .args(arguments)
        .current_dir(folder)
        .env("TMPDIR", folder)
        .output()
        .expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What runs left behind: everything but the test's own files.
fn left_behind(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("fulmar-demo-")).collect()
}

#[test]
fn a_small_demo_passes_and_says_so_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["demo", "--phones", "12", "--messages", "200", "--kills", "1", "--json", "figures.json"];
    let ran = fulmar(folder.path(), &arguments);
    let (table, progress) = (text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success(), "{table}\n{progress}");
    assert!(table.contains("passed: everything sent was acked"), "{table}");
    assert!(progress.contains("the gateway is dead (kill -9, 1 of 1)"), "{progress}");

    let figures = std::fs::read_to_string(folder.path().join("figures.json")).unwrap();
    let figures: serde_json::Value = serde_json::from_str(&figures).unwrap();
    let mut fields: Vec<&String> = figures.as_object().unwrap().keys().collect();
    fields.sort();
    let want = [
        "ack_ms",
        "acked",
        "deliver_ms",
        "delivered",
        "duplicates",
        "gateway_kills",
        "lost",
        "out_of_order",
        "reconnects",
        "sent",
        "wire_bytes_per_message",
    ];
    assert_eq!(fields, want);
    for (field, want) in [
        ("sent", 200),
        ("acked", 200),
        ("delivered", 200),
        ("duplicates", 0),
        ("out_of_order", 0),
        ("lost", 0),
        ("gateway_kills", 1),
    ] {
        assert_eq!(figures[field], want, "{field}");
    }
    assert!(figures["reconnects"].as_u64().unwrap() >= 12, "every phone lost its connection: {figures}");
    for field in ["ack_ms", "deliver_ms"] {
        let at = |percentile: &str| figures[field][percentile].as_f64().unwrap();
        // Two ways through a network of 50 ms each, with 10 ms of jitter.
        assert!(at("p50") >= 90.0, "{figures}");
        assert!(at("p50") <= at("p99") && at("p99") <= at("p999"), "{figures}");
    }
    assert!(figures["wire_bytes_per_message"].as_f64().unwrap() > 100.0, "{figures}");
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[test]
fn an_input_is_replayed_line_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut input = String::new();
    for dialogue in 0..20 {
        // The same words again and again: only their place tells them apart.
        input += &format!("english\t{dialogue}\tA\thow are you?\nenglish\t{dialogue}\tB\tগুড 👍\n");
        input += &format!("english\t{dialogue}\tB\tগুড 👍\n");
    }
    std::fs::write(folder.path().join("input.tsv"), input).unwrap();
    let arguments =
        ["demo", "--input", "input.tsv", "--phones", "2", "--kills", "2", "--profile", "wifi", "--in-memory"];
    let ran = fulmar(folder.path(), &arguments);
    let (table, progress) = (text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success(), "{table}\n{progress}");
    let row = |name: &str| table.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
    assert!(row("sent").contains(" 60 "), "{table}");
    assert!(row("gateway killed").contains(" 2 "), "{table}");
}

#[test]
fn a_broken_input_is_named_by_file_line_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content).unwrap();
    write("speaker.tsv", "english\t1\tA\thello\nenglish\t1\tC\thi\n");
    write("fields.tsv", "english\t1\tA\n");
    write("empty.tsv", "");
    for (input, want) in [
        ("speaker.tsv", "fulmar: speaker.tsv, line 2: speaker \"C\" is neither A nor B"),
        ("fields.tsv", "fulmar: fields.tsv, line 1: 3 fields where 4 are wanted"),
        ("empty.tsv", "fulmar: empty.tsv: no dialogue in it"),
        ("missing.tsv", "fulmar: missing.tsv: No such file"),
    ] {
        let ran = fulmar(folder.path(), &["demo", "--input", input]);
        let said = text(&ran.stderr);
        assert_eq!(ran.status.code(), Some(1), "{said}");
        assert!(said.starts_with(want), "{said:?}");
        assert_eq!(said.lines().count(), 1, "{said:?}");
        assert!(ran.stdout.is_empty());
    }
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[test]
fn wrong_flags_say_what_would_be_right() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, code, want) in [
        (&["demo", "--profile", "moon"][..], 2, "unknown network profile \"moon\"; known are: clean"),
        (&["demo", "--phones", "1"], 2, "1 is not in 2..=2000"),
        (&["demo", "--json", "no/such/folder.json"], 1, "no/such/folder.json can't be written"),
    ] {
        let ran = fulmar(folder.path(), arguments);
        let said = text(&ran.stderr);
        assert_eq!(ran.status.code(), Some(code), "{said}");
        assert!(said.contains(want), "{said}");
    }
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}
