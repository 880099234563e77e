//! The chat line by line, where there is no terminal: messages to standard output, everything else to standard error.
//!
//! - Every message is printed once, in the order of arrival; own messages of this device are not repeated.
//! - At the end of the input it waits until everything typed is stored, for a while; what is not is said.

use std::io::{self, BufRead as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use fulmar_client::{ConversationClass, Received};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::command;
use super::core::{Change, Core};
use super::model::printable;

/// Lines that may wait to be carried out.
const LINES_MAX: usize = 16;

/// How long the end waits for what is under way.
const LAST_WAIT: Duration = Duration::from_secs(15);

/// Runs until the end of the input, or `/quit`.
///
/// # Errors
/// The client's database failed, or standard output is gone.
pub(super) async fn run(mut core: Core) -> anyhow::Result<ExitCode> {
    let (lines, mut input) = mpsc::channel(LINES_MAX);
    // A blocked read ends with the process.
    std::thread::Builder::new().name("fulmar-input".to_owned()).spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    })?;
    let mut said = String::new();
    let mut notices = 0;
    loop {
        tokio::select! {
            change = core.next() => {
                if !show(&core, &change, &mut said)? {
                    break;
                }
            }
            line = input.recv() => {
                let Some(line) = line else { break };
                match command::read(&line) {
                    Ok(Some(command)) => {
                        if !core.execute(command).await? {
                            break;
                        }
                        // What a command answers at once stands in the model only.
                        print_notices(&core, &mut notices);
                    }
                    Ok(None) => {}
                    Err(wrong) => eprintln!("* {wrong}"),
                }
            }
        }
        notices = count_notices(&core);
    }
    let until = Instant::now() + LAST_WAIT;
    while core.under_way() > 0 {
        let Ok(change) = timeout_at(until, core.next()).await else { break };
        if !show(&core, &change, &mut said)? {
            break;
        }
    }
    let left = core.under_way();
    core.close().await?;
    if left > 0 {
        eprintln!("* {left} messages are not stored yet; they go out the next time");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what has changed; `false` when it is over.
fn show(core: &Core, change: &Change, said: &mut String) -> io::Result<bool> {
    match change {
        Change::Message(message) if !message.this_device => print(core, message)?,
        Change::Connection => {
            let (_, line) = core.model.connection_line();
            if line != *said {
                eprintln!("* {line}");
                *said = line;
            }
        }
        Change::Said(text) => eprintln!("* {text}"),
        Change::Message(_) | Change::Other => {}
        Change::Closed => {
            let (_, line) = core.model.connection_line();
            eprintln!("* {line}");
            return Ok(false);
        }
    }
    Ok(true)
}

fn print(core: &Core, message: &Received) -> io::Result<()> {
    let room = core.model.rooms.iter().find(|room| room.number == Some(message.conversation));
    let Some(entry) = room.and_then(|room| room.entries.get(&message.seq)) else { return Ok(()) };
    let title = room.map(|room| room.title()).unwrap_or_default();
    let who = entry.sender.map(|sender| core.model.name_of(sender));
    // Before the list has come, the name of a new conversation is not known; mostly it is a direct one.
    let direct = room.is_some_and(|room| room.class == ConversationClass::Direct || room.name.is_empty());
    if entry.created && direct {
        return Ok(());
    }
    let text = printable(&entry.text);
    let line = match who {
        Some(who) if direct && !entry.own => format!("{who}: {text}"),
        Some(who) => format!("{title} {who}: {text}"),
        None => format!("{title} * {text}"),
    };
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn count_notices(core: &Core) -> usize {
    core.model.notices.len() + core.model.rooms.iter().map(|room| room.notices.len()).sum::<usize>()
}

/// Prints the notices that a command has just left in the open conversation.
fn print_notices(core: &Core, before: &mut usize) {
    let new = count_notices(core).saturating_sub(*before);
    let notices: Vec<&str> = match core.model.room() {
        Some(room) => room.notices.iter().map(|(_, text)| text.as_str()).collect(),
        None => core.model.notices.iter().map(String::as_str).collect(),
    };
    let start = notices.len().saturating_sub(new);
    for text in notices.into_iter().skip(start) {
        eprintln!("* {text}");
    }
}
