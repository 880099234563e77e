//! Which core a packet belongs to, so that a client whose address changes keeps reaching the core that has its connection.
//!
//! ```text
//! long header    flags 1 | version 4 | length of the id 1 | id ..
//! short header   flags 1 | id ..
//! core           the first two bytes of the id, as a big-endian number, modulo the number of cores
//! ```
//!
//! - The same rule holds for ids of ours and for the random one a client begins with: its whole first flight, what it
//!   repeats of it, and its early data meet at one core, which answers with an id of its own.
//! - The system carries the rule out ([`super::sockets`]); a core only makes ids that lead to it (`CoreIds`), and answers
//!   no packet that belongs to another one. So a packet that strays is lost and sent again, and never ends a connection.
//! - A process with another number of cores spreads old ids in its own way, and each of its cores knows which are its own:
//!   after a restart every old connection is answered with a reset, once.
//! - An observer of two ids can tell that they may be of one core. There are few cores and many connections.
//!
//! Not here: sockets, threads.

use std::{num::NonZeroU16, time::Duration};

use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn_proto::{HashedConnectionIdGenerator, InvalidCid};

/// The bit of the first byte that says which of the two headers a packet has.
pub(super) const LONG_HEADER: u8 = 0x80;

/// Where the id begins in a long header.
pub(super) const ID_IN_LONG: u8 = 6;

/// Where the id begins in a short header.
pub(super) const ID_IN_SHORT: u8 = 1;

/// One core of those that share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core {
    number: u16,
    of: NonZeroU16,
}

impl Core {
    /// The only one.
    pub const ALONE: Self = Self { number: 0, of: NonZeroU16::MIN };

    /// All of `cores`; [`Self::ALONE`] for none or one.
    pub fn all(cores: u16) -> impl Iterator<Item = Self> {
        let of = NonZeroU16::new(cores).unwrap_or(NonZeroU16::MIN);
        (0..of.get()).map(move |number| Self { number, of })
    }

    /// Its number, from 0.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.number
    }

    /// How many there are.
    #[must_use]
    pub const fn of(self) -> u16 {
        self.of.get()
    }

    fn owns(self, id: &[u8]) -> bool {
        core_of_id(id, self.of) == Some(self.number)
    }
}

fn core_of_id(id: &[u8], cores: NonZeroU16) -> Option<u16> {
    id.first_chunk::<2>().map(|spread| u16::from_be_bytes(*spread) % cores)
}

/// The core a UDP payload belongs to; the first one for what is too short for an id. What the system is told to do
/// ([`super::sockets`]) must come to the same.
#[must_use]
pub fn core_of_packet(payload: &[u8], cores: NonZeroU16) -> u16 {
    let id_at = match payload.first() {
        Some(flags) if flags & LONG_HEADER != 0 => ID_IN_LONG,
        _ => ID_IN_SHORT,
    };
    payload.get(usize::from(id_at)..).and_then(|id| core_of_id(id, cores)).unwrap_or(0)
}

/// quinn's own ids, which are recognised as ours after a restart; of those, the ones that lead to one core.
pub(super) struct CoreIds {
    ids: HashedConnectionIdGenerator,
    core: Core,
}

impl CoreIds {
    pub(super) fn new(key: u64, core: Core) -> Self {
        Self { ids: HashedConnectionIdGenerator::from_key(key), core }
    }
}

impl ConnectionIdGenerator for CoreIds {
    fn generate_cid(&mut self) -> ConnectionId {
        // Their first bytes are random: as many tries as there are cores, on average.
        loop {
            let id = self.ids.generate_cid();
            if self.core.owns(&id) {
                return id;
            }
        }
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        if self.core.owns(id) { self.ids.validate(id) } else { Err(InvalidCid) }
    }

    fn cid_len(&self) -> usize {
        self.ids.cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.ids.cid_lifetime()
    }
}

/// UDP payloads, and the core of five each belongs to.
#[cfg(test)]
pub(super) const PACKETS_OF_FIVE_CORES: &[(&str, &[u8], u16)] = &[
    ("nothing", &[], 0),
    ("one byte", &[0x40], 0),
    ("half of what is looked at", &[0x40, 7], 0),
    ("short header", &[0x40, 0, 7, 0xff, 0xff], 2),
    ("short header, key phase 1", &[0x44, 1, 0, 0, 0, 0, 0, 0, 0, 9], 1),
    ("short header, no fixed bit", &[0x00, 0, 9, 0, 0, 0, 0, 0, 0, 9], 4),
    ("short header, largest", &[0x7f, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 9], 0),
    ("initial", &[0xc3, 0, 0, 0, 1, 8, 0, 3, 0, 0, 0, 0, 0, 0, 0], 3),
    ("initial, longest id", &[0xc0, 0, 0, 0, 1, 20, 0xff, 0xfe, 1, 2, 3, 4, 5, 6, 7, 8, 9], 4),
    ("early data", &[0xd0, 0, 0, 0, 1, 8, 0, 3, 9, 9, 9, 9, 9, 9, 0], 3),
    ("handshake", &[0xe0, 0, 0, 0, 1, 8, 1, 3, 0, 0, 0, 0, 0, 0, 0], 4),
    ("another version", &[0xff, 9, 9, 9, 9, 8, 0, 6, 0, 0, 0, 0, 0, 0, 0], 1),
    ("long header, cut before the id", &[0xc3, 0, 0, 0, 1, 8], 0),
    ("long header, cut in the id", &[0xc3, 0, 0, 0, 1, 8, 3], 0),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_packet_belongs_to_the_core_its_id_says() {
        let five = NonZeroU16::new(5).unwrap();
        for (what, payload, core) in PACKETS_OF_FIVE_CORES {
            assert_eq!(core_of_packet(payload, five), *core, "{what}");
            assert_eq!(core_of_packet(payload, NonZeroU16::MIN), 0, "{what}, one core");
        }
    }

    fn packets_to(id: &[u8]) -> [Vec<u8>; 2] {
        let length = u8::try_from(id.len()).unwrap();
        [[&[0x40], id, &[9; 30]].concat(), [&[0xe0, 0, 0, 0, 1, length], id, &[9; 30]].concat()]
    }

    #[test]
    fn ids_lead_to_the_core_that_made_them() {
        for cores in [1, 2, 3, 16, 64] {
            let mut seen = HashSet::new();
            for core in Core::all(cores) {
                let mut ids = CoreIds::new(7, core);
                for _ in 0..50 {
                    let id = ids.generate_cid();
                    assert_eq!(id.len(), ids.cid_len());
                    for packet in packets_to(&id) {
                        assert_eq!(core_of_packet(&packet, core.of), core.number());
                    }
                    seen.insert(id);
                }
            }
            assert!(seen.len() > usize::from(cores) * 45, "they differ");
        }
    }

    #[test]
    fn after_a_restart_with_other_cores_one_of_them_knows_each_id() {
        for (before, after) in [(1, 4), (4, 1), (2, 3), (8, 5), (2, 64)] {
            for made_by in Core::all(before) {
                let mut made = CoreIds::new(7, made_by);
                for _ in 0..20 {
                    let id = made.generate_cid();
                    let knowing = |key| {
                        Core::all(after)
                            .filter(move |core| CoreIds::new(key, *core).validate(&id).is_ok())
                            .map(Core::number)
                            .collect::<Vec<_>>()
                    };
                    let of = NonZeroU16::new(after).unwrap();
                    let reached = packets_to(&id).map(|packet| core_of_packet(&packet, of));
                    assert_eq!(knowing(7), [reached[0]], "the one that gets its packets");
                    assert_eq!(reached[0], reached[1]);
                    assert!(knowing(8).is_empty(), "not ours");
                }
            }
        }
    }
}
