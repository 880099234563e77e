//! Which protocol is spoken, and how two versions of it meet.
//!
//! The major version is the ALPN. The minor version is the lower of the two; feature bits are the AND of the two.

/// ALPN of the protocol (RFC 7301); the number is the major version.
pub const ALPN: &[u8] = b"fulmar/1";

/// Path of the HTTP request for a WebSocket, where neither UDP nor TLS with [`ALPN`] gets through.
pub const WEBSOCKET_PATH: &str = "/fulmar";

/// Subprotocol of that WebSocket (RFC 6455); the number is the major version.
pub const WEBSOCKET_PROTOCOL: &str = "fulmar.1";

/// The newest minor version this code speaks.
pub const MINOR: u8 = 0;

/// The minor version two ends speak: the lower of ours and `theirs`.
#[must_use]
pub fn minor_of(theirs: u8) -> u8 {
    [MINOR, theirs].into_iter().min().unwrap_or(MINOR)
}

/// Optional abilities, one bit each. Unknown bits are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// The peer understands EVENT in datagrams.
    pub const DATAGRAM_EVENTS: Self = Self(1);
    /// The peer understands copies of SEND, SEND_ACK and DELIVER in datagrams.
    pub const HEDGE: Self = Self(1 << 1);
    /// The peer wants RECEIPT frames.
    pub const RECEIPTS: Self = Self(1 << 2);
    /// The peer understands zstd BLOCKs.
    pub const ZSTD_BLOCKS: Self = Self(1 << 3);
    /// A client makes its own record from what it sent and the SEND_ACK that names it; it need not be delivered as well.
    pub const ACKS_ARE_ECHOES: Self = Self(1 << 4);
    /// Bits that mean nothing and are set at random, so that nobody comes to depend on their absence.
    pub const GREASE: Self = Self(0x3f << 56);

    /// What this code can do.
    pub const OURS: Self =
        Self(Self::DATAGRAM_EVENTS.0 | Self::HEDGE.0 | Self::RECEIPTS.0 | Self::ACKS_ARE_ECHOES.0);

    /// What both can do.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// `self` without what is in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of `other` is in `self`.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}
