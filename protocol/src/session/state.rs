//! The states of both halves, and every transition there is.
//!
//! ```text
//! gateway   Opening ──HELLO──▶ Authenticating ──welcome──▶ Active ──drain──▶ Draining
//!              │                     │                       │                  │
//!              └──── timeout, violation, rejected, kicked, connection lost ─────┴──▶ Closed
//!
//! client    Offline ──connect──▶ Opening ──WELCOME──▶ Live ──GOAWAY──▶ Draining
//!              ▲                    │                  │                  │
//!              │                    └── timeout, violation, refused, KICKED, new epoch ──▶ Closing
//!              └──────────────────────────── connection lost (from everywhere) ─────────────┘
//! ```
//!
//! - Frames of the uplink may come before the HELLO: streams are not ordered among each other. They are held.
//! - Records may reach a client before the WELCOME, for the same reason. They are taken.
//! - A draining gateway goes on: what is in flight is answered, and the client leaves when its next connection is open.
//!
//! Not here: what is done in a transition (`gateway`, `client`).

/// States of the gateway's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GatewayState {
    /// No HELLO yet.
    Opening,
    /// The driver is looking at the HELLO; frames are held.
    Authenticating,
    /// Welcomed.
    Active,
    /// A GOAWAY was sent.
    Draining,
    /// Over; frames are ignored.
    Closed,
}

/// What happens to the gateway's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GatewayInput {
    /// A HELLO.
    Hello,
    /// Any other frame on the control stream.
    Control,
    /// A frame on the uplink.
    Uplink,
    /// A frame in a datagram.
    Datagram,
    /// The driver accepts the HELLO.
    Welcome,
    /// The driver refuses a HELLO or AUTH.
    Reject,
    /// The gateway is leaving.
    Drain,
    /// The device is logged out.
    Kick,
    /// A violation, a timeout, or the connection is gone.
    Close,
}

/// What to do with an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step<S> {
    /// Go to this state (it may be the same) and carry the input out.
    To(S),
    /// Stay; keep the frame until the state changes.
    Hold,
    /// Stay; the input means nothing here.
    Ignore,
    /// The peer broke the rules: close.
    Violation,
}

impl GatewayState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Opening, Self::Authenticating, Self::Active, Self::Draining, Self::Closed];

    /// Its name in logs and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "waiting for HELLO",
            Self::Authenticating => "authenticating",
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Closed => "closed",
        }
    }

    /// The transition table.
    #[must_use]
    pub const fn on(self, input: GatewayInput) -> Step<Self> {
        use GatewayInput as I;
        match (self, input) {
            (Self::Closed, _) => Step::Ignore,
            (_, I::Close | I::Kick | I::Reject) => Step::To(Self::Closed),
            (Self::Opening, I::Hello) => Step::To(Self::Authenticating),
            (_, I::Hello) | (Self::Opening, I::Control) => Step::Violation,
            (Self::Opening, I::Uplink) | (Self::Authenticating, I::Control | I::Uplink) => Step::Hold,
            (Self::Opening | Self::Authenticating, I::Datagram | I::Drain) | (Self::Opening, I::Welcome) => {
                Step::Ignore
            }
            (Self::Authenticating, I::Welcome) => Step::To(Self::Active),
            (Self::Active | Self::Draining, I::Control | I::Uplink | I::Datagram) => Step::To(self),
            (Self::Active, I::Drain) => Step::To(Self::Draining),
            (Self::Active | Self::Draining, I::Welcome) | (Self::Draining, I::Drain) => Step::Ignore,
        }
    }
}

/// States of the client's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClientState {
    /// No connection.
    Offline,
    /// HELLO sent, no WELCOME yet.
    Opening,
    /// Welcomed.
    Live,
    /// The gateway is leaving; goes on until the driver has another connection.
    Draining,
    /// This connection is over and the driver was told to close it; frames are ignored.
    Closing,
}

/// What happens to the client's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClientInput {
    /// The driver has a connection.
    Connect,
    /// The connection is gone.
    Disconnected,
    /// A WELCOME under our epoch, or the first epoch of all.
    Welcome,
    /// A WELCOME under another epoch than ours.
    NewEpoch,
    /// DELIVER, BLOCK, EVENT and PING: they make sense before the WELCOME too, other channels may be faster.
    Record,
    /// An ERROR that refers to the HELLO or AUTH.
    Refused,
    /// Any other frame of the control stream.
    Control,
    /// GOAWAY.
    Goaway,
    /// KICKED.
    Kicked,
    /// A violation or a timeout.
    Close,
}

impl ClientState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Offline, Self::Opening, Self::Live, Self::Draining, Self::Closing];

    /// Its name in logs and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Opening => "waiting for WELCOME",
            Self::Live => "live",
            Self::Draining => "draining",
            Self::Closing => "closing",
        }
    }

    /// Whether the gateway has welcomed this connection and it is not over.
    #[must_use]
    pub const fn is_welcomed(self) -> bool {
        matches!(self, Self::Live | Self::Draining)
    }

    /// The transition table.
    #[must_use]
    pub const fn on(self, input: ClientInput) -> Step<Self> {
        use ClientInput as I;
        match (self, input) {
            (_, I::Connect) => Step::To(Self::Opening),
            (_, I::Disconnected) => Step::To(Self::Offline),
            (Self::Offline | Self::Closing, _) => Step::Ignore,
            (_, I::Close | I::Kicked | I::Refused) => Step::To(Self::Closing),
            (_, I::Record) => Step::To(self),
            (Self::Opening, I::Welcome) => Step::To(Self::Live),
            (Self::Opening, I::NewEpoch) => Step::To(Self::Closing),
            (Self::Opening, I::Goaway | I::Control) => Step::Violation,
            (Self::Live | Self::Draining, I::Welcome | I::NewEpoch) => Step::Violation,
            (Self::Live | Self::Draining, I::Control) => Step::To(self),
            (Self::Live | Self::Draining, I::Goaway) => Step::To(Self::Draining),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_transitions() {
        use GatewayInput::*;
        use GatewayState::*;
        use Step::{Hold, Ignore, To};
        const NO: Step<GatewayState> = Step::Violation;
        let inputs = [Hello, Control, Uplink, Datagram, Welcome, Reject, Drain, Kick, Close];
        #[rustfmt::skip]
        let table = [
            //                Hello               Control       Uplink        Datagram      Welcome     Reject      Drain         Kick        Close
            (Opening,        [To(Authenticating), NO,           Hold,         Ignore,       Ignore,     To(Closed), Ignore,       To(Closed), To(Closed)]),
            (Authenticating, [NO,                 Hold,         Hold,         Ignore,       To(Active), To(Closed), Ignore,       To(Closed), To(Closed)]),
            (Active,         [NO,                 To(Active),   To(Active),   To(Active),   Ignore,     To(Closed), To(Draining), To(Closed), To(Closed)]),
            (Draining,       [NO,                 To(Draining), To(Draining), To(Draining), Ignore,     To(Closed), Ignore,       To(Closed), To(Closed)]),
            (Closed,         [Ignore,             Ignore,       Ignore,       Ignore,       Ignore,     Ignore,     Ignore,       Ignore,     Ignore]),
        ];
        assert_eq!(table.map(|(state, _)| state), GatewayState::ALL);
        for (state, row) in table {
            for (input, want) in inputs.into_iter().zip(row) {
                assert_eq!(state.on(input), want, "{state:?} on {input:?}");
            }
        }
    }

    #[test]
    fn client_transitions() {
        use ClientInput::*;
        use ClientState::*;
        use Step::{Ignore, To};
        const NO: Step<ClientState> = Step::Violation;
        let inputs =
            [Connect, Disconnected, Welcome, NewEpoch, Record, Refused, Control, Goaway, Kicked, Close];
        #[rustfmt::skip]
        let table = [
            //          Connect      Disconnected Welcome   NewEpoch     Record        Refused      Control       Goaway        Kicked       Close
            (Offline,  [To(Opening), To(Offline), Ignore,   Ignore,      Ignore,       Ignore,      Ignore,       Ignore,       Ignore,      Ignore]),
            (Opening,  [To(Opening), To(Offline), To(Live), To(Closing), To(Opening),  To(Closing), NO,           NO,           To(Closing), To(Closing)]),
            (Live,     [To(Opening), To(Offline), NO,       NO,          To(Live),     To(Closing), To(Live),     To(Draining), To(Closing), To(Closing)]),
            (Draining, [To(Opening), To(Offline), NO,       NO,          To(Draining), To(Closing), To(Draining), To(Draining), To(Closing), To(Closing)]),
            (Closing,  [To(Opening), To(Offline), Ignore,   Ignore,      Ignore,       Ignore,      Ignore,       Ignore,       Ignore,      Ignore]),
        ];
        assert_eq!(table.map(|(state, _)| state), ClientState::ALL);
        for (state, row) in table {
            for (input, want) in inputs.into_iter().zip(row) {
                assert_eq!(state.on(input), want, "{state:?} on {input:?}");
            }
        }
    }
}
