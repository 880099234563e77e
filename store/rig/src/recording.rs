//! Reading what `fulmar-faultdisk` recorded.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};

#[path = "../../faultdisk/src/recording.rs"]
mod format;

pub use format::{Event, MAGIC, SyncKind};

/// A whole recording.
///
/// # Errors
/// When it is not whole, or holds what can't be played back.
pub fn read(path: &Path) -> anyhow::Result<Vec<Event>> {
    let bytes =
        std::fs::read(path).with_context(|| format!("can't read the recording {}", path.display()))?;
    decode(&bytes)
}

fn decode(bytes: &[u8]) -> anyhow::Result<Vec<Event>> {
    let mut at = Fields(bytes.strip_prefix(MAGIC.as_slice()).context("not a recording")?);
    let mut events = Vec::new();
    while !at.0.is_empty() {
        let length = at.number::<4>()?;
        let mut frame = Fields(at.take(length)?);
        let sequence = frame.number::<8>()?;
        ensure!(sequence == events.len() as u64 + 1, "the recording has a hole before event {sequence}");
        let event = frame.event()?;
        ensure!(frame.0.is_empty(), "event {sequence} has bytes left over");
        if let Event::Unsupported { what } = &event {
            bail!("event {sequence} can't be played back: {}", String::from_utf8_lossy(what));
        }
        events.push(event);
    }
    Ok(events)
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: u64) -> anyhow::Result<&'a [u8]> {
        let length = usize::try_from(length)?;
        let (taken, rest) = self.0.split_at_checked(length).context("the recording is cut off")?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of so many bytes.
    fn number<const BYTES: u64>(&mut self) -> anyhow::Result<u64> {
        Ok(self.take(BYTES)?.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte)))
    }

    fn handle(&mut self) -> anyhow::Result<u32> {
        Ok(u32::try_from(self.number::<4>()?)?)
    }

    fn bytes(&mut self) -> anyhow::Result<Vec<u8>> {
        let length = self.number::<4>()?;
        Ok(self.take(length)?.to_vec())
    }

    fn event(&mut self) -> anyhow::Result<Event> {
        Ok(match self.number::<1>()? {
            1 => {
                let (handle, path) = (self.handle()?, self.bytes()?);
                let flags = self.number::<1>()?;
                Event::Open { handle, path, truncate: flags & 1 != 0, write_through: flags & 2 != 0 }
            }
            2 => Event::Write { handle: self.handle()?, offset: self.number::<8>()?, bytes: self.bytes()? },
            3 => Event::Length { handle: self.handle()?, length: self.number::<8>()? },
            4 => Event::Rename { from: self.bytes()?, to: self.bytes()? },
            5 => Event::Unlink { path: self.bytes()? },
            6 => Event::Mkdir { path: self.bytes()? },
            7 => Event::Rmdir { path: self.bytes()? },
            8 => Event::Link { from: self.bytes()?, to: self.bytes()? },
            9 => {
                let (handle, sync) = (self.handle()?, self.number::<8>()?);
                let kind = match self.number::<1>()? {
                    1 => SyncKind::Full,
                    2 => SyncKind::Data,
                    3 => SyncKind::Range,
                    4 => SyncKind::All,
                    other => bail!("no such sync: {other}"),
                };
                Event::SyncBegin { handle, sync, kind }
            }
            10 => Event::SyncEnd { sync: self.number::<8>()? },
            11 => Event::Mark { bytes: self.bytes()? },
            13 => Event::SyncFail { handle: self.handle()? },
            12 => Event::Unsupported { what: self.bytes()? },
            other => bail!("no such event: {other}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<Event> {
        vec![
            Event::Mkdir { path: b"a".to_vec() },
            Event::Open { handle: 1, path: b"a/b".to_vec(), truncate: true, write_through: false },
            Event::Write { handle: 1, offset: 1 << 40, bytes: b"hello".to_vec() },
            Event::Length { handle: 1, length: 7 },
            Event::SyncBegin { handle: 1, sync: 1, kind: SyncKind::Data },
            Event::Mark { bytes: b"ack 1".to_vec() },
            Event::SyncEnd { sync: 1 },
            Event::SyncFail { handle: 1 },
            Event::Rename { from: b"a/b".to_vec(), to: b"a/c".to_vec() },
            Event::Link { from: b"a/c".to_vec(), to: b"a/d".to_vec() },
            Event::Unlink { path: b"a/c".to_vec() },
            Event::Rmdir { path: b"a".to_vec() },
        ]
    }

    fn encoded(events: &[Event]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for (sequence, event) in (1..).zip(events) {
            event.encode(sequence, &mut bytes);
        }
        bytes
    }

    #[test]
    fn every_event_comes_back() {
        assert_eq!(decode(&encoded(&some())).unwrap(), some());
    }

    #[test]
    fn what_is_cut_off_or_has_a_hole_is_refused() {
        let bytes = encoded(&some());
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
        let mut hole = MAGIC.to_vec();
        Event::Mark { bytes: Vec::new() }.encode(2, &mut hole);
        assert!(decode(&hole).is_err());
        assert!(decode(&encoded(&[Event::Unsupported { what: b"mmap".to_vec() }])).is_err());
    }
}
