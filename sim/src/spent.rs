//! What a phone spent: what its radio and its processor were woken for, and what its connections cost.
//!
//! - The radio is a model of a cellular one ([`RADIO_TAIL`]): it goes to high power for a packet, either way, and stays there for the
//!   tail after the last one. What is counted is what the phone's own antenna knows of: packets it sends into a network, lost later
//!   or not, and packets that reach it.
//! - The processor is woken by whatever makes a task of the app's process run: packets, timers, and what the app asks for.
//! - Connections are counted by what the phone offers: a QUIC connection by the connection id in its first packets, a stream by
//!   being opened. Attempts that lose a race count too; they cost the same.
//!
//! Not here: the network (`network`), what people do all day (`bin/days`).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use fulmar_badnet::SimTime;

use crate::network::Traffic;

/// How long a cellular radio stays in high power after its last packet. Operators set the inactivity timer of LTE's RRC to
/// about ten seconds; Huang et al., "A Close Examination of Performance and Power Characteristics of 4G LTE Networks" (MobiSys 2012),
/// measured a tail of 11.6 s.
pub const RADIO_TAIL: Duration = Duration::from_secs(10);

/// A task that runs after at least so long a rest of its whole process is a wake-up; what follows sooner belongs to the same one.
pub const REST: Duration = Duration::from_millis(100);

/// Connections of a phone that are remembered, to know their later packets by.
const CONNECTIONS_MAX: usize = 256;

/// What a phone has spent since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Packets and bytes on its links.
    pub traffic: Traffic,
    /// Packets after a silence of at least [`RADIO_TAIL`]: a cellular radio in low power had to go up for each.
    pub radio_wakeups: u64,
    /// Time a cellular radio would have been in high power.
    pub radio_high: Duration,
    /// Times the app's process ran after a rest of at least [`REST`].
    pub cpu_wakeups: u64,
    /// Tasks of the app's process that were run.
    pub polls: u64,
    /// QUIC connections that were tried.
    pub quic: u64,
    /// Those of them that carried early data (0-RTT).
    pub early: u64,
    /// TCP connections that were tried.
    pub tcp: u64,
}

impl Spent {
    /// What was spent since `earlier`, which was taken from the same phone.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let (now, then) = (&self.traffic, &earlier.traffic);
        Self {
            traffic: Traffic {
                sent_packets: now.sent_packets.saturating_sub(then.sent_packets),
                sent_bytes: now.sent_bytes.saturating_sub(then.sent_bytes),
                received_packets: now.received_packets.saturating_sub(then.received_packets),
                received_bytes: now.received_bytes.saturating_sub(then.received_bytes),
            },
            radio_wakeups: self.radio_wakeups.saturating_sub(earlier.radio_wakeups),
            radio_high: self.radio_high.saturating_sub(earlier.radio_high),
            cpu_wakeups: self.cpu_wakeups.saturating_sub(earlier.cpu_wakeups),
            polls: self.polls.saturating_sub(earlier.polls),
            quic: self.quic.saturating_sub(earlier.quic),
            early: self.early.saturating_sub(earlier.early),
            tcp: self.tcp.saturating_sub(earlier.tcp),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            traffic: Traffic {
                sent_packets: self.traffic.sent_packets + other.traffic.sent_packets,
                sent_bytes: self.traffic.sent_bytes + other.traffic.sent_bytes,
                received_packets: self.traffic.received_packets + other.traffic.received_packets,
                received_bytes: self.traffic.received_bytes + other.traffic.received_bytes,
            },
            radio_wakeups: self.radio_wakeups + other.radio_wakeups,
            radio_high: self.radio_high + other.radio_high,
            cpu_wakeups: self.cpu_wakeups + other.cpu_wakeups,
            polls: self.polls + other.polls,
            quic: self.quic + other.quic,
            early: self.early + other.early,
            tcp: self.tcp + other.tcp,
        }
    }
}

/// A phone's antenna.
#[derive(Debug, Default)]
pub(crate) struct Antenna {
    /// When the last packet passed.
    last: Option<SimTime>,
    wakeups: u64,
    /// In high power before the present tail.
    high: Duration,
    connections: BTreeMap<Vec<u8>, bool>,
    order: VecDeque<Vec<u8>>,
    quic: u64,
    early: u64,
    tcp: u64,
}

impl Antenna {
    /// A packet passes, either way.
    pub(crate) fn packet(&mut self, now: SimTime) {
        match self.last {
            Some(last) => {
                let silence = now.since(last);
                self.high += silence.min(RADIO_TAIL);
                self.wakeups += u64::from(silence >= RADIO_TAIL);
            }
            None => self.wakeups += 1,
        }
        self.last = Some(now);
    }

    /// The phone begins to open a stream.
    pub(crate) fn stream(&mut self) {
        self.tcp += 1;
    }

    /// The phone sends a datagram.
    pub(crate) fn datagram(&mut self, bytes: &[u8]) {
        for (is_early, id) in long_headers(bytes) {
            match self.connections.get_mut(id) {
                Some(was_early) => {
                    if is_early && !std::mem::replace(was_early, true) {
                        self.early += 1;
                    }
                }
                None => {
                    if self.order.len() >= CONNECTIONS_MAX
                        && let Some(oldest) = self.order.pop_front()
                    {
                        self.connections.remove(&oldest);
                    }
                    self.connections.insert(id.to_vec(), is_early);
                    self.order.push_back(id.to_vec());
                    self.quic += 1;
                    self.early += u64::from(is_early);
                }
            }
        }
    }

    /// What it adds to what the phone spent.
    pub(crate) fn spent(&self, traffic: Traffic, now: SimTime) -> Spent {
        let tail = self.last.map_or(Duration::ZERO, |last| now.since(last).min(RADIO_TAIL));
        Spent {
            traffic,
            radio_wakeups: self.wakeups,
            radio_high: self.high + tail,
            quic: self.quic,
            early: self.early,
            tcp: self.tcp,
            ..Spent::default()
        }
    }
}

/// The Initial and 0-RTT packets in a datagram of QUIC version 1: whether it is 0-RTT, and the connection id its sender chose.
/// What comes behind anything else is not looked at.
fn long_headers(datagram: &[u8]) -> Vec<(bool, &[u8])> {
    let mut found = Vec::new();
    let mut rest = datagram;
    while let Some((early, id, next)) = long_header(rest) {
        found.push((early, id));
        rest = next;
    }
    found
}

fn long_header(packet: &[u8]) -> Option<(bool, &[u8], &[u8])> {
    let (first, rest) = packet.split_first()?;
    // The second bit is fixed, but who knows that the peer bears it turns it over (RFC 9287).
    let early = match first & 0xb0 {
        0x80 => false,
        0x90 => true,
        _ => return None,
    };
    let (version, rest) = rest.split_first_chunk::<4>()?;
    if *version != [0, 0, 0, 1] {
        return None;
    }
    let (_, rest) = connection_id(rest)?;
    let (id, rest) = connection_id(rest)?;
    let rest = match early {
        true => rest,
        false => {
            let (token, rest) = varint(rest)?;
            rest.get(token..)?
        }
    };
    let (len, rest) = varint(rest)?;
    Some((early, id, rest.get(len..)?))
}

fn connection_id(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*len))
}

fn varint(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let len = 1usize << (bytes.first()? >> 6);
    let (number, rest) = bytes.split_at_checked(len)?;
    let number = number.iter().fold(0u64, |number, byte| (number << 8) | u64::from(*byte));
    let number = number & (u64::MAX >> (66 - 8 * len.min(8)));
    Some((usize::try_from(number).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_radio_rests_after_its_tail() {
        let mut antenna = Antenna::default();
        let at = |seconds: u64| SimTime::from_millis(seconds * 1_000);
        for seconds in [0, 1, 5, 15, 100] {
            antenna.packet(at(seconds));
        }
        // Woken at 0, at 15 (ten seconds after 5) and at 100.
        for (now, high) in [(100, 25), (104, 29), (500, 35)] {
            let spent = antenna.spent(Traffic::default(), at(now));
            assert_eq!((spent.radio_wakeups, spent.radio_high.as_secs()), (3, high), "{now}");
        }
        let (early, late) =
            (antenna.spent(Traffic::default(), at(100)), antenna.spent(Traffic::default(), at(104)));
        assert_eq!(late.since(&early).radio_high, Duration::from_secs(4));
        assert_eq!(early.plus(&late.since(&early)), late);
    }

    /// A packet with a long header, from the connection `id`, with `len` bytes behind it.
    fn packet(first: u8, id: u8, len: u8) -> Vec<u8> {
        let mut bytes = vec![first, 0, 0, 0, 1, 2, 9, 9, 1, id];
        if first & 0x30 == 0 {
            bytes.push(0);
        }
        bytes.push(len);
        bytes.resize(bytes.len() + usize::from(len), 0);
        bytes
    }

    #[test]
    fn connections_are_known_by_their_first_packets() {
        let mut antenna = Antenna::default();
        let told = |antenna: &Antenna| (antenna.quic, antenna.early);
        antenna.datagram(&packet(0xc3, 1, 20));
        antenna.datagram(&packet(0xc3, 1, 20));
        assert_eq!(told(&antenna), (1, 0));
        // One datagram with both kinds.
        let mut both = packet(0xc1, 2, 20);
        both.extend(packet(0xd1, 2, 30));
        antenna.datagram(&both);
        antenna.datagram(&packet(0x90, 2, 5));
        assert_eq!(told(&antenna), (2, 1));
        // Handshake packets, short headers, other versions, and what is cut off.
        let mut other = packet(0xc0, 3, 9);
        other[4] = 2;
        let mut cut = packet(0xc0, 4, 9);
        cut.pop();
        for bytes in [&packet(0xe0, 5, 9)[..], &[0x40, 1, 2, 3], &other, &cut, &[]] {
            antenna.datagram(bytes);
        }
        assert_eq!(told(&antenna), (2, 1));
    }

    #[test]
    fn numbers_of_every_length_are_read() {
        for (bytes, want) in [
            (&[0x25][..], 37),
            (&[0x7b, 0xbd], 15_293),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c], 151_288_809_941_952_652),
        ] {
            assert_eq!(varint(bytes), Some((want, &[][..])));
        }
        assert_eq!(varint(&[0x40]), None);
    }
}
