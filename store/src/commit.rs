//! A commit: what one group of changes looks like in the commit log.
//!
//! - Commits are numbered from 1 without a gap; each carries the chain hash of the one before and its own, so that a hole,
//!   a rewrite or a commit of another shard is noticed.
//! - `decode` returns only what `encode` wrote: checksums of header and body, and the chain hash, are all verified.
//!
//! Not here: the operations in the body (`op`), the files it lies in (`shard::journal`), when it is durable (`shard::committer`).

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::codec::{Cursor, Malformed};

/// Hash over everything a shard committed up to and including a commit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ChainHash(pub [u8; 16]);

impl std::fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Names one commit of a shard and everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct CommitId {
    /// Its number, from 1; 0 is "nothing committed yet".
    pub number: u64,
    /// The chain hash up to it; all zero before the first.
    pub chain: ChainHash,
}

impl CommitId {
    /// Before the first commit.
    pub const ZERO: Self = Self { number: 0, chain: ChainHash([0; 16]) };
}

/// Bytes before a commit's body.
pub(crate) const HEADER_BYTES: usize = 72;

pub(crate) const MAGIC: [u8; 4] = *b"FLMC";
const VERSION: u8 = 1;

/// A commit as it came back from disk, verified by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its number and chain hash.
    pub id: CommitId,
    /// The chain hash of the one before.
    pub previous: ChainHash,
    /// Operations in the body.
    pub ops: u32,
    /// The operations' bytes.
    pub body: Bytes,
}

/// What the start of a commit says about the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: CommitId,
    pub(crate) previous: ChainHash,
    pub(crate) ops: u32,
    pub(crate) body_bytes: usize,
    body_crc: u32,
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// Wrong magic, version or checksum, or a body longer than a commit can be.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let header = bytes.get(..HEADER_BYTES).ok_or(Malformed("commit header"))?;
        let mut at = Cursor::new(header);
        if at.array("commit magic")? != MAGIC {
            return Err(Malformed("commit magic"));
        }
        if at.u8("commit version")? != VERSION {
            return Err(Malformed("commit version"));
        }
        let _reserved: [u8; 3] = at.array("commit reserved")?;
        let number = u64::from_be_bytes(at.array("commit number")?);
        let previous = ChainHash(at.array("commit previous chain hash")?);
        let chain = ChainHash(at.array("commit chain hash")?);
        let ops = u32::from_be_bytes(at.array("commit operation count")?);
        let body_bytes = u32::from_be_bytes(at.array("commit length")?);
        let body_crc = u32::from_be_bytes(at.array("commit body checksum")?);
        let _reserved: [u8; 8] = at.array("commit reserved")?;
        let covered = at.at();
        let crc = u32::from_be_bytes(at.array("commit header checksum")?);
        if crc != crc32c::crc32c(header.get(..covered).unwrap_or_default()) {
            return Err(Malformed("commit header checksum"));
        }
        let body_bytes = usize::try_from(body_bytes).map_err(|_| Malformed("commit length"))?;
        if body_bytes > crate::op::BATCH_BYTES_MAX {
            return Err(Malformed("commit length"));
        }
        Ok(Self { id: CommitId { number, chain }, previous, ops, body_bytes, body_crc })
    }
}

/// The commit after `previous`: its id, and its bytes.
pub(crate) fn encode(previous: CommitId, ops: u32, body: &[u8]) -> (CommitId, Vec<u8>) {
    let number = previous.number.saturating_add(1);
    let id = CommitId { number, chain: chain(previous.chain, number, body) };
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.extend_from_slice(&MAGIC);
    out.push(VERSION);
    out.extend_from_slice(&[0; 3]);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&previous.chain.0);
    out.extend_from_slice(&id.chain.0);
    out.extend_from_slice(&ops.to_be_bytes());
    // A body is at most BATCH_BYTES_MAX; the writer has refused larger ones.
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(&crc32c::crc32c(body).to_be_bytes());
    out.extend_from_slice(&[0; 8]);
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_be_bytes());
    out.extend_from_slice(body);
    (id, out)
}

/// Verifies a whole commit, header and body.
///
/// # Errors
/// Anything that [`encode`] does not write.
pub(crate) fn decode(bytes: Bytes) -> Result<Commit, Malformed> {
    let header = Header::decode(&bytes)?;
    let body = bytes.slice(HEADER_BYTES..);
    if body.len() != header.body_bytes {
        return Err(Malformed("commit length"));
    }
    if crc32c::crc32c(&body) != header.body_crc {
        return Err(Malformed("commit body checksum"));
    }
    if chain(header.previous, header.id.number, &body) != header.id.chain {
        return Err(Malformed("commit chain hash"));
    }
    Ok(Commit { id: header.id, previous: header.previous, ops: header.ops, body })
}

fn chain(previous: ChainHash, number: u64, body: &[u8]) -> ChainHash {
    let mut hash = Sha256::new();
    hash.update(previous.0);
    hash.update(number.to_be_bytes());
    hash.update(body);
    let digest: [u8; 32] = hash.finalize().into();
    let mut short = [0; 16];
    for (to, from) in short.iter_mut().zip(digest) {
        *to = from;
    }
    ChainHash(short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_are_pinned() {
        let (first, _) = encode(CommitId::ZERO, 0, b"");
        let (second, bytes) = encode(first, 3, b"hello");
        assert_eq!(second.number, 2);
        assert_eq!(crate::hex(&bytes), GOLDEN);
        let back = decode(bytes.into()).unwrap();
        assert_eq!(
            (back.id, back.previous, back.ops, &back.body[..]),
            (second, first.chain, 3, &b"hello"[..])
        );
    }

    // magic version | number 2 | previous chain | chain | 3 operations | 5 bytes | body crc | reserved | header crc | "hello"
    const GOLDEN: &str = concat!(
        "464c4d43010000000000000000000002",
        "ed8b7b2c2c6bae3a650fe15699b56315",
        "bb492dbdbbcfdcda6ced1f883f5d57bd",
        "00000003000000059a71bb4c00000000000000003d0c6edb",
        "68656c6c6f"
    );

    proptest! {
        #[test]
        fn a_commit_comes_back(body in proptest::collection::vec(any::<u8>(), 0..10_000), number in 0..u64::MAX, ops in any::<u32>()) {
            let previous = CommitId { number, chain: ChainHash([7; 16]) };
            let (id, bytes) = encode(previous, ops, &body);
            prop_assert_eq!(Header::decode(&bytes).unwrap().body_bytes, body.len());
            let commit = decode(bytes.into()).unwrap();
            prop_assert_eq!(commit, Commit { id, previous: previous.chain, ops, body: body.into() });
        }

        #[test]
        fn one_changed_or_missing_byte_is_noticed(body in proptest::collection::vec(any::<u8>(), 0..100), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let (_, bytes) = encode(CommitId::ZERO, 1, &body);
            let at = at.index(bytes.len());
            prop_assert!(decode(bytes[..at].to_vec().into()).is_err());
            let mut flipped = bytes;
            flipped[at] ^= flip;
            prop_assert!(decode(flipped.into()).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(bytes.into());
        }
    }
}
