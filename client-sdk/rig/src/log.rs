//! What an app that will be killed writes down: one line per event, on disk before the next thing happens.
//!
//! - A line that the kill cut off is no line; the next run of the app removes it.
//! - Times are of the machine's monotonic clock, so that lines of several processes have one order.
//!
//! Not here: what the lines prove (`evidence`).

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use fulmar_badnet::history::{Client, Digest, Tag};

/// How a send ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Stored at this position; 0: the app was told that it is stored, not where.
    Acked(u64),
    /// Refused, with the code.
    Refused(u32),
    /// Its time ended, or it was cancelled.
    Expired,
}

/// One thing that happened to an app. `counter` is the app's own number of a message, `id` the SDK's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A run of the app began.
    Begun,
    /// The user's number is known.
    User(u64),
    /// The SDK is connected and in sync.
    Live,
    /// A message is about to be handed to the SDK, for a conversation by its place in the app's list.
    Intent { counter: u64, to: usize, digest: Digest },
    /// The SDK said that it is queued.
    Kept { counter: u64, id: u64 },
    /// The SDK said that it is not.
    NotKept { counter: u64 },
    /// A later run found it in the outbox.
    Listed { counter: u64, id: u64 },
    /// It is about to be cancelled.
    Cancel { id: u64 },
    /// The SDK told how it ended; the conversation's number is 0 when it is not known.
    Ended { id: u64, conversation: u64, end: End },
    /// A message came.
    Got { arrival: u64, conversation: u64, seq: u64, sender: u64, tag: Tag, digest: Digest },
    /// A record came that is no message.
    Notice { arrival: u64, conversation: u64, seq: u64 },
    /// Positions are missing for good.
    Gap { conversation: u64, from: u64, to: u64 },
    /// The outbox is empty.
    Empty,
}

/// A line: when, and what.
pub(crate) type Line = (u64, Entry);

impl Entry {
    fn to_text(self) -> String {
        match self {
            Self::Begun => "begun".to_owned(),
            Self::User(user) => format!("user {user}"),
            Self::Live => "live".to_owned(),
            Self::Intent { counter, to, digest } => format!("intent {counter} {to} {}", digest.0),
            Self::Kept { counter, id } => format!("kept {counter} {id}"),
            Self::NotKept { counter } => format!("not-kept {counter}"),
            Self::Listed { counter, id } => format!("listed {counter} {id}"),
            Self::Cancel { id } => format!("cancel {id}"),
            Self::Ended { id, conversation, end } => match end {
                End::Acked(seq) => format!("acked {id} {conversation} {seq}"),
                End::Refused(code) => format!("refused {id} {conversation} {code}"),
                End::Expired => format!("expired {id} {conversation}"),
            },
            Self::Got { arrival, conversation, seq, sender, tag, digest } => format!(
                "got {arrival} {conversation} {seq} {sender} {} {} {}",
                tag.client.0, tag.counter, digest.0
            ),
            Self::Notice { arrival, conversation, seq } => format!("notice {arrival} {conversation} {seq}"),
            Self::Gap { conversation, from, to } => format!("gap {conversation} {from} {to}"),
            Self::Empty => "empty".to_owned(),
        }
    }

    fn from_words(word: &str, numbers: &[u64]) -> Option<Self> {
        Some(match (word, numbers) {
            ("begun", []) => Self::Begun,
            ("user", [user]) => Self::User(*user),
            ("live", []) => Self::Live,
            ("intent", [counter, to, digest]) => {
                Self::Intent { counter: *counter, to: usize::try_from(*to).ok()?, digest: Digest(*digest) }
            }
            ("kept", [counter, id]) => Self::Kept { counter: *counter, id: *id },
            ("not-kept", [counter]) => Self::NotKept { counter: *counter },
            ("listed", [counter, id]) => Self::Listed { counter: *counter, id: *id },
            ("cancel", [id]) => Self::Cancel { id: *id },
            ("acked", [id, conversation, seq]) => {
                Self::Ended { id: *id, conversation: *conversation, end: End::Acked(*seq) }
            }
            ("refused", [id, conversation, code]) => {
                let end = End::Refused(u32::try_from(*code).ok()?);
                Self::Ended { id: *id, conversation: *conversation, end }
            }
            ("expired", [id, conversation]) => {
                Self::Ended { id: *id, conversation: *conversation, end: End::Expired }
            }
            ("got", [arrival, conversation, seq, sender, client, counter, digest]) => Self::Got {
                arrival: *arrival,
                conversation: *conversation,
                seq: *seq,
                sender: *sender,
                tag: Tag { client: Client(u32::try_from(*client).ok()?), counter: *counter },
                digest: Digest(*digest),
            },
            ("notice", [arrival, conversation, seq]) => {
                Self::Notice { arrival: *arrival, conversation: *conversation, seq: *seq }
            }
            ("gap", [conversation, from, to]) => {
                Self::Gap { conversation: *conversation, from: *from, to: *to }
            }
            ("empty", []) => Self::Empty,
            _ => return None,
        })
    }
}

/// Nanoseconds of the machine's monotonic clock.
pub(crate) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// The whole lines in `text`, and how many bytes they take.
///
/// # Errors
/// A line that no version of this rig writes.
pub(crate) fn read(text: &str) -> anyhow::Result<(Vec<Line>, usize)> {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut lines = Vec::new();
    for line in text.get(..whole).unwrap_or_default().lines() {
        let mut words = line.split(' ');
        let parsed = (|| {
            let at = words.next()?.parse().ok()?;
            let word = words.next()?;
            let numbers: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
            Some((at, Entry::from_words(word, &numbers)?))
        })();
        lines.push(parsed.with_context(|| format!("a line of the app's log is none: {line:?}"))?);
    }
    Ok((lines, whole))
}

/// An app's log, open for more.
#[derive(Debug)]
pub(crate) struct Log {
    file: Mutex<File>,
}

impl Log {
    /// Opens the log, and gives what earlier runs wrote.
    ///
    /// # Errors
    /// Those of the file system; a line that is none.
    pub(crate) fn open(path: &Path) -> anyhow::Result<(Self, Vec<Line>)> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let (lines, whole) = read(&text)?;
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok((Self { file: Mutex::new(file) }, lines))
    }

    /// Writes a line and syncs it. An app that can't write down what it was told proves nothing: it ends.
    pub(crate) fn note(&self, entry: Entry) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let line = format!("{} {}\n", now(), entry.to_text());
        if let Err(error) = file.write_all(line.as_bytes()).and_then(|()| file.sync_data()) {
            eprintln!("the app's log can't be written: {error}");
            std::process::exit(3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_and_a_torn_one_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let tag = Tag { client: Client(2), counter: 9 };
        let digest = Digest(u64::MAX);
        let entries = [
            Entry::Begun,
            Entry::User(5),
            Entry::Live,
            Entry::Intent { counter: 1, to: 2, digest },
            Entry::Kept { counter: 1, id: 7 },
            Entry::NotKept { counter: 2 },
            Entry::Listed { counter: 1, id: 7 },
            Entry::Cancel { id: 7 },
            Entry::Ended { id: 7, conversation: 3, end: End::Acked(4) },
            Entry::Ended { id: 8, conversation: 3, end: End::Refused(21) },
            Entry::Ended { id: 9, conversation: 0, end: End::Expired },
            Entry::Got { arrival: 1, conversation: 3, seq: 4, sender: 5, tag, digest },
            Entry::Notice { arrival: 2, conversation: 3, seq: 5 },
            Entry::Gap { conversation: 3, from: 6, to: 7 },
            Entry::Empty,
        ];
        let (log, before) = Log::open(&path).unwrap();
        assert_eq!(before, []);
        for entry in entries {
            log.note(entry);
        }
        std::fs::write(&path, [std::fs::read(&path).unwrap(), b"17 kept 1".to_vec()].concat()).unwrap();
        let (log, lines) = Log::open(&path).unwrap();
        assert_eq!(lines.iter().map(|(_, entry)| *entry).collect::<Vec<_>>(), entries);
        assert!(lines.is_sorted_by_key(|(at, _)| *at));
        log.note(Entry::Empty);
        let (lines, whole) = read(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((lines.len(), whole as u64), (entries.len() + 1, path.metadata().unwrap().len()));
    }

    #[test]
    fn what_is_no_line_is_an_error() {
        for text in ["x\n", "1\n", "1 what\n", "1 kept 1\n", "1 kept 1 2 3\n", "1 user x\n", "\n"] {
            assert!(read(text).is_err(), "{text:?}");
        }
        assert_eq!(read("1 li").unwrap(), (vec![], 0));
    }
}
