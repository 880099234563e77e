//! The manifest of a shard: up to which commit everything is settled, and the segments that hold it.
//!
//! - It is replaced as a whole: written beside the old one, synced, renamed over it, and the folder synced. Whoever reads it
//!   finds the old one or the new one.
//! - Every change raises the edition. A segment carries the edition it came with, so that an index which stands at an older
//!   edition knows what it lacks.
//! - Segments stand in order, oldest first: of two rows under one key, the later segment's counts.
//!
//! Not here: the segments' bytes (`segment`), the index (`engine`).

use std::io;

use fulmar_protocol::id::{ShardId, UnixMillis};
use serde::{Deserialize, Serialize};

use super::overlay::Counters;
use crate::{
    codec::{Cursor, Malformed},
    commit::{ChainHash, CommitId},
    files::{Files, ReadAt},
    segment::Summary,
};

/// Its name in the shard's folder.
pub(crate) const NAME: &str = "manifest";

const NAME_NEW: &str = "manifest.new";

const MAGIC: [u8; 4] = *b"FLMM";
const VERSION: u8 = 1;

/// Magic, version, shard, length, checksum.
const HEADER_BYTES: usize = 4 + 1 + 2 + 4 + 4;

/// Segments a manifest can name; at 512 MiB each, far more than a shard holds.
const SEGMENTS_MAX: usize = 100_000;

/// Bytes of the largest manifest.
const BYTES_MAX: u64 = 16 << 20;

/// A segment as the manifest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    /// The edition it came with.
    pub(crate) edition: u64,
    /// It was put together from others: what it holds was in the index before.
    pub(crate) merged: bool,
    /// The segments it was put together from, while rows of the index still point to them. They stand right before it.
    pub(crate) replaces: Vec<u64>,
    pub(crate) first_commit: u64,
    pub(crate) last_commit: u64,
    pub(crate) runs: u64,
    pub(crate) rows: u64,
    pub(crate) records: u64,
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// Bytes of records in it.
    pub(crate) run_bytes: u64,
    /// Times of its records.
    pub(crate) oldest: UnixMillis,
    pub(crate) newest: UnixMillis,
    /// Its runs lie in the cold tier, under this name; the file has its index only.
    pub(crate) cold: Option<String>,
}

impl Entry {
    /// `replaces`: the segments it was put together from; empty if it holds what was committed last.
    pub(crate) fn new(summary: &Summary, edition: u64, replaces: Vec<u64>) -> Self {
        Self {
            id: summary.id,
            edition,
            merged: !replaces.is_empty(),
            replaces,
            first_commit: summary.first_commit,
            last_commit: summary.last_commit,
            runs: summary.runs,
            rows: summary.rows,
            records: summary.records,
            bytes: summary.bytes,
            run_bytes: summary.run_bytes,
            oldest: summary.oldest,
            newest: summary.newest,
            cold: None,
        }
    }
}

/// What is settled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Goes up with every change; 0: nothing was ever settled.
    pub(crate) edition: u64,
    /// The last settled commit.
    pub(crate) settled: CommitId,
    /// The last settled commit of the edition before: together with the edition it names a history.
    pub(crate) before: ChainHash,
    pub(crate) counters: Counters,
    /// The number of the next segment.
    pub(crate) next_segment: u64,
    /// Oldest first.
    pub(crate) segments: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Body {
    edition: u64,
    settled: u64,
    chain: [u8; 16],
    before: [u8; 16],
    counters: Counters,
    next_segment: u64,
    segments: Vec<Entry>,
}

/// Why a manifest could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("the manifest can't be read: {0}")]
    Io(#[from] io::Error),
    #[error("the manifest is damaged: {0}")]
    Malformed(#[from] Malformed),
}

impl Manifest {
    /// The next edition, with everything as it is.
    pub(crate) fn next(&self) -> Self {
        Self { edition: self.edition.saturating_add(1), before: self.settled.chain, ..self.clone() }
    }

    /// Reads the manifest of a shard; an empty one if there is none.
    pub(crate) fn load(files: &dyn Files, shard: ShardId) -> Result<Self, ManifestError> {
        let file = match files.open(NAME) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error.into()),
        };
        Self::read(file.as_ref(), shard)
    }

    /// Reads a manifest.
    pub(crate) fn read(file: &dyn ReadAt, shard: ShardId) -> Result<Self, ManifestError> {
        let length = file.len()?;
        if length > BYTES_MAX {
            return Err(Malformed("manifest length").into());
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| Malformed("manifest length"))?];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Self::decode(&bytes, shard)?)
    }

    /// Puts this manifest in the place of the one before, durably.
    pub(crate) fn store(&self, files: &dyn Files, shard: ShardId) -> io::Result<()> {
        let mut file = files.create(NAME_NEW)?;
        file.append(&self.encode(shard))?;
        file.sync()?;
        drop(file);
        files.rename(NAME_NEW, NAME)?;
        files.sync_folder()
    }

    pub(crate) fn encode(&self, shard: ShardId) -> Vec<u8> {
        let body = Body {
            edition: self.edition,
            settled: self.settled.number,
            chain: self.settled.chain.0,
            before: self.before.0,
            counters: self.counters,
            next_segment: self.next_segment,
            segments: self.segments.clone(),
        };
        // Into a growing vector only types of unknown length fail, and the body has none.
        let body = postcard::to_extend(&body, Vec::new()).unwrap_or_default();
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        out.extend_from_slice(&MAGIC);
        out.push(VERSION);
        out.extend_from_slice(&shard.get().to_be_bytes());
        out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out), &body);
        out.extend_from_slice(&crc.to_be_bytes());
        out.extend_from_slice(&body);
        out
    }

    pub(crate) fn decode(bytes: &[u8], shard: ShardId) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        if at.array("manifest magic")? != MAGIC {
            return Err(Malformed("manifest magic"));
        }
        if at.u8("manifest version")? != VERSION {
            return Err(Malformed("manifest version"));
        }
        if u16::from_be_bytes(at.array("manifest shard")?) != shard.get() {
            return Err(Malformed("manifest: it is of another shard"));
        }
        let length = u32::from_be_bytes(at.array("manifest length")?);
        let covered = bytes.get(..at.at()).unwrap_or_default();
        let crc = u32::from_be_bytes(at.array("manifest checksum")?);
        let body = bytes.get(at.at()..).unwrap_or_default();
        if body.len() as u64 != u64::from(length) {
            return Err(Malformed("manifest length"));
        }
        if crc != crc32c::crc32c_append(crc32c::crc32c(covered), body) {
            return Err(Malformed("manifest checksum"));
        }
        let Ok((body, [])) = postcard::take_from_bytes::<Body>(body) else {
            return Err(Malformed("manifest body"));
        };
        if body.segments.len() > SEGMENTS_MAX {
            return Err(Malformed("manifest segment count"));
        }
        Ok(Self {
            edition: body.edition,
            settled: CommitId { number: body.settled, chain: ChainHash(body.chain) },
            before: ChainHash(body.before),
            counters: body.counters,
            next_segment: body.next_segment,
            segments: body.segments,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::files::memory::MemoryFiles;

    fn shard() -> ShardId {
        ShardId::new(3).unwrap()
    }

    fn manifest() -> Manifest {
        Manifest {
            edition: 9,
            settled: CommitId { number: 258, chain: ChainHash([0xab; 16]) },
            before: ChainHash([0xcd; 16]),
            counters: Counters { users: 3, conversations: 4, epoch: 5 },
            next_segment: 7,
            segments: vec![Entry {
                id: 6,
                edition: 8,
                merged: true,
                replaces: vec![4, 5],
                first_commit: 1,
                last_commit: 200,
                runs: 10,
                rows: 11,
                records: 300,
                bytes: 70_000,
                run_bytes: 60_000,
                oldest: UnixMillis::new(1).unwrap(),
                newest: UnixMillis::new(2).unwrap(),
                cold: Some("x".to_owned()),
            }],
        }
    }

    #[test]
    fn bytes_are_pinned() {
        assert_eq!(crate::hex(&manifest().encode(shard())), GOLDEN);
    }

    // magic version shard length crc | edition settled, chain, chain before | counters | next segment | one segment
    const GOLDEN: &str = concat!(
        "464c4d4d010003000000406ea6b140",
        "098202abababababababababababababababab",
        "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
        "0304050701",
        "06080102040501c8010a0bac02f0a204e0d4030102010178"
    );

    #[test]
    fn it_is_replaced_as_a_whole() {
        let files = MemoryFiles::default();
        assert_eq!(Manifest::load(&files, shard()).unwrap(), Manifest::default());
        let mut manifest = manifest();
        manifest.store(&files, shard()).unwrap();
        assert_eq!(Manifest::load(&files, shard()).unwrap(), manifest);
        manifest.edition += 1;
        manifest.segments.clear();
        manifest.store(&files, shard()).unwrap();
        assert_eq!(Manifest::load(&files, shard()).unwrap(), manifest);
        assert_eq!(files.list().unwrap().len(), 1, "nothing is left beside it");
        assert!(Manifest::load(&files, ShardId::new(4).unwrap()).is_err(), "not of another shard");
    }

    proptest! {
        #[test]
        fn one_changed_or_missing_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let bytes = manifest().encode(shard());
            let at = at.index(bytes.len());
            prop_assert!(Manifest::decode(&bytes[..at], shard()).is_err());
            let mut flipped = bytes;
            flipped[at] ^= flip;
            prop_assert!(Manifest::decode(&flipped, shard()).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::decode(&bytes, shard());
        }
    }
}
