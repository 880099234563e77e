//! What is known of the networks this device was on (pure; the time comes from outside).
//!
//! - A network is known by its kind and a hash of the name the operating system gives it; names are not kept.
//! - At most [`NETWORKS_MAX`] are kept; the one that was left alone longest is forgotten first.
//! - Nothing here is a promise: a blob that can't be read is a fresh start, and every value is bounded when read.
//! - Where UDP was found blocked it is not tried first for 20 minutes, and for 30 when it was still blocked then
//!   ([`Udp`]). Until it is known to work again it is tried beside TLS, which costs nobody time.
//!
//! Not here: the blob's place (`db`), races (`race`), intervals (`keepalive`).

use std::time::Duration;

use fulmar_protocol::frame::NetworkKind;
use serde::{Deserialize, Serialize};

use crate::{
    keepalive::Learned,
    race::{Memory, Transport, Udp, Verdict, Win},
};

/// Networks that are kept: home, work, cellular and a dozen of places in between.
pub(crate) const NETWORKS_MAX: usize = 16;

/// Bytes of a blob; more is not read.
pub(crate) const BLOB_BYTES_MAX: usize = 4096;

/// Wins that are kept of a network.
const WINS_MAX: usize = 4;

/// First byte of a blob.
const VERSION: u8 = 2;

/// How long UDP is not tried first: at first, and at the most.
const PENALTY_FIRST: Duration = Duration::from_secs(20 * 60);
const PENALTY_MAX: Duration = Duration::from_secs(30 * 60);

/// Round trips beyond this were no round trips.
const RTT_MAX: Duration = Duration::from_secs(10);

/// Bounds of the round trip a connection begins with: below, a busy phone answers too late; above, a lost first packet
/// is repeated too late.
const INITIAL_RTT: (Duration, Duration) = (Duration::from_millis(25), Duration::from_secs(1));

/// Which network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct NetworkKey {
    kind: NetworkKind,
    name: u64,
}

impl NetworkKey {
    /// The network of this kind with this name, as the operating system has it (SSID, operator, interface); all
    /// networks of a kind without a name are one.
    pub(crate) fn new(kind: NetworkKind, name: &str) -> Self {
        // FNV-1a: the same in every version of the app, which the hashes of the standard library are not.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { kind, name: if name.is_empty() { 0 } else { hash } }
    }
}

/// What is known of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Network {
    srtt_us: u32,
    rttvar_us: u32,
    keepalive: Learned,
    /// Who won races here, each once, the newest first.
    wins: Vec<Win>,
    /// UDP is not tried first before this time, seconds since 1970 by the device's clock.
    udp_until: u64,
    /// How often in a row UDP was found blocked; 0: it works, as far as is known.
    udp_blocked: u8,
    /// What a handshake over QUIC took here lately; 0: not known.
    handshake_us: u32,
}

impl Network {
    /// The last round trip measured here and its variation.
    pub(crate) fn rtt(&self) -> Option<(Duration, Duration)> {
        let micros = |us: u32| Duration::from_micros(us.into());
        (self.srtt_us > 0).then(|| (micros(self.srtt_us), micros(self.rttvar_us)))
    }

    /// A connection measured this. What can't be one is left out.
    pub(crate) fn measured(&mut self, srtt: Duration, rttvar: Duration) {
        if !srtt.is_zero() && srtt <= RTT_MAX {
            self.srtt_us = u32::try_from(srtt.as_micros()).unwrap_or(u32::MAX);
            self.rttvar_us = u32::try_from(rttvar.min(srtt).as_micros()).unwrap_or(u32::MAX);
        }
    }

    /// The round trip a new connection should assume; `None`: nothing is known.
    pub(crate) fn initial_rtt(&self) -> Option<Duration> {
        self.rtt().map(|(srtt, rttvar)| (srtt + rttvar).clamp(INITIAL_RTT.0, INITIAL_RTT.1))
    }

    /// What it taught about silences.
    pub(crate) const fn keepalive(&self) -> Learned {
        self.keepalive
    }

    /// What it taught about silences now.
    pub(crate) const fn learned(&mut self, keepalive: Learned) {
        self.keepalive = keepalive;
    }

    /// A race was won, with a handshake that took this long.
    pub(crate) fn won(&mut self, win: Win, handshake: Duration) {
        if win.transport == Transport::Quic {
            self.shook(handshake);
        }
        self.wins.retain(|known| *known != win);
        self.wins.insert(0, win);
        self.wins.truncate(WINS_MAX);
    }

    /// A handshake over QUIC took this long. Its packets are large, so that on a slow network it takes longer than a round trip. One
    /// that met a loss counts for a quarter.
    fn shook(&mut self, took: Duration) {
        let took = u32::try_from(took.min(RTT_MAX).as_micros()).unwrap_or(u32::MAX);
        let known = self.handshake_us;
        self.handshake_us = match known {
            0 => took,
            known if took < known => known.midpoint(took),
            known => known + (took - known) / 4,
        };
    }

    /// A race showed how UDP fares here. `now` is the time since 1970 by the device's clock.
    pub(crate) fn udp_was(&mut self, verdict: Verdict, now: Duration) {
        match verdict {
            Verdict::Works => (self.udp_until, self.udp_blocked) = (0, 0),
            Verdict::Blocked => {
                let penalty = PENALTY_FIRST.saturating_mul(1 << self.udp_blocked.min(1)).min(PENALTY_MAX);
                self.udp_blocked = self.udp_blocked.saturating_add(1);
                self.udp_until = now.saturating_add(penalty).as_secs();
            }
        }
    }

    /// How to treat UDP here. A clock that was set back does not make a penalty longer.
    pub(crate) fn udp(&self, now: Duration) -> Udp {
        let left = Duration::from_secs(self.udp_until).saturating_sub(now);
        match self.udp_blocked {
            0 => Udp::First,
            _ if left.is_zero() || left > PENALTY_MAX => Udp::Beside,
            _ => Udp::Later,
        }
    }

    /// When UDP is worth another try although the connection over TLS is fine; `None`: it is not known to be blocked.
    pub(crate) fn udp_probe_at(&self) -> Option<Duration> {
        (self.udp_blocked > 0).then(|| Duration::from_secs(self.udp_until))
    }

    /// What the next race should know.
    pub(crate) fn memory(&self, now: Duration) -> Memory {
        // The other one of RFC 6298's four variations is in the round trip.
        let spread = self.rtt().map_or(Duration::ZERO, |(_, rttvar)| 3 * rttvar);
        let handshake = Duration::from_micros(self.handshake_us.into());
        Memory { rtt: self.initial_rtt(), handshake, spread, udp: self.udp(now), wins: self.wins.clone() }
    }
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Networks {
    /// The one used last comes first.
    known: Vec<(NetworkKey, Network)>,
}

impl Networks {
    /// What a blob holds; nothing when it can't be read.
    pub(crate) fn from_blob(blob: &[u8]) -> Self {
        let Some((&VERSION, rest)) = blob.split_first() else { return Self::default() };
        if blob.len() > BLOB_BYTES_MAX {
            return Self::default();
        }
        let Ok(mut known) = postcard::from_bytes::<Vec<(NetworkKey, Network)>>(rest) else {
            return Self::default();
        };
        known.truncate(NETWORKS_MAX);
        for (_, network) in &mut known {
            network.wins.truncate(WINS_MAX);
            let (srtt, rttvar) = network.rtt().unwrap_or_default();
            (network.srtt_us, network.rttvar_us) = (0, 0);
            network.measured(srtt, rttvar);
            let handshake = Duration::from_micros(network.handshake_us.into());
            network.handshake_us = 0;
            network.shook(handshake);
        }
        Self { known }
    }

    /// All of it as bytes, at most [`BLOB_BYTES_MAX`].
    pub(crate) fn to_blob(&self) -> Vec<u8> {
        let rest = postcard::to_allocvec(&self.known).unwrap_or_default();
        let mut blob = Vec::with_capacity(1 + rest.len());
        blob.push(VERSION);
        blob.extend_from_slice(&rest);
        blob
    }

    /// What is known of a network; what is not known yet is empty.
    pub(crate) fn network(&self, key: NetworkKey) -> Network {
        let known = self.known.iter().find(|(known, _)| *known == key);
        known.map(|(_, network)| network.clone()).unwrap_or_default()
    }

    /// The device is on this network: what is known of it, to be changed; the oldest one makes room.
    pub(crate) fn on(&mut self, key: NetworkKey) -> &mut Network {
        match self.known.iter().position(|(known, _)| *known == key) {
            Some(0) => {}
            Some(at) => {
                let used = self.known.remove(at);
                self.known.insert(0, used);
            }
            None => {
                self.known.truncate(NETWORKS_MAX - 1);
                self.known.insert(0, (key, Network::default()));
            }
        }
        #[expect(clippy::indexing_slicing, reason = "it was just put there")]
        &mut self.known[0].1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIN: fn(u64) -> Duration = |minutes| Duration::from_secs(60 * minutes);
    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn key(name: &str) -> NetworkKey {
        NetworkKey::new(NetworkKind::Wifi, name)
    }

    fn win(transport: Transport, address: u8) -> Win {
        Win { transport, address }
    }

    #[test]
    fn keys_differ_by_kind_and_name() {
        let keys = [
            NetworkKey::new(NetworkKind::Wifi, "home"),
            NetworkKey::new(NetworkKind::Wifi, "work"),
            NetworkKey::new(NetworkKind::Cellular, "home"),
            NetworkKey::new(NetworkKind::Wifi, ""),
            NetworkKey::new(NetworkKind::Cellular, ""),
        ];
        for (at, a) in keys.iter().enumerate() {
            assert!(keys.iter().skip(at + 1).all(|b| a != b), "{a:?}");
        }
        // Kept on disk: the hash must stay what it is.
        assert_eq!(NetworkKey::new(NetworkKind::Wifi, "a").name, 0xaf63_dc4c_8601_ec8c);
        assert_eq!(NetworkKey::default(), NetworkKey::new(NetworkKind::Unknown, ""));
    }

    #[test]
    fn the_one_left_alone_longest_is_forgotten() {
        let mut networks = Networks::default();
        for n in 0..NETWORKS_MAX as u64 {
            networks.on(key(&n.to_string())).measured(MS(n + 1), MS(0));
        }
        networks.on(key("0"));
        networks.on(key("new"));
        assert_eq!(networks.known.len(), NETWORKS_MAX);
        assert_eq!(networks.network(key("0")).rtt(), Some((MS(1), MS(0))));
        assert_eq!(networks.network(key("1")).rtt(), None, "it made room");
        assert_eq!(networks.network(key("2")).rtt(), Some((MS(3), MS(0))));
    }

    #[test]
    fn udp_is_punished_for_twenty_then_thirty_minutes() {
        let mut network = Network::default();
        let start = MIN(1_000_000);
        assert_eq!((network.udp(start), network.udp_probe_at()), (Udp::First, None));
        let mut now = start;
        for minutes in [20, 30, 30, 30] {
            network.udp_was(Verdict::Blocked, now);
            assert_eq!(network.udp(now), Udp::Later);
            assert_eq!(network.udp(now + MIN(minutes) - MS(1_000)), Udp::Later, "{minutes}");
            now += MIN(minutes);
            assert_eq!(network.udp(now), Udp::Beside, "over, but not proven to work");
            assert_eq!(network.udp_probe_at(), Some(now));
        }
        network.udp_was(Verdict::Works, now);
        assert_eq!((network.udp(now), network.udp_probe_at()), (Udp::First, None));
        network.udp_was(Verdict::Blocked, now);
        assert_eq!(network.udp(now + MIN(20)), Udp::Beside, "it begins anew");
    }

    #[test]
    fn a_clock_that_jumps_does_not_punish_for_long() {
        let mut network = Network::default();
        network.udp_was(Verdict::Blocked, MIN(1_000_000));
        assert_eq!(network.udp(MIN(999_000)), Udp::Beside, "set back by a day");
        assert_eq!(network.udp(MIN(2_000_000)), Udp::Beside, "set forward");
        assert_eq!(network.udp(Duration::ZERO), Udp::Beside);
        network.udp_was(Verdict::Blocked, Duration::MAX);
        assert_eq!(network.udp(Duration::ZERO), Udp::Beside);
    }

    #[test]
    fn round_trips_seed_the_next_connection_within_bounds() {
        for (srtt, rttvar, want) in [
            (MS(100), MS(20), Some(MS(120))),
            (MS(3), MS(1), Some(MS(25))),
            (MS(900), MS(400), Some(MS(1_000))),
            (MS(100), MS(9_000), Some(MS(200))),
            (MS(0), MS(10), None),
            (MS(60_000), MS(10), None),
        ] {
            let mut network = Network::default();
            network.measured(srtt, rttvar);
            assert_eq!(network.initial_rtt(), want, "{srtt:?}, {rttvar:?}");
        }
    }

    #[test]
    fn wins_are_kept_once_each_the_newest_first() {
        let mut network = Network::default();
        for (transport, address) in [
            (Transport::Quic, 0),
            (Transport::Tls, 0),
            (Transport::Quic, 1),
            (Transport::Quic, 2),
            (Transport::Tls, 0),
            (Transport::Quic, 3),
        ] {
            network.won(win(transport, address), MS(100));
        }
        let want = [
            win(Transport::Quic, 3),
            win(Transport::Tls, 0),
            win(Transport::Quic, 2),
            win(Transport::Quic, 1),
        ];
        assert_eq!(network.memory(MIN(1)).wins, want);
    }

    #[test]
    fn what_a_handshake_takes_is_learned() {
        let mut network = Network::default();
        let mut known = Vec::new();
        for took in [800, 800, 1_600, 400, 400_000] {
            network.shook(MS(took));
            known.push(network.memory(MIN(1)).handshake.as_millis());
        }
        let most = (700 * 3 + RTT_MAX.as_millis()) / 4;
        assert_eq!(known, [800, 800, 1_000, 700, most], "a loss counts for little");
    }

    #[test]
    fn the_blob_is_what_it_was() {
        let mut networks = Networks::default();
        let network = networks.on(NetworkKey { kind: NetworkKind::Cellular, name: 5 });
        network.measured(MS(100), MS(10));
        network.learned(Learned { good_ms: 300, bad_ms: 0 });
        network.won(win(Transport::WebSocket, 1), MS(90));
        network.udp_was(Verdict::Blocked, Duration::from_secs(100));
        network.shook(MS(10));
        let blob = networks.to_blob();
        // version | 1 network | cellular 5 | srtt 100 000 us | rttvar 10 000 us | good 300, bad 0 | 1 win: WebSocket, 1 |
        // until 1 300 s | blocked once | handshake 10 000 us
        let want = [2, 1, 2, 5, 0xa0, 0x8d, 6, 0x90, 0x4e, 0xac, 2, 0, 1, 2, 1, 0x94, 0x0a, 1, 0x90, 0x4e];
        assert_eq!(blob, want);
        assert_eq!(Networks::from_blob(&blob), networks);
        assert_eq!(networks.on(NetworkKey { kind: NetworkKind::Cellular, name: 5 }).keepalive().good_ms, 300);
    }

    #[test]
    fn a_blob_that_can_not_be_read_is_a_fresh_start() {
        let mut networks = Networks::default();
        networks.on(key("home")).measured(MS(5), MS(5));
        let good = networks.to_blob();
        for len in 0..good.len() {
            assert_eq!(Networks::from_blob(&good[..len]), Networks::default(), "{len} bytes");
        }
        let mut newer = good.clone();
        newer[0] = VERSION + 1;
        assert_eq!(Networks::from_blob(&newer), Networks::default());
        let mut long = good;
        long.resize(BLOB_BYTES_MAX + 1, 0);
        assert_eq!(Networks::from_blob(&long), Networks::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_within_bounds(mut blob in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(first) = blob.first_mut() {
                *first = VERSION;
            }
            let networks = Networks::from_blob(&blob);
            prop_assert!(networks.known.len() <= NETWORKS_MAX);
            for (_, network) in &networks.known {
                prop_assert!(network.wins.len() <= WINS_MAX);
                prop_assert!(network.rtt().is_none_or(|(srtt, rttvar)| srtt <= RTT_MAX && rttvar <= srtt));
            }
            prop_assert_eq!(Networks::from_blob(&networks.to_blob()), networks);
        }

        #[test]
        fn whatever_was_learned_comes_back_and_fits(
            visits in prop::collection::vec((0..40u8, any::<u32>(), any::<u32>(), any::<u64>(), 0..8u8), 0..100)
        ) {
            let mut networks = Networks::default();
            for (name, rtt, learned, now, address) in visits {
                let network = networks.on(key(&name.to_string()));
                network.measured(Duration::from_micros(rtt.into()), Duration::from_micros(learned.into()));
                network.learned(Learned { good_ms: learned, bad_ms: rtt });
                network.won(win(Transport::Tls, address), MS(90));
                network.udp_was(Verdict::Blocked, Duration::from_secs(now));
            }
            let blob = networks.to_blob();
            prop_assert!(blob.len() <= BLOB_BYTES_MAX, "{}", blob.len());
            prop_assert_eq!(Networks::from_blob(&blob), networks);
        }
    }
}
