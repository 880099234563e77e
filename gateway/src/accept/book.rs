//! Who is connected, in a file that outlives the process: after a kill the next one tells them that their connections are
//! gone ([`super::resets`]).
//!
//! ```text
//! header (32 B)   "FLMRLIVE" | version u32 | record bytes u32 | alive u64, milliseconds since 1970 | checksum u32 | 0 u32
//! record (64 B)   remote ip 16 B, port u16, 4 or 6 | local ip 16 B, 0, 4 or 6 | length of the id | id 20 B | 0 .. | checksum u32
//! ```
//!
//! - A connection is noted once its handshake is complete, so its address has proven itself. One that moves is noted at its
//!   new address when it has been seen there twice, [`SWEEP_EVERY`] apart: by then the path is validated or was given up.
//! - The file is news, not a record: it is written without a sync, up to a quarter of a second late. The system's page cache
//!   survives a kill; what a power cut leaves of it fails its checksums.
//! - At most one record per connection there may be. A stop in order removes the file.
//!
//! Not here: connections by byte stream; the system closes those of a process that is killed.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fulmar_protocol::id::UnixMillis;
use quinn::ConnectionId;
use tokio::sync::Notify;
use tracing::warn;
use xxhash_rust::xxh3::xxh3_64;

use crate::ground::{blocking, unix_now};

/// How late a change may be in the file.
const GATHER_FOR: Duration = Duration::from_millis(250);

/// How often it is looked whether connections have moved, and written down that the process lives.
pub const SWEEP_EVERY: Duration = Duration::from_secs(20);

/// The most records that are kept and read, whatever the configuration says.
const RECORDS_MAX: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"FLMRLIVE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const RECORD_BYTES: usize = 64;
/// The same as it stands in the header.
const RECORD_BYTES_TOLD: u32 = 64;
const ID_BYTES_MAX: usize = 20;

/// A connection of a process that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Where its client is.
    pub remote: SocketAddr,
    /// Our address it knows, if that is known.
    pub local: Option<IpAddr>,
    /// A connection id it was given.
    pub id: Vec<u8>,
}

impl Gone {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = Vec::with_capacity(RECORD_BYTES);
        put_ip(&mut bytes, self.remote.ip());
        bytes.extend(self.remote.port().to_be_bytes());
        match self.local {
            Some(local) => put_ip(&mut bytes, local),
            None => bytes.extend([0; 17]),
        }
        let id = self.id.get(..self.id.len().min(ID_BYTES_MAX)).unwrap_or_default();
        bytes.push(u8::try_from(id.len()).unwrap_or(0));
        bytes.extend(id);
        sealed(bytes)
    }

    /// `None`: nobody stands here, or the record is damaged.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = unsealed(bytes)?;
        let remote = take_ip(&mut rest)??;
        let port = u16::from_be_bytes(*take::<2>(&mut rest)?);
        let local = take_ip(&mut rest)?;
        let [len] = *take::<1>(&mut rest)?;
        let id = rest.get(..usize::from(len)).filter(|id| (1..=ID_BYTES_MAX).contains(&id.len()))?;
        Some(Self { remote: SocketAddr::new(remote, port), local, id: id.to_vec() })
    }
}

fn put_ip(bytes: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            bytes.extend(ip.octets());
            bytes.extend([0; 12]);
            bytes.push(4);
        }
        IpAddr::V6(ip) => {
            bytes.extend(ip.octets());
            bytes.push(6);
        }
    }
}

/// `Some(None)`: no address.
fn take_ip(rest: &mut &[u8]) -> Option<Option<IpAddr>> {
    let octets = *take::<16>(rest)?;
    let [kind] = *take::<1>(rest)?;
    match kind {
        0 => Some(None),
        4 => Some(Some(Ipv4Addr::from(*octets.first_chunk::<4>()?).into())),
        6 => Some(Some(Ipv6Addr::from(octets).into())),
        _ => None,
    }
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (first, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(first)
}

/// Filled up to `N` bytes, the last four being a checksum over the others.
fn sealed<const N: usize>(mut bytes: Vec<u8>) -> [u8; N] {
    bytes.resize(N.saturating_sub(4), 0);
    let [.., a, b, c, d] = xxh3_64(&bytes).to_be_bytes();
    bytes.extend([a, b, c, d]);
    bytes.try_into().unwrap_or([0; N])
}

fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let (rest, checksum) = bytes.split_last_chunk::<4>()?;
    let [.., a, b, c, d] = xxh3_64(rest).to_be_bytes();
    (*checksum == [a, b, c, d]).then_some(rest)
}

fn header(alive: UnixMillis) -> [u8; HEADER_BYTES] {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend(RECORD_BYTES_TOLD.to_be_bytes());
    bytes.extend(alive.get().to_be_bytes());
    sealed(bytes)
}

/// When the process that wrote this header was last alive.
fn alive(bytes: &[u8]) -> Option<UnixMillis> {
    let mut rest = unsealed(bytes)?;
    let known = take::<8>(&mut rest)? == MAGIC
        && u32::from_be_bytes(*take::<4>(&mut rest)?) == VERSION
        && u32::from_be_bytes(*take::<4>(&mut rest)?) == RECORD_BYTES_TOLD;
    known.then_some(UnixMillis::new(u64::from_be_bytes(*take::<8>(&mut rest)?))?)
}

/// Who was connected to the process that used `path` before, if it did not stop in order and was alive less than `within`
/// ago. Blocks.
///
/// # Errors
/// The file can't be read. One that is not there, or is damaged, says that nobody was.
pub fn left_behind(path: &Path, within: Duration, now: UnixMillis) -> io::Result<Vec<Gone>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take((HEADER_BYTES + RECORDS_MAX * RECORD_BYTES) as u64).read_to_end(&mut bytes)?;
    let Some((first, records)) = bytes.split_at_checked(HEADER_BYTES) else { return Ok(Vec::new()) };
    let Some(alive) = alive(first) else { return Ok(Vec::new()) };
    if u128::from(now.get().saturating_sub(alive.get())) > within.as_millis() {
        return Ok(Vec::new());
    }
    Ok(records.chunks_exact(RECORD_BYTES).filter_map(Gone::decode).collect())
}

/// A connection in the book.
#[derive(Debug)]
struct Entry {
    connection: quinn::Connection,
    id: ConnectionId,
    local: Option<IpAddr>,
    /// Where it is said to be in the file.
    noted: SocketAddr,
    /// Where it was at the last look.
    seen: SocketAddr,
}

#[derive(Debug, Default)]
struct Inner {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
    /// Places whose records in the file are no longer true.
    changed: Vec<usize>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Book {
    path: PathBuf,
    entries_max: usize,
    inner: Mutex<Inner>,
    wake: Notify,
}

/// A connection that is in the book until this is dropped.
#[derive(Debug)]
pub struct Noted {
    book: Arc<Book>,
    place: usize,
}

impl Drop for Noted {
    fn drop(&mut self) {
        let mut inner = self.book.lock();
        let entry = inner.entries.get_mut(self.place).and_then(Option::take);
        inner.free.push(self.place);
        inner.changed.push(self.place);
        drop(inner);
        drop(entry);
        self.book.wake.notify_one();
    }
}

impl Book {
    /// An empty book for as many connections, in a file at `path` that [`Self::keep`] makes.
    #[must_use]
    pub fn new(path: PathBuf, connections: usize) -> Self {
        Self { path, entries_max: connections.min(RECORDS_MAX), inner: Mutex::default(), wake: Notify::new() }
    }

    /// Notes a connection whose handshake is complete, and which was given `id`. `None`: the book is full.
    pub fn note(self: &Arc<Self>, connection: &quinn::Connection, id: ConnectionId) -> Option<Noted> {
        let remote = connection.remote_address();
        let entry = Entry {
            connection: connection.clone(),
            id,
            local: connection.local_ip(),
            noted: remote,
            seen: remote,
        };
        let mut inner = self.lock();
        let place = match inner.free.pop() {
            Some(place) => place,
            None if inner.entries.len() < self.entries_max => {
                inner.entries.push(None);
                inner.entries.len() - 1
            }
            None => return None,
        };
        *inner.entries.get_mut(place)? = Some(entry);
        inner.changed.push(place);
        drop(inner);
        self.wake.notify_one();
        Some(Noted { book: Arc::clone(self), place })
    }

    /// Begins the file anew, and keeps it up to date for ever. When it can't be written it says so once, and goes on
    /// trying.
    pub async fn keep(self: Arc<Self>) {
        let mut file: Option<Arc<File>> = None;
        let mut complained = false;
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let swept = tokio::select! {
                biased;
                () = self.wake.notified() => false,
                _ = sweep.tick() => true,
            };
            if swept {
                self.look_again();
            } else {
                tokio::time::sleep(GATHER_FOR).await;
            }
            let mut changes = self.take_changes(file.is_none());
            if swept || file.is_none() {
                changes.push((0, header(unix_now()).to_vec()));
            }
            let (known, path) = (file.take(), self.path.clone());
            let written = blocking(move || -> io::Result<Arc<File>> {
                let file = match known {
                    Some(file) => file,
                    None => {
                        let options = &mut OpenOptions::new();
                        Arc::new(options.write(true).create(true).truncate(true).mode(0o600).open(path)?)
                    }
                };
                for (at, bytes) in changes {
                    file.write_all_at(&bytes, at)?;
                }
                Ok(file)
            });
            let error = match written.await {
                Ok(Ok(written)) => {
                    file = Some(written);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if !std::mem::replace(&mut complained, true) {
                let path = self.path.display();
                warn!(%path, error, "who is connected can't be noted: after a kill, phones notice it later");
            }
            // The file is begun anew then, which is a lot to write.
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    }

    /// The stop is in order: everybody was told.
    ///
    /// # Errors
    /// The file can't be removed.
    pub fn discard(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Looks where connections are now.
    fn look_again(&self) {
        let mut inner = self.lock();
        let Inner { entries, changed, .. } = &mut *inner;
        for (place, entry) in entries.iter_mut().enumerate() {
            let Some(entry) = entry else { continue };
            let remote = entry.connection.remote_address();
            if remote == entry.seen && remote != entry.noted {
                entry.noted = remote;
                changed.push(place);
            }
            entry.seen = remote;
        }
    }

    /// Where in the file something is to be written, and what; everything, if the file is to be begun.
    fn take_changes(&self, all: bool) -> Vec<(u64, Vec<u8>)> {
        let mut inner = self.lock();
        let mut changed = std::mem::take(&mut inner.changed);
        if all {
            changed = (0..inner.entries.len()).collect();
        }
        changed.sort_unstable();
        changed.dedup();
        // Neighbours are written at once.
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
        for place in changed {
            let Some(entry) = inner.entries.get(place) else { continue };
            let record = entry.as_ref().map_or([0; RECORD_BYTES], |entry| {
                Gone { remote: entry.noted, local: entry.local, id: entry.id.to_vec() }.encode()
            });
            let at = (HEADER_BYTES + place * RECORD_BYTES) as u64;
            match writes.last_mut() {
                Some((begins, bytes)) if *begins + bytes.len() as u64 == at => bytes.extend(record),
                _ => writes.push((at, record.to_vec())),
            }
        }
        writes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Plain data whose invariants hold between any two statements.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(remote: &str, local: Option<&str>, id: &[u8]) -> Gone {
        let local = local.map(|local| local.parse().unwrap());
        Gone { remote: remote.parse().unwrap(), local, id: id.to_vec() }
    }

    fn at(millis: u64) -> UnixMillis {
        UnixMillis::new(millis).unwrap()
    }

    fn three() -> Vec<Gone> {
        vec![
            gone("192.0.2.7:4433", None, &[1; 8]),
            gone("[2001:db8::1]:1", Some("2001:db8::2"), &[2; 20]),
            gone("198.51.100.1:65535", Some("203.0.113.9"), &[3]),
        ]
    }

    #[test]
    fn what_is_noted_is_read_again_and_damage_only_loses_its_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("live");
        let minute = Duration::from_secs(60);
        assert_eq!(left_behind(&path, minute, at(9)).unwrap(), [], "nobody was here");
        let mut bytes = header(at(100_000)).to_vec();
        for gone in three() {
            bytes.extend(gone.encode());
        }
        bytes.splice(HEADER_BYTES + RECORD_BYTES..HEADER_BYTES + RECORD_BYTES, [0; RECORD_BYTES]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(left_behind(&path, minute, at(100_001)).unwrap(), three(), "a place may be empty");
        assert_eq!(left_behind(&path, minute, at(160_000)).unwrap(), three());
        assert_eq!(
            left_behind(&path, minute, at(160_001)).unwrap(),
            [],
            "their connections have ended by now"
        );
        assert_eq!(left_behind(&path, minute, at(1)).unwrap(), three(), "the clock was set back");
        for byte in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[byte] ^= 0x10;
            std::fs::write(&path, &damaged).unwrap();
            let read = left_behind(&path, minute, at(100_001)).unwrap();
            assert!(read.iter().all(|gone| three().contains(gone)), "byte {byte}: {read:?}");
            let in_header = byte < HEADER_BYTES;
            let in_empty = (HEADER_BYTES + RECORD_BYTES..HEADER_BYTES + 2 * RECORD_BYTES).contains(&byte);
            let want = if in_header {
                0
            } else if in_empty {
                3
            } else {
                2
            };
            assert_eq!(read.len(), want, "byte {byte}");
        }
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(left_behind(&path, minute, at(100_001)).unwrap().len() < 3, "cut at {len}");
        }
    }
}
