//! Whether a connection attempt is let in: decided from counts, before any cryptography is done for it.
//!
//! - Nobody can hold more connections or handshakes than configured, in all or from one IP address.
//! - While many handshakes are in progress, an address must first prove that it is its own: a flood from forged
//!   addresses then costs a small answer each, and keeps no state.
//! - What is refused is told so, so that a phone goes elsewhere or backs off at once instead of waiting.
//!
//! Not here: sockets, and the counting itself (`endpoint`).

use crate::config::LimitsConfig;

/// What is going on when an attempt comes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Connections held.
    pub connections: usize,
    /// Connections held from the attempt's IP address.
    pub connections_of_address: usize,
    /// Handshakes in progress.
    pub handshakes: usize,
    /// Handshakes in progress from the attempt's IP address.
    pub handshakes_of_address: usize,
    /// The attempt's address has proven to be its own.
    pub validated: bool,
    /// The gateway is leaving.
    pub draining: bool,
}

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on with the handshake.
    Accept,
    /// Prove the address first (QUIC Retry).
    Retry,
    /// Tell it to go away.
    Refuse(Refused),
}

/// Why an attempt was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// The gateway is leaving.
    Draining,
    /// It holds as many connections as it may.
    Connections,
    /// The address holds as many connections as it may.
    ConnectionsOfAddress,
    /// As many handshakes as may be are in progress.
    Handshakes,
    /// As many handshakes of the address as may be are in progress.
    HandshakesOfAddress,
}

impl Refused {
    /// A word for metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Connections => "connections",
            Self::ConnectionsOfAddress => "connections_of_address",
            Self::Handshakes => "handshakes",
            Self::HandshakesOfAddress => "handshakes_of_address",
        }
    }
}

/// Decides about one attempt.
#[must_use]
pub fn admit(limits: &LimitsConfig, load: Load) -> Verdict {
    let full = [
        (load.draining, Refused::Draining),
        (load.connections >= limits.connections, Refused::Connections),
        (load.handshakes >= limits.handshakes, Refused::Handshakes),
    ];
    if let Some((_, why)) = full.into_iter().find(|(full, _)| *full) {
        return Verdict::Refuse(why);
    }
    if !load.validated && load.handshakes >= limits.handshakes_before_retry {
        return Verdict::Retry;
    }
    // A bound of one address: asked only of a proven one where possible, or a forged flood would shut out its owner.
    let address_full = [
        (load.connections_of_address >= limits.connections_per_address, Refused::ConnectionsOfAddress),
        (load.handshakes_of_address >= limits.handshakes_per_address, Refused::HandshakesOfAddress),
    ];
    match address_full.into_iter().find(|(full, _)| *full) {
        Some((_, why)) if load.validated => Verdict::Refuse(why),
        Some(_) => Verdict::Retry,
        None => Verdict::Accept,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_decided_by_counts() {
        let limits = LimitsConfig {
            connections: 100,
            connections_per_address: 10,
            handshakes: 20,
            handshakes_before_retry: 8,
            handshakes_per_address: 4,
            ..LimitsConfig::default()
        };
        let idle = Load::default();
        let proven = Load { validated: true, ..idle };
        for (load, want) in [
            (idle, Verdict::Accept),
            (Load { connections: 99, ..idle }, Verdict::Accept),
            (Load { connections: 100, ..idle }, Verdict::Refuse(Refused::Connections)),
            (Load { connections: 100, ..proven }, Verdict::Refuse(Refused::Connections)),
            (Load { handshakes: 7, ..idle }, Verdict::Accept),
            (Load { handshakes: 8, ..idle }, Verdict::Retry),
            (Load { handshakes: 8, ..proven }, Verdict::Accept),
            (Load { handshakes: 19, ..proven }, Verdict::Accept),
            (Load { handshakes: 20, ..proven }, Verdict::Refuse(Refused::Handshakes)),
            (Load { handshakes: 20, ..idle }, Verdict::Refuse(Refused::Handshakes)),
            (Load { connections_of_address: 9, ..proven }, Verdict::Accept),
            (Load { connections_of_address: 10, ..idle }, Verdict::Retry),
            (Load { connections_of_address: 10, ..proven }, Verdict::Refuse(Refused::ConnectionsOfAddress)),
            (Load { handshakes_of_address: 3, ..idle }, Verdict::Accept),
            (Load { handshakes_of_address: 4, ..idle }, Verdict::Retry),
            (Load { handshakes_of_address: 4, ..proven }, Verdict::Refuse(Refused::HandshakesOfAddress)),
            (Load { draining: true, ..proven }, Verdict::Refuse(Refused::Draining)),
            (Load { draining: true, connections: 100, ..idle }, Verdict::Refuse(Refused::Draining)),
        ] {
            assert_eq!(admit(&limits, load), want, "{load:?}");
        }
    }
}
