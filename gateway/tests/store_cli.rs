//! `fulmar store` as an operator meets it: answers, exit codes, folders in use, damaged, missing.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a step that fails is a test that fails")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use bytes::Bytes;
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Pseq, Seq, UnixMillis, UserId};
use fulmar_protocol::service::Roster;
use fulmar_store::{
    ConversationClass, ConversationMeta, EngineKind, Member, Op, Record, RecordKind, Role, Store,
    StoreOptions, User,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const COMMANDS: [&str; 10] =
    ["stats", "verify", "scrub", "export", "import", "compact", "migrate", "upgrade", "backup", "salvage"];

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

/// Runs `fulmar store` on a data folder. The exit code, standard output and the last line of standard error.
fn store(data: &Path, arguments: &[&str]) -> (i32, String, String) {
    let data = data.display().to_string();
    let output = output(&[&["store"], arguments, &["--data", &data]].concat());
    let error = text(&output.stderr);
    assert!(!error.contains("panicked"), "{error}");
    let last = error.lines().last().unwrap_or_default().to_owned();
    (output.status.code().unwrap(), text(&output.stdout), last)
}

/// The same with `--json`.
fn json(data: &Path, arguments: &[&str]) -> (i32, Value) {
    let (code, out, error) = store(data, &[arguments, &["--json"]].concat());
    assert_eq!(out.lines().count(), 1, "{arguments:?}: {out:?}, {error}");
    (code, serde_json::from_str(&out).unwrap())
}

/// A data folder of two shards with three users, two groups and a direct conversation, 300 records each, all of it settled.
fn made(data: &Path) -> ConversationId {
    let options = StoreOptions { shards: 2, ..StoreOptions::default() };
    fs::create_dir_all(data).unwrap();
    let store = Store::open(data.join("store"), &options).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let app = AppId::of("demo");
    let time = |n: u64| UnixMillis::new(1_700_000_000_000 + n).unwrap();
    let seq = |n: u64| Seq::new(n).unwrap();
    let mut writers: Vec<_> =
        (0..2).map(|n| store.shard(fulmar_protocol::id::ShardId::new(n).unwrap()).unwrap()).collect();
    let mut users: Vec<(UserId, String)> = Vec::new();
    for name in ["alice", "bob", "carol"] {
        let (writer, reader) = &mut writers[usize::from(store.shard_of_user(app, name).get())];
        let user = reader.allocate_user().unwrap();
        let row = User { app, name: name.to_owned(), created: time(0) };
        runtime.block_on(writer.commit(&[Op::NameUser { user, row }])).unwrap();
        users.push((user, name.to_owned()));
    }
    let direct = format!("{}:{}", users[0].0.min(users[1].0), users[0].0.max(users[1].0));
    let mut last = ConversationId::default();
    for (class, name) in [
        (ConversationClass::Direct, direct.as_str()),
        (ConversationClass::Group, "friends"),
        (ConversationClass::Group, "work"),
    ] {
        let shard = store.shard_of_conversation(app, class, name);
        let (writer, reader) = &mut writers[usize::from(shard.get())];
        let conversation = reader.allocate_conversation().unwrap();
        let row =
            ConversationMeta { app, class, name: name.to_owned(), creator: users[0].0, created: time(0) };
        let mut ops = vec![Op::NameConversation { conversation, row }];
        for n in 1..=300u64 {
            let created = n == 1;
            let payload = if created {
                fulmar_protocol::service::encode(&Roster { users: users[..2].to_vec() }).unwrap()
            } else {
                Bytes::from(vec![u8::try_from(n % 251).unwrap(); 700])
            };
            let record = Record {
                seq: seq(n),
                kind: if created { RecordKind::Created } else { RecordKind::Message },
                sender: users[usize::try_from(n % 2).unwrap()].0,
                device: if created { DeviceId::ZERO } else { DeviceId::FIRST },
                epoch: if created { Epoch::ZERO } else { Epoch::FIRST },
                pseq: Pseq::new(n / 2).unwrap(),
                time: time(n),
                count: n - 1,
                target: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                payload,
            };
            ops.push(Op::Append { conversation, record });
        }
        for (user, _) in &users[..2] {
            let row = Some(Member { role: Role::Member, joined: seq(1), since: time(1) });
            ops.push(Op::Member { conversation, user: *user, row });
        }
        runtime.block_on(writer.commit(&ops)).unwrap();
        last = conversation;
    }
    store.close().unwrap();
    last
}

fn files(folder: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.to_string_lossy().ends_with(suffix));
    found.sort();
    found
}

/// Changes one byte in the middle of the records of the largest segment. Returns its name.
fn damage(data: &Path) -> String {
    let all: Vec<PathBuf> = ["shard-000", "shard-001"]
        .iter()
        .flat_map(|shard| files(&data.join("store").join(shard), ".seg"))
        .collect();
    let segment = all.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(segment).unwrap();
    bytes[40_000] ^= 1;
    fs::write(segment, bytes).unwrap();
    segment.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn every_command_explains_itself_and_refuses_wrong_flags() {
    let bare = output(&["store"]);
    assert_eq!(bare.status.code(), Some(2));
    let help = text(&output(&["store", "--help"]).stdout);
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command}")), "{command} in {help}");
        let own = output(&["store", command, "--help"]);
        assert_eq!(own.status.code(), Some(0));
        let own = text(&own.stdout);
        assert!(own.contains(&format!("fulmar store {command}")) && own.contains("Examples:"), "{own}");
        assert!(own.lines().all(|line| line.chars().count() <= 120), "{own}");
        let wrong = output(&["store", command, "--jsn"]);
        assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong.stderr));
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&output(&["completions", shell]).stdout);
        for word in ["store", "scrub", "backup", "conversation", "renumber"] {
            assert!(script.contains(word), "{word} for {shell}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["import", "x", "--shards", "3"][..],
        &["import", "x", "--renumber"],
        &["import", "x", "--shards", "0", "--renumber"],
        &["import", "x", "--engine", "slad"],
        &["export", "x", "--conversation", "none"],
        &["export", "x", "--conversation", "1", "--app", "demo"],
        &["export"],
        &["backup"],
        &["migrate"],
        &["migrate", "--to", "memory"],
    ] {
        let (code, out, error) = store(folder.path(), arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {error}");
    }
}

#[test]
fn what_is_not_a_data_folder_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let shown = missing.display();
    for arguments in [&["stats"][..], &["verify"], &["scrub"], &["export", "x.jsonl"], &["backup", "copy"]] {
        let (code, out, error) = store(&missing, arguments);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}");
        assert_eq!(error, format!("fulmar: there is no data folder {shown}: name one with --data"));
        let (code, answer) = json(&missing, arguments);
        assert_eq!(code, 1);
        assert_eq!(answer["error"], format!("there is no data folder {shown}: name one with --data"));
        let (code, _, error) = store(folder.path(), arguments);
        assert_eq!(code, 1);
        assert!(error.contains("is not a data folder"), "{error}");
    }
    assert!(!missing.exists());
    let (code, _, error) = store(&missing, &["import", "/nowhere/x.jsonl"]);
    assert_eq!(code, 1);
    assert!(error.starts_with("fulmar: can't open /nowhere/x.jsonl: "), "{error}");
    assert!(!missing.exists(), "nothing is left of it");
}

#[test]
fn a_sound_folder_is_shown_proven_copied_exported_and_imported() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = at("data");
    let conversation = made(&data);

    let (code, stats) = json(&data, &["stats"]);
    assert_eq!(code, 0);
    assert_eq!((stats["engine"].as_str(), stats["shards"].as_array().unwrap().len()), (Some("sled"), 2));
    let records = |of: &Value| {
        of["shards"].as_array().unwrap().iter().map(|s| s["records"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(records(&stats), 900);
    let (code, shown, _) = store(&data, &["stats"]);
    assert_eq!(code, 0);
    assert!(shown.contains("engine sled, 2 shards") && shown.contains("not in use"), "{shown}");

    let (code, proven) = json(&data, &["verify"]);
    assert_eq!((code, &proven["problem_count"]), (0, &Value::from(0)), "{proven}");
    assert_eq!(records(&proven), 900);
    let (code, shown, _) = store(&data, &["verify"]);
    assert_eq!(code, 0, "{shown}");
    assert!(
        shown.contains("900 records in 3 conversations") && shown.trim_end().ends_with("sound"),
        "{shown}"
    );
    let (code, scrubbed) = json(&data, &["scrub"]);
    assert_eq!((code, &scrubbed["made_again"]), (0, &Value::Array(Vec::new())), "{scrubbed}");

    let all = at("all.jsonl.zst").display().to_string();
    let (code, exported) = json(&data, &["export", &all]);
    assert_eq!((code, exported["records"].as_u64(), exported["users"].as_u64()), (0, Some(900), Some(3)));
    assert_eq!(exported["file"], all);
    let (code, _, error) = store(&data, &["export", &all]);
    assert_eq!((code, error), (1, format!("fulmar: {all} exists: name another file")));
    let (code, out, error) = store(&data, &["export", "-", "--conversation", &conversation.to_string()]);
    assert_eq!(code, 0, "{error}");
    assert!(error.starts_with("exported 300 records, 1 conversation, 2 users"), "{error}");
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.first().unwrap()["type"], "export");
    assert_eq!(lines.last().unwrap()["type"], "end");
    assert_eq!(lines.iter().filter(|line| line["type"] == "record").count(), 300);
    let (code, nothing, _) = store(&data, &["export", "-", "--app", "nobody"]);
    assert_eq!((code, nothing.lines().count()), (0, 4), "header, two shards, end");

    // Another engine; and other numbers, with another count.
    let (code, imported) = json(&at("fjall"), &["import", &all, "--engine", "fjall"]);
    assert_eq!((code, &imported["engine"], &imported["shards"]), (0, &Value::from("fjall"), &Value::from(2)));
    assert_eq!(imported["imported"]["sha256"], exported["sha256"]);
    let (code, again) = json(&at("fjall"), &["export", &at("again.jsonl").display().to_string()]);
    assert_eq!((code, &again["sha256"]), (0, &exported["sha256"]));
    let (code, proven) = json(&at("fjall"), &["verify"]);
    assert_eq!(code, 0, "{proven}");
    let (code, imported) = json(&at("three"), &["import", &all, "--shards", "3", "--renumber"]);
    assert_eq!((code, &imported["renumbered"]), (0, &Value::from(true)), "{imported}");
    let (code, _, error) = store(&at("three"), &["import", &all]);
    assert_eq!(code, 1);
    assert!(error.contains("is not empty"), "{error}");
    let reopened = Store::open(
        at("three").join("store"),
        &StoreOptions { engine: EngineKind::Sled, ..StoreOptions::default() },
    )
    .unwrap();
    let user = |name: &str| {
        let shard = reopened.shard_of_user(AppId::of("demo"), name);
        reopened.reader(shard).unwrap().user_by_name(AppId::of("demo"), name).unwrap().unwrap()
    };
    let (alice, bob) = (user("alice"), user("bob"));
    let name = format!("{}:{}", alice.min(bob), alice.max(bob));
    let shard = reopened.shard_of_conversation(AppId::of("demo"), ConversationClass::Direct, &name);
    let reader = reopened.reader(shard).unwrap();
    let direct =
        reader.conversation_by_name(AppId::of("demo"), ConversationClass::Direct, &name).unwrap().unwrap();
    let created = reader.record(direct, Seq::FIRST).unwrap().unwrap();
    let roster: Roster = fulmar_protocol::service::decode(&created.payload).unwrap();
    assert_eq!(roster.users, [(alice, "alice".to_owned()), (bob, "bob".to_owned())]);

    // A backup is a data folder with the same in it; a second one finds most of it there.
    let copy = at("copy").display().to_string();
    for round in 0..2 {
        let (code, copied) = json(&data, &["backup", &copy]);
        assert_eq!(code, 0, "{copied}");
        let kept: u64 =
            copied["shards"].as_array().unwrap().iter().map(|s| s["kept"].as_u64().unwrap()).sum();
        assert_eq!(kept > 0, round > 0, "{copied}");
    }
    let (code, proven) = json(&at("copy"), &["verify"]);
    assert_eq!((code, records(&proven)), (0, 900), "{proven}");
    let (code, restored) = json(&at("copy"), &["export", &at("restored.jsonl").display().to_string()]);
    assert_eq!((code, &restored["sha256"]), (0, &exported["sha256"]));
}

#[test]
fn damage_has_an_exit_code_and_a_place() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    made(&data);
    let segment = damage(&data);
    let (code, found) = json(&data, &["verify"]);
    assert_eq!(code, 3, "{found}");
    let problem = &found["problems"][0];
    assert!(problem["file"].as_str().unwrap().ends_with(&segment), "{found}");
    assert_eq!(problem["repair"], "no");
    assert!(problem["conversation"].is_u64() && problem["seqs"].is_array(), "{found}");
    let (code, shown, _) = store(&data, &["verify"]);
    assert_eq!(code, 3);
    assert!(
        shown.contains(&segment) && shown.contains("conversation") && shown.contains("salvage"),
        "{shown}"
    );
    let (code, scrubbed) = json(&data, &["scrub"]);
    assert_eq!((code, &scrubbed["after"]), (3, &Value::Null), "{scrubbed}");
    let to = folder.path().join("x.jsonl");
    let (code, answer) = json(&data, &["export", &to.display().to_string()]);
    assert_eq!(code, 3, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("fulmar store"), "{answer}");
    assert!(!to.exists());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left of it");

    // What is left of it is sound, and the list says what is not there.
    let saved = folder.path().join("saved");
    let (code, report) = json(&data, &["salvage", &saved.display().to_string()]);
    assert_eq!(code, 3, "{report}");
    assert!(report["lost_records"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["lost"][0]["conversation"], problem["conversation"], "{report}");
    let (code, proven) = json(&saved, &["verify"]);
    assert_eq!(code, 0, "{proven}");
    let whole = folder.path().join("saved.jsonl");
    let (code, exported) = json(&saved, &["export", &whole.display().to_string()]);
    assert_eq!((code, exported["users"].as_u64(), exported["conversations"].as_u64()), (0, Some(3), Some(3)));
    let (code, _, error) = store(&data, &["salvage", &saved.display().to_string()]);
    assert_eq!(code, 1);
    assert!(error.contains("is not empty"), "{error}");
}

#[test]
fn an_index_that_is_wrong_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    made(&data);
    // The index of the other shard: sound in itself, and wrong here. (One that was copied would not be used at all.)
    let index = |shard: &str| data.join("store").join(shard).join("index");
    fs::rename(index("shard-000"), data.join("aside")).unwrap();
    fs::rename(index("shard-001"), index("shard-000")).unwrap();
    fs::rename(data.join("aside"), index("shard-001")).unwrap();
    let (code, found) = json(&data, &["verify"]);
    assert_eq!(code, 3, "{found}");
    assert_ne!(found["problems"][0]["repair"], "no", "{found}");
    let (code, report) = json(&data, &["scrub"]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["after"]["problem_count"], 0, "{report}");
    let (code, proven) = json(&data, &["verify"]);
    assert_eq!((code, &proven["problem_count"]), (0, &Value::from(0)), "{proven}");
}

/// A gateway that is killed when the test ends.
struct Serving(Child);

impl Serving {
    fn start(data: &Path) -> Self {
        let data = data.display().to_string();
        let arguments =
            ["serve", "--data", &data, "--listen", "127.0.0.1:0", "--http", "off", "--log-format", "json"];
        let mut child = fulmar(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let listens = lines.any(|line| line.unwrap().contains("listening"));
        assert!(listens, "it ended before it listened");
        std::thread::spawn(move || lines.for_each(drop));
        Self(child)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn beside_a_running_gateway_some_work_and_the_others_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    made(&data);
    let gateway = Serving::start(&data);
    let pid = gateway.0.id();
    let (code, stats) = json(&data, &["stats"]);
    assert_eq!((code, stats["in_use_by"].as_u64()), (0, Some(u64::from(pid))), "{stats}");
    let copy = folder.path().join("copy");
    let (code, copied) = json(&data, &["backup", &copy.display().to_string()]);
    assert_eq!(code, 0, "{copied}");
    for arguments in [
        &["verify"][..],
        &["scrub"],
        &["compact"],
        &["migrate", "--to", "fjall"],
        &["salvage", "/nowhere"],
        &["export", "/nowhere/x.jsonl"],
    ] {
        let (code, out, error) = store(&data, arguments);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}");
        assert_eq!(
            error,
            format!(
                "fulmar: the data folder {} is in use by process {pid}: stop it first; or copy the folder with `fulmar \
                 store backup`, which works beside it, and use the copy",
                data.join("store").display()
            )
        );
    }
    let (code, proven) = json(&copy, &["verify"]);
    assert_eq!(code, 0, "{proven}");
    drop(gateway);
    // The copy serves, too.
    let restored = Serving::start(&copy);
    drop(restored);
    let (code, proven) = json(&copy, &["verify"]);
    assert_eq!(code, 0, "{proven}");
}

#[test]
fn an_export_that_is_told_to_stop_does_not_end_as_if_it_were_whole() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    made(&data);
    let shown = data.display().to_string();
    let arguments = ["store", "export", "-", "--data", &shown];
    let mut child = fulmar(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut error = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert!(line.starts_with("{\"type\":\"export\""), "{line}");
    // It waits for us to read on: there is far more than a pipe holds.
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    line.clear();
    error.read_line(&mut line).unwrap();
    assert_eq!(line, "fulmar: stopping; what was begun is removed\n");
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("\"type\":\"end\""));
    line.clear();
    error.read_line(&mut line).unwrap();
    assert_eq!(line, "fulmar: stopped; nothing was kept of what was begun\n");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the moment of a signal, not a wait for something")]
fn the_engine_changes_and_changes_back_stopped_at_any_moment_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    made(&data);
    let export = |name: &str| {
        let (code, exported) = json(&data, &["export", &folder.path().join(name).display().to_string()]);
        assert_eq!(code, 0, "{exported}");
        exported["sha256"].clone()
    };
    let before = export("before.jsonl");
    let shown = data.display().to_string();
    for (round, (from, to)) in
        [("sled", "fjall"), ("fjall", "sled"), ("sled", "fjall")].into_iter().enumerate()
    {
        let arguments = ["store", "migrate", "--to", to, "--data", &shown];
        for millis in [0, 30, 60, 90] {
            let mut child = fulmar(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(millis * (round as u64 + 1)));
            kill_process(Pid::from_child(&child), Signal::INT).unwrap();
            // Before it could listen for signals, at a step, or too late: all of it is borne.
            child.wait().unwrap();
        }
        let (code, report) = json(&data, &["migrate", "--to", to]);
        assert_eq!((code, &report["to"]), (0, &Value::from(to)), "{report}");
        let was = report["from"].as_str().unwrap();
        assert!(was == from || was == to, "{report}");
        let (code, stats) = json(&data, &["stats"]);
        assert_eq!((code, &stats["engine"]), (0, &Value::from(to)), "{stats}");
        let (code, proven) = json(&data, &["verify"]);
        assert_eq!(code, 0, "{proven}");
        assert_eq!(export(&format!("{round}.jsonl")), before);
    }
    let (code, report) = json(&data, &["compact"]);
    assert_eq!(code, 0, "{report}");
    assert!(report["segments_after"].as_u64() <= report["segments_before"].as_u64(), "{report}");
    let (code, proven) = json(&data, &["verify"]);
    assert_eq!(code, 0, "{proven}");
    let (code, report) = json(&data, &["upgrade"]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(export("after.jsonl"), before);
    let (code, shown, _) = store(&data, &["migrate", "--to", "fjall"]);
    assert_eq!(code, 0);
    assert!(shown.trim_end().ends_with("the engine is fjall already"), "{shown}");
}
