//! The newest records of one conversation as encoded DELIVER frames.
//!
//! - Seqs are contiguous: the ring is `first ..= last`.
//! - Bounded by records and by bytes; the oldest leave first.
//! - A frame's short time is only right for a few days ([`WireTime::SHORT_AGE_MS_MAX`]): older entries are not served.
//!
//! Not here: who is owed what (`owed`).

use std::{
    collections::VecDeque,
    ops::RangeInclusive,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use fulmar_protocol::{
    frame::WireTime,
    id::{Seq, UnixMillis, UserId},
};

/// Bounds of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLimits {
    /// Records kept.
    pub records: usize,
    /// Bytes of frames kept.
    pub bytes: usize,
}

/// One committed record, ready to be written to any number of connections.
#[derive(Clone, Debug)]
pub struct RingEntry {
    /// Its position.
    pub seq: Seq,
    /// Who sent it.
    pub sender: UserId,
    /// When it was stored.
    pub time: UnixMillis,
    /// The frame for everybody but the sender's own devices.
    pub frame: Bytes,
    /// The frame with the origin, for the sender's own devices; `None` when `frame` has it, or there is none.
    pub own_frame: Option<Bytes>,
}

impl RingEntry {
    /// The frame for a device of `user`.
    #[must_use]
    pub fn frame_for(&self, user: UserId) -> &Bytes {
        match &self.own_frame {
            Some(own) if user == self.sender => own,
            _ => &self.frame,
        }
    }

    fn bytes(&self) -> usize {
        self.frame.len() + self.own_frame.as_ref().map_or(0, Bytes::len)
    }
}

/// What a ring has for a reader that wants everything from a seq on.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// The frames, and the seq after the last of them. Empty: the reader has everything.
    Frames {
        /// Frames in order.
        frames: Vec<Bytes>,
        /// What the reader wants next.
        next: Seq,
        /// The budget ended before the ring did.
        more: bool,
    },
    /// What it wants is no longer here: read the log.
    Behind,
}

/// See the module's text. Shared by the shard that pushes and the connections that read.
#[derive(Debug)]
pub struct Ring {
    inner: Mutex<Inner>,
    limits: RingLimits,
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<RingEntry>,
    bytes: usize,
}

impl Ring {
    /// An empty ring.
    #[must_use]
    pub fn new(limits: RingLimits) -> Self {
        Self { inner: Mutex::new(Inner::default()), limits }
    }

    /// Adds the next record. One that does not follow the last (after a reload) empties the ring first, so that what
    /// is in it is always contiguous.
    pub fn push(&self, entry: RingEntry) {
        let mut inner = self.lock();
        if inner.entries.back().is_some_and(|last| last.seq.next() != Some(entry.seq)) {
            inner.entries.clear();
            inner.bytes = 0;
        }
        inner.bytes += entry.bytes();
        inner.entries.push_back(entry);
        while inner.entries.len() > self.limits.records.max(1)
            || (inner.bytes > self.limits.bytes && inner.entries.len() > 1)
        {
            if let Some(old) = inner.entries.pop_front() {
                inner.bytes -= old.bytes();
            }
        }
    }

    /// The frames of `owed` for a device of `user`, up to `budget` bytes (at least one frame). What is in the ring beyond its
    /// end is not for this reader, or not yet.
    #[must_use]
    pub fn due(&self, owed: RangeInclusive<Seq>, user: UserId, budget: usize, now: UnixMillis) -> Due {
        let (next, up_to) = owed.into_inner();
        let inner = self.lock();
        let (Some(first), Some(last)) = (inner.entries.front(), inner.entries.back()) else {
            return Due::Behind;
        };
        if next > last.seq.min(up_to) {
            return Due::Frames { frames: Vec::new(), next, more: false };
        }
        if next < first.seq {
            return Due::Behind;
        }
        let skip = usize::try_from(next.since(first.seq)).unwrap_or(usize::MAX);
        let mut frames = Vec::new();
        let mut bytes = 0;
        let mut at = next;
        for entry in inner.entries.iter().skip(skip).take_while(|entry| entry.seq <= up_to) {
            if now.get().saturating_sub(entry.time.get()) > WireTime::SHORT_AGE_MS_MAX {
                return if frames.is_empty() {
                    Due::Behind
                } else {
                    Due::Frames { frames, next: at, more: true }
                };
            }
            let frame = entry.frame_for(user);
            if !frames.is_empty() && bytes + frame.len() > budget {
                return Due::Frames { frames, next: at, more: true };
            }
            bytes += frame.len();
            frames.push(frame.clone());
            at = entry.seq.saturating_add(1);
        }
        Due::Frames { frames, next: at, more: false }
    }

    /// Whether a reader that wants `next` can be served from here: it is in the ring, or is the one after its last.
    #[must_use]
    pub fn serves(&self, next: Seq) -> bool {
        let inner = self.lock();
        match (inner.entries.front(), inner.entries.back()) {
            (Some(first), Some(last)) => next >= first.seq && next <= last.seq.saturating_add(1),
            _ => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while the lock was held leaves plain data that is checked for contiguity on every push.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn user(n: u64) -> UserId {
        UserId::new(n).unwrap()
    }

    fn entry(n: u64, sender: u64) -> RingEntry {
        RingEntry {
            seq: seq(n),
            sender: user(sender),
            time: UnixMillis::new(1_000).unwrap(),
            frame: Bytes::from(vec![u8::try_from(n).unwrap(); 10]),
            own_frame: Some(Bytes::from(vec![0xff; 12])),
        }
    }

    const NOW: u64 = 2_000;

    fn due(ring: &Ring, next: u64, reader: u64, budget: usize) -> Due {
        ring.due(seq(next)..=seq(1_000), user(reader), budget, UnixMillis::new(NOW).unwrap())
    }

    #[test]
    fn readers_get_what_is_there_and_learn_what_is_not() {
        let ring = Ring::new(RingLimits { records: 4, bytes: 1_000 });
        assert_eq!(due(&ring, 1, 9, 100), Due::Behind, "an empty ring knows nothing");
        for n in 1..=6 {
            ring.push(entry(n, 1));
        }
        assert_eq!(due(&ring, 2, 9, 1_000), Due::Behind, "2 has left");
        let Due::Frames { frames, next, more } = due(&ring, 3, 9, 1_000) else { panic!("3 is there") };
        assert_eq!((frames.len(), next, more), (4, seq(7), false));
        assert_eq!(frames[0], entry(3, 1).frame);
        assert_eq!(due(&ring, 7, 9, 10), Due::Frames { frames: vec![], next: seq(7), more: false });
        let Due::Frames { frames, next, more } = due(&ring, 3, 9, 25) else { panic!("3 is there") };
        assert_eq!((frames.len(), next, more), (2, seq(5), true), "the budget ends the turn");
        let Due::Frames { frames, .. } = due(&ring, 6, 1, 1) else { panic!("6 is there") };
        assert_eq!(
            frames,
            vec![entry(6, 1).own_frame.unwrap()],
            "the sender gets its origin, one frame at least"
        );
        assert!(ring.serves(seq(7)) && ring.serves(seq(3)) && !ring.serves(seq(2)) && !ring.serves(seq(8)));
    }

    #[test]
    fn nobody_is_served_beyond_what_it_is_owed() {
        let ring = Ring::new(RingLimits { records: 8, bytes: 1_000 });
        for n in 1..=6 {
            ring.push(entry(n, 1));
        }
        let now = UnixMillis::new(NOW).unwrap();
        let due = |from, to, budget| ring.due(seq(from)..=seq(to), user(9), budget, now);
        let Due::Frames { frames, next, more } = due(3, 4, 1_000) else { panic!("3 is there") };
        assert_eq!((frames.len(), next, more), (2, seq(5), false));
        assert_eq!(due(5, 4, 1_000), Due::Frames { frames: vec![], next: seq(5), more: false });
        let Due::Frames { frames, next, more } = due(3, 5, 25) else { panic!("3 is there") };
        assert_eq!((frames.len(), next, more), (2, seq(5), true));
    }

    #[test]
    fn bytes_are_bounded_and_a_hole_empties_the_ring() {
        let ring = Ring::new(RingLimits { records: 100, bytes: 50 });
        for n in 1..=10 {
            ring.push(entry(n, 1));
        }
        assert_eq!(due(&ring, 8, 9, 1_000), Due::Behind);
        assert!(matches!(due(&ring, 9, 9, 1_000), Due::Frames { .. }));
        ring.push(entry(20, 1));
        assert_eq!(
            due(&ring, 10, 9, 1_000),
            Due::Behind,
            "11 to 19 are missing, so 10 can't be served from here"
        );
        assert!(ring.serves(seq(20)));
    }

    #[test]
    fn short_times_are_not_served_when_they_would_be_read_wrongly() {
        let ring = Ring::new(RingLimits { records: 4, bytes: 1_000 });
        ring.push(entry(1, 1));
        let late = UnixMillis::new(1_001 + WireTime::SHORT_AGE_MS_MAX).unwrap();
        assert_eq!(ring.due(seq(1)..=seq(1), user(9), 100, late), Due::Behind);
    }
}
