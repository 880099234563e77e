//! The frames that are rare: a fixed postcard core and TLVs. A core never changes within a major version; growth is
//! TLVs.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Body, Fields, put_varint, read_tlvs};
use crate::{
    close::{CloseCode, RefusalCode, Retry},
    error::DecodeError,
    id::{
        ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, FolderId, Pseq, RequestId, Seq,
        SessionId, UnixMillis, UserId,
    },
    limit::{
        ADDRESSES_MAX, ENTRIES_PER_FRAME_MAX, NAME_BYTES_MAX, TEXT_BYTES_MAX, TICKET_BYTES_MAX,
        TOKEN_BYTES_MAX,
    },
};

/// Counts bytes instead of keeping them.
struct Counter(usize);

impl postcard::ser_flavors::Flavor for Counter {
    type Output = usize;

    fn try_push(&mut self, _: u8) -> postcard::Result<()> {
        self.0 += 1;
        Ok(())
    }

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        self.0 += data.len();
        Ok(())
    }

    fn finalize(self) -> postcard::Result<usize> {
        Ok(self.0)
    }
}

fn core_len(core: &impl Serialize) -> usize {
    postcard::serialize_with_flavor(core, Counter(0)).unwrap_or(0)
}

fn encode_core(core: &impl Serialize, out: &mut BytesMut) {
    // Serialising these structs can't fail: no maps of unknown length, no borrowed iterators.
    if let Ok(bytes) = postcard::to_allocvec(core) {
        out.put_slice(&bytes);
    }
}

/// Extension of WELCOME: the [`FolderId`].
const TAG_FOLDER: u64 = 0x01;

fn decode_core<T: DeserializeOwned>(fields: &mut Fields<'_>, frame: &'static str) -> Result<T, DecodeError> {
    decode_core_with(fields, frame, |_, _, _| Ok(()))
}

/// The core, and its extensions as `take` knows them.
fn decode_core_with<T: DeserializeOwned>(
    fields: &mut Fields<'_>,
    frame: &'static str,
    mut take: impl FnMut(&mut T, u64, &[u8]) -> Result<(), DecodeError>,
) -> Result<T, DecodeError> {
    let whole = fields.0.clone();
    let (mut core, rest) = postcard::take_from_bytes(&whole).map_err(|_| DecodeError::BadCore { frame })?;
    let consumed = whole.len() - rest.len();
    fields.take(consumed, "core")?;
    read_tlvs(fields, |tag, value| take(&mut core, tag, value))?;
    Ok(core)
}

const fn within(ok: bool, field: &'static str) -> Result<(), DecodeError> {
    if ok { Ok(()) } else { Err(DecodeError::BadValue { field }) }
}

macro_rules! cold {
    ($($name:ident => |$frame:ident| $check:expr;)*) => {$(
        impl Body for $name {
            fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
                let $frame: Self = decode_core(fields, stringify!($name))?;
                $check?;
                Ok($frame)
            }

            fn len(&self) -> usize {
                core_len(self)
            }

            fn encode(&self, out: &mut BytesMut) {
                encode_core(self, out);
            }
        }
    )*};
}

cold! {
    Hello => |f| within(
        f.auth.len_ok() && f.changed.len() <= ENTRIES_PER_FRAME_MAX, "hello");
    Auth => |f| within(f.token.len() <= TOKEN_BYTES_MAX, "token");
    Open => |f| within(f.target.len_ok() && f.id != RequestId::ZERO, "target");
    Opened => |f| within(f.name.len() <= NAME_BYTES_MAX, "name");
    SendRefused => |f| within(f.pseq != Pseq::ZERO, "pseq");
    Goaway => |f| within(
        f.text.len() <= TEXT_BYTES_MAX
            && f.addresses.len() <= ADDRESSES_MAX
            && f.addresses.iter().all(|a| a.len() <= NAME_BYTES_MAX), "goaway");
    Kicked => |f| within(f.by.len() <= TEXT_BYTES_MAX, "by");
    Error => |f| within(f.text.len() <= TEXT_BYTES_MAX, "text");
}

impl Body for Welcome {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let f: Self = decode_core_with(fields, "Welcome", |welcome: &mut Self, tag, value| {
            if tag == TAG_FOLDER {
                let folder = value.try_into().map_err(|_| DecodeError::BadValue { field: "folder" })?;
                welcome.folder = Some(FolderId(folder));
            }
            Ok(())
        })?;
        within(
            f.ticket.len() <= TICKET_BYTES_MAX
                && f.addresses.len() <= ADDRESSES_MAX
                && f.addresses.iter().all(|a| a.len() <= NAME_BYTES_MAX)
                && f.lanes >= 1
                && f.lanes <= crate::limit::LANES_MAX,
            "welcome",
        )?;
        Ok(f)
    }

    fn len(&self) -> usize {
        // Tag and length take a byte each.
        core_len(self) + self.folder.map_or(0, |folder| 2 + folder.0.len())
    }

    fn encode(&self, out: &mut BytesMut) {
        encode_core(self, out);
        if let Some(folder) = self.folder {
            put_varint(out, TAG_FOLDER);
            put_varint(out, folder.0.len() as u64);
            out.put_slice(&folder.0);
        }
    }
}

/// How a client proves who it is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuthProof {
    /// A JWT of the business.
    Token(String),
    /// A ticket of an earlier WELCOME.
    Ticket(Bytes8),
}

impl AuthProof {
    fn len_ok(&self) -> bool {
        match self {
            Self::Token(token) => token.len() <= TOKEN_BYTES_MAX,
            Self::Ticket(ticket) => ticket.0.len() <= TICKET_BYTES_MAX,
        }
    }

    /// A proof by ticket.
    #[must_use]
    pub fn ticket(ticket: &[u8]) -> Self {
        Self::Ticket(Bytes8(ticket.to_vec()))
    }
}

impl core::fmt::Debug for AuthProof {
    /// Never prints the secret.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Token(token) => write!(f, "Token({} bytes)", token.len()),
            Self::Ticket(ticket) => write!(f, "Ticket({} bytes)", ticket.0.len()),
        }
    }
}

/// A short string of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes8(pub Vec<u8>);

impl Bytes8 {
    /// Its length, bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes, shared.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

/// What kind of network the device is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkKind {
    /// Not known.
    #[default]
    Unknown,
    /// Wi-Fi.
    Wifi,
    /// Cellular.
    Cellular,
    /// A cable.
    Wired,
}

/// What the client knows of its network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkHint {
    /// Its kind.
    pub kind: NetworkKind,
    /// The last round-trip time measured on it, milliseconds; 0 for none.
    pub rtt_ms: u32,
}

/// The first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The newest minor version the client speaks.
    pub minor: u8,
    /// The client's [`crate::version::Features`].
    pub features: u64,
    /// Who it is.
    pub auth: AuthProof,
    /// The SDK database's own name.
    pub device: DeviceUid,
    /// What kind of device it is.
    pub class: DeviceClass,
    /// The producer epoch the server gave this database; 0 when it has none.
    pub epoch: Epoch,
    /// Digest of all receive cursors once `changed` is applied ([`crate::session::digest::CursorDigest`]).
    pub cursor_digest: u64,
    /// Receive cursors the gateway may not know yet. Too many for this frame: leave it empty and let the digest differ.
    pub changed: Vec<(ConversationId, Seq)>,
    /// What the client knows of its network.
    pub network: NetworkHint,
}

/// What the gateway knows of the device's cursors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Resumption {
    /// The same as the client: what changed follows by itself.
    Resumed,
    /// Something else: send all CURSORS.
    NeedCursors,
    /// Nothing: a new device.
    Fresh,
}

/// Limits the gateway holds this connection to; never above those of [`crate::limit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Payload bytes of one SEND.
    pub send_payload_bytes: u32,
    /// Unacked SENDs per conversation.
    pub inflight_per_conversation: u16,
    /// Unacked SENDs per producer.
    pub inflight_per_producer: u16,
    /// Calls that may be unanswered.
    pub calls_inflight: u16,
}

impl Default for Limits {
    #[expect(clippy::cast_possible_truncation, reason = "constants that fit")]
    fn default() -> Self {
        Self {
            send_payload_bytes: crate::limit::SEND_PAYLOAD_BYTES_MAX as u32,
            inflight_per_conversation: crate::limit::INFLIGHT_PER_CONVERSATION_MAX as u16,
            inflight_per_producer: crate::limit::INFLIGHT_PER_PRODUCER_MAX as u16,
            calls_inflight: crate::limit::CALLS_INFLIGHT_MAX as u16,
        }
    }
}

/// Answers a HELLO: the session is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The minor version both speak.
    pub minor: u8,
    /// The features both have.
    pub features: u64,
    /// The session.
    pub session: SessionId,
    /// Proof for the next connection.
    pub ticket: Bytes8,
    /// The own user's number.
    pub user: UserId,
    /// The device's number.
    pub device: DeviceId,
    /// The epoch to send under; another one than the client's means that its pseqs start at 1 again.
    pub epoch: Epoch,
    /// The login this session belongs to.
    pub class_epoch: ClassEpoch,
    /// The gateway's clock.
    pub server_time: UnixMillis,
    /// Downlink lanes.
    pub lanes: u8,
    /// Limits of this connection.
    pub limits: Limits,
    /// Shortest and longest keep-alive interval the gateway allows, milliseconds.
    pub keepalive_ms: (u32, u32),
    /// What is known of the device's cursors.
    pub resumption: Resumption,
    /// Other addresses of the gateway, `host:port`.
    pub addresses: Vec<String>,
    /// The gateway's data folder, an extension: numbers and cursors a client keeps are of this one.
    #[serde(skip)]
    pub folder: Option<FolderId>,
}

/// A fresh token before the old one ends.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auth {
    /// The JWT, for the same user and app.
    pub token: String,
}

impl core::fmt::Debug for Auth {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Auth({} bytes)", self.token.len())
    }
}

/// What kind of conversation it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConversationClass {
    /// Of members who were added.
    #[default]
    Group,
    /// Between two users.
    Direct,
    /// Read by everybody of the app, written by those whom the app's configuration names.
    Broadcast,
}

/// Which conversation an OPEN means.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OpenTarget {
    /// One whose number is known.
    Number(ConversationId),
    /// The direct conversation with the user of this name; made when there is none.
    Direct(String),
    /// The group of this name.
    Group(String),
    /// The broadcast of this name, which everybody of the app reads.
    Broadcast(String),
}

impl OpenTarget {
    fn len_ok(&self) -> bool {
        match self {
            Self::Number(_) => true,
            Self::Direct(name) | Self::Group(name) | Self::Broadcast(name) => name.len() <= NAME_BYTES_MAX,
        }
    }
}

/// Looks a conversation up by name or number; a direct one is made when there is none. A replay is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Correlates the OPENED or ERROR, from 1.
    pub id: RequestId,
    /// Which.
    pub target: OpenTarget,
    /// It is on screen: its backlog comes first.
    pub on_screen: bool,
}

/// Answers an OPEN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The request.
    pub id: RequestId,
    /// The conversation's number, from now on its name.
    pub conversation: ConversationId,
    /// What kind it is.
    pub class: ConversationClass,
    /// The group's or broadcast's name, or the other user's name.
    pub name: String,
    /// The other user of a direct conversation; 0 for others.
    pub peer: UserId,
    /// The newest seq.
    pub head: Seq,
    /// Countable messages up to `head`.
    pub count: u64,
    /// The oldest seq.
    pub low: Seq,
    /// The seq at which the user joined.
    pub joined: Seq,
    /// How far the user has read.
    pub read: Seq,
    /// The last pseq of this producer that is settled here.
    pub last_pseq: Pseq,
}

/// A send that will not be stored under its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendRefused {
    /// The conversation.
    pub conversation: ConversationId,
    /// The send's number.
    pub pseq: Pseq,
    /// Why. [`RefusalCode::retry`] `Never`: the number is consumed and what follows goes on.
    pub code: RefusalCode,
    /// The number the gateway expects next.
    pub expected: Pseq,
    /// Milliseconds after which to try again, for retryable codes.
    pub retry_after_ms: u32,
}

/// The gateway is leaving: open the next connection first, then close this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goaway {
    /// Why.
    pub code: CloseCode,
    /// Milliseconds until the gateway closes the connection itself.
    pub deadline_ms: u32,
    /// Wait a random time up to this many milliseconds before connecting, so that not all come at once.
    pub spread_ms: u32,
    /// Where to go; empty: the same address.
    pub addresses: Vec<String>,
    /// For people.
    pub text: String,
}

/// This device is logged out. Terminal: it does not connect again until the user acts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kicked {
    /// The login that replaced this one.
    pub class_epoch: ClassEpoch,
    /// By whom, for people.
    pub by: String,
    /// When.
    pub time: UnixMillis,
}

/// A request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// Why.
    pub code: RefusalCode,
    /// The OPEN or PULL it refers to; 0: the HELLO or AUTH.
    pub refers: RequestId,
    /// What the client may do.
    pub retry: Retry,
    /// Milliseconds after which to try again.
    pub retry_after_ms: u32,
    /// For people.
    pub text: String,
}
