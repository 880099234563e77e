//! The tip: the last commit that was acknowledged, noted outside the engine.
//!
//! - Written after a commit is durable and before it is acknowledged, into one of two slots in turn; not synced.
//! - So it never runs ahead of the log, and after the process was killed it is exact: a log that ends before the tip has
//!   lost something that was acknowledged, and a torn commit after the tip was not acknowledged. After a power cut it may
//!   be older, and proves less.
//!
//! Not here: what is done about a difference (`recovery`).

use std::io;

use crate::{
    codec::{Cursor, Malformed},
    commit::{ChainHash, CommitId},
    files::{Files, ReadAt, Slots},
};

/// Its name in the shard's folder.
pub(crate) const NAME: &str = "tip";

const MAGIC: [u8; 4] = *b"FLMT";
/// Magic, number, chain hash, checksum.
const SLOT_BYTES: usize = 4 + 8 + 16 + 4;
/// Slots lie apart, so that one write never touches both.
const SLOT_EVERY: u64 = 512;

/// The tip file of a shard.
#[derive(Debug)]
pub(crate) struct Tip {
    file: Box<dyn Slots>,
}

impl Tip {
    /// Opens or creates the file, and reads what it says: [`CommitId::ZERO`] if nothing.
    pub(crate) fn open(files: &dyn Files) -> io::Result<(Self, CommitId)> {
        let file = files.open_slots(NAME)?;
        let (newest, damaged) = read_slots(&*file)?;
        for what in damaged {
            tracing::warn!(%what, "one slot of the tip file is unreadable");
        }
        Ok((Self { file }, newest))
    }

    /// What the file says, and what is wrong with it, without creating it: [`CommitId::ZERO`] if it says nothing.
    pub(crate) fn read(files: &dyn Files) -> io::Result<(CommitId, Vec<Malformed>)> {
        match files.open(NAME) {
            Ok(file) => read_slots(file.as_ref()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((CommitId::ZERO, Vec::new())),
            Err(error) => Err(error),
        }
    }

    /// Begins an empty file in the place of one that names commits which are lost, and were allowed to be: it would contradict
    /// the log for as long as it lies there. The old one is gone for good when this returns.
    pub(crate) fn begin_again(files: &dyn Files) -> io::Result<Self> {
        match files.remove(NAME) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => files.sync_folder()?,
        }
        Ok(Self { file: files.open_slots(NAME)? })
    }

    /// Notes `id` as acknowledged.
    pub(crate) fn write(&self, id: CommitId) -> io::Result<()> {
        self.file.write_all_at(&encode(id), (id.number % 2) * SLOT_EVERY)
    }
}

/// The newest commit the slots name, and what is wrong with those that are unreadable.
fn read_slots<F: ReadAt + ?Sized>(file: &F) -> io::Result<(CommitId, Vec<Malformed>)> {
    let mut newest = CommitId::ZERO;
    let mut damaged = Vec::new();
    for slot in 0..2 {
        let mut bytes = [0; SLOT_BYTES];
        match file.read_exact_at(&mut bytes, slot * SLOT_EVERY) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return Err(error),
        }
        match decode(&bytes) {
            Ok(id) if id.number > newest.number => newest = id,
            Ok(_) => {}
            Err(_) if bytes == [0; SLOT_BYTES] => {}
            Err(what) => damaged.push(what),
        }
    }
    Ok((newest, damaged))
}

fn encode(id: CommitId) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&id.number.to_be_bytes());
    bytes.extend_from_slice(&id.chain.0);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_be_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Result<CommitId, Malformed> {
    let mut at = Cursor::new(bytes);
    if at.array("tip magic")? != MAGIC {
        return Err(Malformed("tip magic"));
    }
    let number = u64::from_be_bytes(at.array("tip number")?);
    let chain = ChainHash(at.array("tip chain hash")?);
    let covered = at.at();
    let crc = u32::from_be_bytes(at.array("tip checksum")?);
    if crc != crc32c::crc32c(bytes.get(..covered).unwrap_or_default()) {
        return Err(Malformed("tip checksum"));
    }
    Ok(CommitId { number, chain })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::memory::MemoryFiles;

    #[test]
    fn the_newest_readable_slot_counts() {
        let files = MemoryFiles::default();
        let id = |number| CommitId { number, chain: ChainHash([9; 16]) };
        let (tip, found) = Tip::open(&files).unwrap();
        assert_eq!(found, CommitId::ZERO);
        for number in 1..=4 {
            tip.write(id(number)).unwrap();
        }
        assert_eq!(Tip::open(&files).unwrap().1, id(4));
        tip.file.write_all_at(b"x", 0).unwrap();
        assert_eq!(Tip::open(&files).unwrap().1, id(3), "the other slot, when one is damaged");
    }

    #[test]
    fn bytes_are_pinned() {
        let id = CommitId { number: 258, chain: ChainHash([0xab; 16]) };
        assert_eq!(crate::hex(&encode(id)), GOLDEN);
    }

    const GOLDEN: &str = "464c4d540000000000000102ababababababababababababababababaaf6cbfc";
}
