//! `fulmar store export` and `import`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use fulmar_protocol::id::{AppId, ConversationId};
use fulmar_store::{ExportOptions, ExportReport, ExportTo, ImportOptions};
use serde::Serialize;

use super::FolderArgs;
use super::meter::Meter;
use super::numbers::OfTheGateway;
use super::stop::{self, Then};
use super::words::{bytes, grouped, many};
use crate::config::Assignment;
use crate::gateway::store_options;

const EXPORT_EXAMPLES: &str = "\
Examples:
  fulmar store export all.jsonl               everything
  fulmar store export all.jsonl.zst           the same, compressed
  fulmar store export acme.jsonl --app acme   one app
  fulmar store export - --conversation 1025   one conversation and its users,
                                              to standard output
  fulmar store export - | jq -c 'select(.type == \"record\")'

One JSON object a line: users, devices, conversations, members, records,
cursors. Payloads are base64. The last line has the counts and a SHA-256 over
the lines; docs/export.md describes every field. The gateway must be stopped;
or export a backup of its folder (-d). The file is there when it is whole.";

const IMPORT_EXAMPLES: &str = "\
Examples:
  fulmar store import all.jsonl.zst -d /srv/new
  fulmar store import all.jsonl -d /srv/new --engine fjall
  fulmar store import all.jsonl -d /srv/new --shards 8 --renumber

The data folder must be new or empty. It is there when everything is in it, was
read back and is the same as in the file; if not, nothing is left. Keys and
certificate of the old folder are not in the file: copy keys/ and tls/.

With the file's shard count every user and conversation keeps its number. With
another count all get new ones: devices remember numbers, so their databases
have to start empty, and --renumber says that you know.";

/// Flags of `fulmar store export`.
#[derive(Debug, Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// The file to be written, compressed if it ends in .zst; "-" is standard output
    #[arg(value_name = "FILE")]
    pub to: PathBuf,
    /// Only the users and conversations of this app
    #[arg(long, value_name = "NAME")]
    pub app: Option<String>,
    /// Only the conversation of this number, and the users it names
    #[arg(long, value_name = "NUMBER", conflicts_with = "app", value_parser = conversation)]
    pub conversation: Option<ConversationId>,
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

fn conversation(text: &str) -> Result<ConversationId, String> {
    let number = text.parse().ok().and_then(ConversationId::new);
    number
        .filter(|n| n.get() > 0)
        .ok_or_else(|| "expected the number of a conversation, such as 1025".to_owned())
}

/// Flags of `fulmar store import`.
#[derive(Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub struct ImportArgs {
    /// An export, compressed or not
    #[arg(value_name = "FILE")]
    pub from: PathBuf,
    /// Engine of the new folder, sled or fjall, instead of data.engine
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<String>,
    /// Shards of the new folder [default: those of the file]
    #[arg(long, value_name = "COUNT", requires = "renumber", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub shards: Option<u16>,
    /// Users and conversations may get new numbers: the databases of all devices start empty
    #[arg(long, requires = "shards")]
    pub renumber: bool,
    /// Which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Writes the file.
pub(super) fn export(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let to_stdout = args.to.as_os_str() == "-";
    if to_stdout && args.folder.json {
        anyhow::bail!(
            "the lines and the report can't both go to standard output: name a file, or leave --json out"
        );
    }
    let from = super::folder(&config)?;
    super::hear_warnings(&config)?;
    let stop = stop::watch(Then::Undo)?;
    let what = ExportOptions {
        app: args.app.as_deref().map(AppId::of),
        conversation: args.conversation,
        numbers: &OfTheGateway,
        stop: &stop,
    };
    let mut meter = Meter::start();
    let mut out = io::stdout().lock();
    let to = if to_stdout { ExportTo::Writer(&mut out) } else { ExportTo::File(&args.to) };
    let done =
        fulmar_store::export(&from, &store_options(&config), to, &what, &mut |told| meter.update(told));
    let took = meter.elapsed();
    drop(meter);
    drop(out);
    let report = match done {
        Ok(report) => report,
        // Whoever read our output has heard enough.
        Err(fulmar_store::MaintainError::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => return Err(super::explained(error)),
    };
    let shown = |report: &ExportReport| {
        format!("{}, in {:.1} s; SHA-256 of the lines {}", holds(report), took.as_secs_f64(), report.sha256)
    };
    if to_stdout {
        eprintln!("exported {}", shown(&report));
    } else {
        let object = Exported { file: args.to.display().to_string(), report: &report };
        super::report(args.folder.json, &object, || format!("{}: {}", args.to.display(), shown(&report)))?;
    }
    if report.lines == u64::from(config.data.shards) && args.app.is_some() {
        eprintln!("fulmar: nothing of app {:?} is in the folder", args.app.as_deref().unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Exported<'a> {
    file: String,
    #[serde(flatten)]
    report: &'a ExportReport,
}

fn holds(report: &ExportReport) -> String {
    format!(
        "{}, {}, {}, {}, {} ({} lines)",
        many(report.records, "record"),
        many(report.conversations, "conversation"),
        many(report.users, "user"),
        many(report.devices, "device"),
        bytes(report.bytes),
        grouped(report.lines)
    )
}

/// Makes the folder.
pub(super) fn import(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let engine = args.engine.as_ref().map(|engine| Assignment::flag("--engine", "data", "engine", engine));
    let config = args.folder.config.load(engine.into_iter().collect())?;
    let data = &config.data.path;
    let was_there = data.exists();
    let to = super::new_folder(data)?;
    super::hear_warnings(&config)?;
    let stop = stop::watch(Then::Undo)?;
    let how = ImportOptions { shards: args.shards, numbers: &OfTheGateway, stop: &stop };
    let mut meter = Meter::start();
    let options = store_options(&config);
    let done = fulmar_store::import(&args.from, &to, &options, &how, &mut |told| meter.update(told));
    let took = meter.elapsed();
    drop(meter);
    if done.is_err() && !was_there {
        // Only if it is empty; what else there may be is not ours.
        let _ = std::fs::remove_dir(data);
    }
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        let mut text = format!(
            "{}: {}, in {:.1} s, read back and compared; {}, engine {}",
            data.display(),
            holds(&report.imported),
            took.as_secs_f64(),
            many(u64::from(report.shards), "shard"),
            report.engine
        );
        if report.renumbered {
            text.push_str("; users and conversations have new numbers");
        }
        text
    })?;
    if report.engine != crate::config::DataConfig::default().engine.word() {
        eprintln!("fulmar: set data.engine = {:?} for the gateway that serves it", report.engine);
    }
    Ok(ExitCode::SUCCESS)
}
