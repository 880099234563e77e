//! Why a connection ends and why a request is refused; each with what the peer may do about it.

use serde::{Deserialize, Serialize};

/// What a peer that was refused may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Retry {
    /// Never: the same request will be refused again.
    Never,
    /// The same request at the same node, after the named time or a back-off.
    Same,
    /// At another node.
    OtherNode,
    /// After a new token.
    AfterAuth,
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal, $retry:ident, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* #[doc = concat!("Code ", $code, ", retry class `", stringify!($retry), "`.")] $variant,)*
            /// A code this version does not know; treated as final.
            Unknown(u32),
        }

        impl $name {
            /// Every code this version knows.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)* Self::Unknown(code) => code }
            }

            /// The code with this number.
            #[must_use]
            pub const fn from_code(code: u32) -> Self {
                match code { $($code => Self::$variant,)* other => Self::Unknown(other) }
            }

            /// What the peer may do.
            #[must_use]
            pub const fn retry(self) -> Retry {
                match self { $(Self::$variant => Retry::$retry,)* Self::Unknown(_) => Retry::Never }
            }

            /// One word for metrics and logs.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* Self::Unknown(_) => "Unknown" }
            }

            /// A sentence for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* Self::Unknown(_) => "a reason this version does not know" }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self {
                    Self::Unknown(code) => write!(f, "{} ({code:#x})", self.text()),
                    _ => f.write_str(self.text()),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                self.code().serialize(s)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                u32::deserialize(d).map(Self::from_code)
            }
        }
    };
}

codes! {
    /// Why a connection was closed: the application error code of CONNECTION_CLOSE (RFC 9000 section 19.19).
    CloseCode {
        /// Nothing is wrong.
        Done = 0x00, Same, "closed without error";
        /// The gateway is leaving; a GOAWAY said so before.
        Draining = 0x01, OtherNode, "the gateway is shutting down";
        /// The client goes on with a newer connection of the same device.
        Superseded = 0x02, Never, "a newer connection of this device took over";
        /// The device was logged out by a login elsewhere or by an administrator.
        Kicked = 0x03, Never, "this device was logged out";
        /// The peer was silent for longer than agreed.
        IdleTimeout = 0x04, Same, "nothing was heard for too long";
        /// More than the gateway can take at the moment.
        Overloaded = 0x05, Same, "the gateway is overloaded";
        /// A fault of the closing side.
        Internal = 0x06, Same, "internal error";
        /// No valid token or ticket.
        AuthFailed = 0x10, AfterAuth, "authentication failed";
        /// The token ended and no new one came.
        AuthExpired = 0x11, AfterAuth, "the token expired";
        /// No HELLO in time.
        HelloTimeout = 0x12, Same, "no HELLO arrived in time";
        /// No common version.
        VersionUnsupported = 0x13, Never, "no common protocol version";
        /// The bytes are not a frame.
        Malformed = 0x20, Never, "a frame could not be decoded";
        /// The frame is longer than its channel allows.
        TooLarge = 0x21, Never, "a frame exceeds the limit of its channel";
        /// An even frame type this version does not know.
        UnknownFrame = 0x22, Never, "an unknown frame that must be understood";
        /// A frame in a state, direction or on a channel where it may not be.
        OutOfState = 0x23, Never, "a frame came where it may not be";
        /// A stream of an unknown kind, a second one of a kind, or a closed control stream.
        BadStream = 0x24, Never, "a stream that may not be opened or closed";
        /// More in flight than allowed.
        WindowExceeded = 0x25, Never, "more requests in flight than allowed";
        /// An acknowledgement of what was never sent.
        BadAck = 0x26, Never, "an acknowledgement of something never sent";
    }
}

codes! {
    /// Why one request was refused while the connection goes on.
    RefusalCode {
        /// The conversation does not exist, or not for this user: the same answer for both.
        UnknownConversation = 0x01, Never, "no such conversation";
        /// The user is not, or is no longer, a member.
        NotAMember = 0x02, Never, "not a member of the conversation";
        /// The member may not do this.
        NotAllowed = 0x03, Never, "not allowed";
        /// The name is empty, too long, or has characters that are not allowed.
        BadName = 0x04, Never, "a name that is not allowed";
        /// No such user.
        UnknownUser = 0x05, Never, "no such user";
        /// The same pseq was sent before with other bytes.
        Conflict = 0x06, Never, "this number was sent before with other content";
        /// A pseq that does not follow the last one; the answer names the expected one.
        OutOfOrder = 0x07, Same, "a send before this one is missing";
        /// The producer's epoch is older than the one the server knows.
        StaleEpoch = 0x08, Never, "a newer database of this device exists";
        /// The message's time to live ended before it was stored.
        Expired = 0x09, Never, "the time to live ended before the message was stored";
        /// The sender cancelled it before it was stored.
        Cancelled = 0x0a, Never, "cancelled by the sender";
        /// The request's body can't be read.
        BadRequest = 0x0b, Never, "the request can't be read";
        /// The payload is larger than allowed.
        TooLarge = 0x0c, Never, "larger than allowed";
        /// A reference to a record that does not exist.
        UnknownReference = 0x0d, Never, "the message referred to does not exist";
        /// The group has as many members as it may have.
        GroupFull = 0x0e, Never, "the group is full";
        /// The name is taken.
        NameTaken = 0x0f, Never, "the name is taken";
        /// The number was used up by an earlier refusal or tombstone whose answer was lost.
        Consumed = 0x10, Never, "this number was used up by an earlier refusal";
        /// The queue in front of the shard is full.
        Busy = 0x20, Same, "the gateway is busy";
        /// The log can't take writes at the moment.
        StorageUnavailable = 0x21, Same, "the log can't be written at the moment";
        /// The disk is full.
        StorageFull = 0x22, Same, "the gateway's disk is full";
        /// Another node owns the conversation now.
        Moved = 0x23, OtherNode, "another node owns this conversation";
        /// The deadline of a call passed.
        DeadlineExceeded = 0x24, Same, "the deadline passed";
        /// No such service, or no such method.
        UnknownService = 0x25, Never, "no such service or method";
        /// The gateway is draining.
        Draining = 0x26, OtherNode, "the gateway is shutting down";
        /// The records asked for are damaged on the gateway's disk.
        Damaged = 0x27, Never, "the records asked for are damaged at the gateway";
        /// The connection was lost before the answer of a call; whether it was carried out is not known.
        ConnectionLost = 0x28, Same, "the connection was lost before the answer came";
        /// The token is malformed or its signature is wrong.
        BadToken = 0x40, AfterAuth, "the token is not valid";
        /// The token expired.
        TokenExpired = 0x41, AfterAuth, "the token expired";
        /// The token is not valid yet.
        TokenNotYetValid = 0x42, AfterAuth, "the token is not valid yet";
        /// The token is for an app this gateway does not serve.
        WrongApp = 0x43, Never, "the token is for an app this gateway does not serve";
        /// The token was signed by an unknown key or issuer.
        UnknownKey = 0x44, AfterAuth, "the token was signed by an unknown key or issuer";
        /// The ticket is not valid; use a token.
        BadTicket = 0x45, AfterAuth, "the ticket is not valid, use a token";
        /// The device was logged out.
        KickedOut = 0x46, Never, "this device was logged out";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_are_distinct() {
        let mut seen = std::collections::BTreeSet::new();
        for &code in CloseCode::ALL {
            assert_eq!(CloseCode::from_code(code.code()), code);
            assert!(seen.insert(code.code()), "{code:?} shares its number");
        }
        let mut seen = std::collections::BTreeSet::new();
        for &code in RefusalCode::ALL {
            assert_eq!(RefusalCode::from_code(code.code()), code);
            assert!(seen.insert(code.code()), "{code:?} shares its number");
        }
        assert_eq!(RefusalCode::from_code(0xffff), RefusalCode::Unknown(0xffff));
        assert_eq!(RefusalCode::Unknown(7777).retry(), Retry::Never);
    }
}
