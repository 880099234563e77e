//! Which faults really bit: counted where they happen, never where they are planned.

use std::fmt;

macro_rules! bites {
    ($($(#[$doc:meta])* $name:ident => $word:literal,)*) => {
        /// A fault that happened to somebody.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Bite {
            $($(#[$doc])* $name,)*
        }

        impl Bite {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word in a report.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }
    };
}

bites! {
    /// A packet was lost by itself.
    Lost => "loss",
    /// A packet was lost on a link with bursts.
    LostInBurst => "bursty-loss",
    /// A packet arrived before one that was sent earlier on the same link.
    Overtaken => "reorder",
    /// A packet arrived twice.
    Doubled => "duplicate",
    /// A packet arrived with a bit turned over.
    Corrupted => "corruption",
    /// A packet found the queue of a bottleneck full.
    QueueFull => "queue-full",
    /// A packet was larger than the path takes.
    TooLarge => "mtu",
    /// A packet was sent in a spell of darkness of its network.
    DarkSpell => "dark-spell",
    /// A packet was sent in a blackout.
    Blackout => "blackout",
    /// A packet was sent into a cut direction.
    OneWayCut => "one-way-cut",
    /// A flow went on from another port because the NAT forgot it.
    NatRebound => "nat-rebinding",
    /// A flow was forgotten by the NAT because nothing was sent for too long.
    NatExpired => "nat-expiry",
    /// A packet left a phone through another network than the one before.
    AddressChanged => "address-change",
    /// A packet was sent from or to an address its phone no longer has.
    OldPath => "old-path",
    /// A packet was sent while its phone had no network.
    NoNetwork => "no-network",
    /// A UDP packet met a network that blocks UDP.
    UdpBlocked => "udp-blocked",
    /// A packet with data met a network that lets only handshakes through.
    DataBlocked => "data-blocked",
    /// A packet found the receiving socket full.
    SocketFull => "socket-full",
    /// A packet came for a port at which nobody listens.
    NobodyThere => "nobody-there",
    /// A phone with a running app was suspended.
    Frozen => "freeze",
    /// The wall clock of a phone was set.
    ClockJumped => "clock-jump",
    /// An app was killed while it ran.
    AppKilled => "app-kill",
    /// An app was closed and started again.
    AppRestarted => "app-restart",
    /// The gateway was killed while it served.
    GatewayCrashed => "gateway-crash",
    /// The gateway left in order, and was started again.
    GatewayDrained => "gateway-drain",
    /// A commit took long.
    SlowDisk => "slow-disk",
    /// A commit failed.
    FailingDisk => "failing-disk",
    /// The gateway was killed after a commit and before anybody was told.
    CrashedAfterCommit => "crash-after-commit",
    /// A session ended with its token, and its user was not let in again.
    LoggedOut => "log-out",
    /// A phone was told that records are gone by retention.
    Retained => "retention",
    /// A TCP segment was sent again.
    TcpResent => "tcp-resend",
}

/// How often each fault happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bites {
    counts: Vec<u64>,
}

impl Default for Bites {
    fn default() -> Self {
        Self { counts: vec![0; Bite::ALL.len()] }
    }
}

impl Bites {
    pub(crate) fn count(&mut self, bite: Bite) {
        if let Some(count) = self.counts.get_mut(bite as usize) {
            *count += 1;
        }
    }

    /// How often this one happened.
    #[must_use]
    pub fn of(&self, bite: Bite) -> u64 {
        self.counts.get(bite as usize).copied().unwrap_or(0)
    }

    /// Those that happened at all, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (Bite, u64)> + '_ {
        Bite::ALL.iter().map(|bite| (*bite, self.of(*bite))).filter(|(_, count)| *count > 0)
    }
}

impl fmt::Display for Bite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}
