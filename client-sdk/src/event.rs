//! What the app is told: messages, connection states, and things that pass by.

use std::time::Duration;

use bytes::Bytes;
pub use fulmar_protocol::frame::{EventKind, RecordKind};
use fulmar_protocol::{
    close::RefusalCode,
    id::{ConversationId, Seq, UnixMillis, UserId},
};

/// Where the connection stands, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Not connected; everything works on the database, sends wait in the outbox.
    Offline {
        /// Why.
        reason: OfflineReason,
        /// How long until the next attempt; `None`: none is planned (suspended, or no network).
        retry_in: Option<Duration>,
    },
    /// A connection is being made.
    Connecting,
    /// Connected; what was missed is coming in.
    Syncing,
    /// Connected and up to date.
    Live,
    /// Connected, but the gateway is overdue with an answer.
    Suspect,
    /// The gateway is about to leave; the next connection is being made.
    Draining,
    /// It is over; the client does not connect again.
    Closed {
        /// Why.
        reason: CloseReason,
    },
}

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OfflineReason {
    /// The client was just made.
    Starting,
    /// The gateway could not be reached; the text is for people.
    Unreachable(String),
    /// The connection was lost; the text is for people.
    Lost(String),
    /// The gateway refused for now.
    Refused(RefusalCode),
    /// No token could be had from the app's provider; the text is for people.
    NoToken(String),
    /// The app suspended the client.
    Suspended,
}

/// Why a client ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The app closed it.
    Requested,
    /// The device was logged out: by whom. The user has to log in again.
    Kicked(String),
    /// A newer connection of the same device took over: two clients run on copies of one database.
    Superseded,
    /// The gateway is another one than the database belongs to, or lost its data folder and began anew: conversations, cursors
    /// and sends of this database mean nothing there. Use another database, or give the gateway its folder back.
    OtherGateway,
    /// The gateway refuses for good.
    Refused(RefusalCode),
    /// The two sides do not understand each other; the text is for people.
    Incompatible(String),
    /// The database failed; the text is for people.
    Database(String),
}

/// By which way a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TransportKind {
    /// QUIC over UDP.
    Quic,
    /// TLS over TCP, where UDP is blocked.
    Tls,
    /// WebSocket over TLS, where nothing but the web gets through.
    WebSocket,
}

/// One attempt to reach the gateway; see [`crate::Client::attempts`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// When it ended, by the device's clock.
    pub at: UnixMillis,
    /// By which way.
    pub transport: TransportKind,
    /// To which address.
    pub address: std::net::SocketAddr,
    /// From its first packet to its end.
    pub took: Duration,
    /// What became of it.
    pub outcome: AttemptOutcome,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttemptOutcome {
    /// It became the connection.
    Won,
    /// Another one was sooner.
    Overtaken,
    /// Nobody answered in time.
    NoAnswer,
    /// It failed; the text is for people.
    Failed(String),
}

/// A record of a conversation, handed to the app once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The conversation.
    pub conversation: ConversationId,
    /// Its position there; of a large body the position of its last piece.
    pub seq: Seq,
    /// Who sent it.
    pub sender: UserId,
    /// The sender's name, when this client knows it.
    pub sender_name: Option<String>,
    /// When the gateway stored it.
    pub time: UnixMillis,
    /// What it is.
    pub kind: RecordKind,
    /// The record it refers to (edit, recall, reaction, reply).
    pub reference: Option<Seq>,
    /// The content. Of [`RecordKind::Created`], `Joined` and `Left` use [`Received::roster`].
    pub payload: Bytes,
    /// Sent by this user, on this or another device.
    pub own: bool,
    /// Sent by this device.
    pub this_device: bool,
    /// Not counted as unread.
    pub silent: bool,
    /// A body over the limit lost its end ([`fulmar_protocol::limit::BODY_BYTES_MAX`]); only a broken sender makes one.
    pub truncated: bool,
    /// Order of arrival in this database, increasing over all conversations.
    pub arrival: u64,
}

impl Received {
    /// The content as text; what is no UTF-8 is replaced.
    #[must_use]
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.payload)
    }

    /// The users a membership record is about: number and name.
    #[must_use]
    pub fn roster(&self) -> Vec<(UserId, String)> {
        match self.kind {
            RecordKind::Created | RecordKind::Joined | RecordKind::Left => {
                fulmar_protocol::service::decode::<fulmar_protocol::service::Roster>(&self.payload)
                    .map(|roster| roster.users)
                    .unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }
}

/// Something that passes by; who does not look misses it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientEvent {
    /// Typing, presence, or the business's own.
    Ephemeral {
        /// Where.
        conversation: ConversationId,
        /// What.
        kind: EventKind,
        /// Who.
        sender: UserId,
        /// How long it is of use.
        ttl: Duration,
        /// The business's bytes.
        payload: Bytes,
    },
    /// A member has received or read more; the own user when another of its devices has.
    Receipt {
        /// Where.
        conversation: ConversationId,
        /// Who.
        user: UserId,
        /// Received up to here by one of the user's devices.
        recv: Seq,
        /// Read up to here.
        read: Seq,
    },
    /// A conversation was seen for the first time.
    Conversation {
        /// Which.
        conversation: ConversationId,
    },
    /// Records are gone by retention before this device could get them.
    Gap {
        /// Where.
        conversation: ConversationId,
        /// The first that is gone.
        from: Seq,
        /// The last that is gone.
        to: Seq,
    },
    /// The name of a user became known.
    Name {
        /// Who.
        user: UserId,
        /// Its name.
        name: String,
    },
    /// The app looked away for too long: this many events were dropped.
    Missed(u64),
}
