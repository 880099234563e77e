//! The client SDK of Fulmar: a device of a user, on whatever network it happens to be.
//!
//! - A message is on disk before [`Conversation::send`] returns, and from then on is sent in order and stored exactly
//!   once, whatever happens to the connection, the gateway or the app.
//! - A received message and its cursor are committed together; the app gets each message once per database, in order.
//! - The connection is made, kept and made again without the app; [`Client::state`] shows where it stands.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use fulmar_client::{Client, Options};
//!
//! # let folder = tempfile::tempdir()?;
//! # let file = folder.path().join("alice.db");
//! let client = Client::connect(Options::new(file.as_path(), "127.0.0.1:9", "localhost", "token")).await?;
//! let bob = client.direct("bob").await?;
//! let handle = bob.send("hello").await?; // on disk, with or without a connection
//! # let (id, uid) = (handle.id(), client.device_uid().await?);
//! # drop(handle);
//! client.close().await?;
//! # drop((bob, client));
//!
//! // The next run finds it in the outbox.
//! let client = Client::connect(Options::new(file.as_path(), "127.0.0.1:9", "localhost", "token")).await?;
//! let waiting = client.outbox().await?;
//! assert_eq!(&waiting[0].payload[..], b"hello");
//! # assert_eq!((waiting[0].handle.id(), client.device_uid().await?), (id, uid));
//! # client.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The way of a message: [`Conversation::send`] → `db::outbox` → `driver` → `link` → the gateway; back:
//! `link` → `driver` → `db::inbox` → [`Messages::next`]. Who decides: the connection's states are in `state` (pure),
//! exactly-once is in `fulmar_protocol`.

mod backoff;
mod client;
mod conversation;
mod db;
mod driver;
mod error;
mod event;
mod keepalive;
mod messages;
mod networks;
mod options;
mod platform;
mod race;
mod send;
mod state;
mod transport;

pub use bytes::Bytes;
pub use fulmar_protocol::{
    close::RefusalCode,
    frame::{ConversationClass, NetworkHint, NetworkKind, Receipt},
    id::{ConversationId, DeviceClass, DeviceId, DeviceUid, Seq, ServiceId, UnixMillis, UserId},
    service::{DeviceEntry, MemberEntry, MemberPage, MembersChanged, Role},
};

pub use self::{
    client::{Client, Traffic},
    conversation::Conversation,
    db::ConversationSummary,
    error::{Error, SendError},
    event::{
        Attempt, AttemptOutcome, ClientEvent, CloseReason, ConnectionState, EventKind, OfflineReason,
        Received, RecordKind, TransportKind,
    },
    messages::{Events, Messages, States},
    options::{BoxFuture, Database, Durability, Options, Token, Trust, in_memory},
    platform::{ByteStream, Platform, System},
    send::{OutboxEntry, SendHandle, SendOptions, SendStatus, SendWatch},
};
