//! The lines of an export: one JSON object each, and the whole of the file format.
//!
//! - The first line is [`Line::Export`], the last one [`Line::End`]; the hash in the last one is over all lines between.
//! - Every line stands for itself: what it belongs to is named by number in it.
//! - A field that is not known is refused, not skipped: growth is a new version.
//!
//! Not here: which lines there are of a folder (`export`), what becomes of them (`import`).

use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use fulmar_protocol::{
    id::{
        AppId, ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, UnixMillis,
        UserId,
    },
    limit::LANE_ACKS_REMEMBERED,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    record::{RECORD_PAYLOAD_BYTES_MAX, Record, RecordKind},
    row::{
        ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, PendingLink, Role, User,
    },
};

/// The version of the file format that is written, and the only one that is read.
pub(crate) const EXPORT_VERSION: u64 = 1;

/// Bytes of a line at most; the longest is a record with the largest payload.
pub(crate) const LINE_BYTES_MAX: usize = RECORD_PAYLOAD_BYTES_MAX * 2 + 4096;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Line {
    /// The first line.
    Export {
        version: u64,
        /// The program that wrote it.
        program: String,
        /// Shards of the folder.
        shards: u16,
        /// Its engine; for people.
        engine: String,
        /// When it was written.
        written: UnixMillis,
        /// The last commit of each shard, all of which are in the file.
        commits: Vec<u64>,
        /// Only this app.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        app: Option<App>,
        /// Only this conversation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        conversation: Option<ConversationId>,
    },
    /// A shard begins: up to where it has handed out local numbers.
    Shard {
        shard: u16,
        users: u64,
        conversations: u64,
    },
    User {
        user: UserId,
        app: App,
        name: String,
        created: UnixMillis,
    },
    Device {
        user: UserId,
        device: DeviceId,
        #[serde(with = "hex_uid")]
        uid: DeviceUid,
        class: DeviceClass,
        epoch: Epoch,
        class_epoch: ClassEpoch,
        seen: UnixMillis,
    },
    /// How often devices of a class have logged in.
    Login {
        user: UserId,
        class: DeviceClass,
        epoch: ClassEpoch,
    },
    /// A conversation in a user's list.
    Listed {
        user: UserId,
        conversation: ConversationId,
        joined: Seq,
        cleared: Seq,
        muted: bool,
        changed: UnixMillis,
    },
    /// How far a device has a conversation.
    Received {
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
        seq: Seq,
    },
    Conversation {
        conversation: ConversationId,
        app: App,
        class: Class,
        name: String,
        creator: UserId,
        created: UnixMillis,
    },
    /// Where a conversation's log stands; its records follow.
    Head {
        conversation: ConversationId,
        seq: Seq,
        count: u64,
        time: UnixMillis,
        low: Seq,
        low_count: u64,
        members: u64,
    },
    Record(Box<RecordLine>),
    Member {
        conversation: ConversationId,
        user: UserId,
        role: RoleName,
        joined: Seq,
        since: UnixMillis,
    },
    /// How far a user has read.
    Read {
        conversation: ConversationId,
        user: UserId,
        seq: Seq,
    },
    Lane {
        conversation: ConversationId,
        user: UserId,
        device: DeviceId,
        epoch: Epoch,
        last: Pseq,
        /// Pairs of pseq and seq, oldest first; a seq of zero: refused.
        recent: Vec<(Pseq, Seq)>,
    },
    /// A step into a user's list that is still owed.
    Link {
        conversation: ConversationId,
        user: UserId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        listed: Option<ListedFields>,
    },
    /// The last line.
    End {
        /// Lines between the first and this one.
        lines: u64,
        users: u64,
        conversations: u64,
        records: u64,
        /// Over the lines between the first and this one, each with its line feed.
        sha256: String,
    },
}

/// The row behind a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListedFields {
    joined: Seq,
    cleared: Seq,
    muted: bool,
    changed: UnixMillis,
}

/// A record of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecordLine {
    pub(crate) conversation: ConversationId,
    pub(crate) seq: Seq,
    kind: Kind,
    sender: UserId,
    #[serde(default, skip_serializing_if = "is_zero")]
    device: DeviceId,
    #[serde(default, skip_serializing_if = "is_zero")]
    epoch: Epoch,
    #[serde(default, skip_serializing_if = "is_zero")]
    pseq: Pseq,
    time: UnixMillis,
    count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<Seq>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl: Option<u32>,
    #[serde(default, skip_serializing_if = "is_false")]
    more: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    continues: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    silent: bool,
    #[serde(with = "base64_bytes")]
    payload: Bytes,
}

fn is_zero<T: Copy + Into<u64>>(number: &T) -> bool {
    (*number).into() == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape serde asks for")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// An app's number as 16 hexadecimal digits: it is too large for programs that read numbers as floating point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct App(pub(crate) AppId);

impl Serialize for App {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:016x}", self.0.get()))
    }
}

impl<'de> Deserialize<'de> for App {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let number = u64::from_str_radix(&text, 16).ok().filter(|_| text.len() == 16);
        number.and_then(AppId::new).map(Self).ok_or_else(|| D::Error::custom("not the number of an app"))
    }
}

/// Words for what has a number on disk.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident of $of:ident { $($word:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum $name { $($word),* }

        impl From<$of> for $name {
            fn from(of: $of) -> Self {
                match of { $($of::$word => Self::$word),* }
            }
        }

        impl From<$name> for $of {
            fn from(name: $name) -> Self {
                match name { $($name::$word => Self::$word),* }
            }
        }
    };
}

words! {
    /// Of a conversation.
    Class of ConversationClass { Direct, Group, Broadcast }
}

words! {
    /// Of a member.
    RoleName of Role { Member, Admin, Owner }
}

words! {
    /// Of a record.
    Kind of RecordKind { Message, Edit, Recall, Reaction, Created, Joined, Left, Notice }
}

mod hex_uid {
    use serde::de::Error as _;

    use super::{Deserialize, DeviceUid, Serializer};

    pub(super) fn serialize<S: Serializer>(uid: &DeviceUid, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:032x}", u128::from_be_bytes(uid.0)))
    }

    pub(super) fn deserialize<'de, D: super::Deserializer<'de>>(from: D) -> Result<DeviceUid, D::Error> {
        let text = String::deserialize(from)?;
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        number.map(|n| DeviceUid(n.to_be_bytes())).ok_or_else(|| D::Error::custom("not a device's uid"))
    }
}

mod base64_bytes {
    use base64::Engine as _;
    use serde::de::Error as _;

    use super::{Bytes, Deserialize, STANDARD, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &Bytes, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: super::Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(from)?;
        STANDARD.decode(text).map(Bytes::from).map_err(|error| D::Error::custom(format!("payload: {error}")))
    }
}

impl From<(ConversationId, Record)> for RecordLine {
    fn from((conversation, record): (ConversationId, Record)) -> Self {
        let Record {
            seq,
            kind,
            sender,
            device,
            epoch,
            pseq,
            time,
            count,
            target,
            ttl,
            more,
            continues,
            silent,
            payload,
        } = record;
        let kind = kind.into();
        Self {
            conversation,
            seq,
            kind,
            sender,
            device,
            epoch,
            pseq,
            time,
            count,
            target,
            ttl,
            more,
            continues,
            silent,
            payload,
        }
    }
}

impl From<RecordLine> for Record {
    fn from(line: RecordLine) -> Self {
        let RecordLine {
            conversation: _,
            seq,
            kind,
            sender,
            device,
            epoch,
            pseq,
            time,
            count,
            target,
            ttl,
            more,
            continues,
            silent,
            payload,
        } = line;
        let kind = kind.into();
        Self {
            seq,
            kind,
            sender,
            device,
            epoch,
            pseq,
            time,
            count,
            target,
            ttl,
            more,
            continues,
            silent,
            payload,
        }
    }
}

impl Line {
    pub(crate) fn user(user: UserId, row: User) -> Self {
        Self::User { user, app: App(row.app), name: row.name, created: row.created }
    }

    pub(crate) fn device(user: UserId, device: DeviceId, row: &Device) -> Self {
        let Device { uid, class, epoch, class_epoch, seen } = *row;
        Self::Device { user, device, uid, class, epoch, class_epoch, seen }
    }

    pub(crate) fn listed(user: UserId, conversation: ConversationId, row: &Listed) -> Self {
        let Listed { joined, cleared, muted, changed } = *row;
        Self::Listed { user, conversation, joined, cleared, muted, changed }
    }

    pub(crate) fn conversation(conversation: ConversationId, row: ConversationMeta) -> Self {
        let ConversationMeta { app, class, name, creator, created } = row;
        Self::Conversation { conversation, app: App(app), class: class.into(), name, creator, created }
    }

    pub(crate) fn head(conversation: ConversationId, row: &Head) -> Self {
        let Head { seq, count, time, low, low_count, members } = *row;
        Self::Head { conversation, seq, count, time, low, low_count, members }
    }

    pub(crate) fn member(conversation: ConversationId, user: UserId, row: &Member) -> Self {
        let Member { role, joined, since } = *row;
        Self::Member { conversation, user, role: role.into(), joined, since }
    }

    pub(crate) fn lane(conversation: ConversationId, user: UserId, device: DeviceId, row: LaneState) -> Self {
        let LaneState { epoch, last, recent } = row;
        Self::Lane { conversation, user, device, epoch, last, recent: recent.into() }
    }

    pub(crate) fn link(row: &PendingLink) -> Self {
        let listed = row.listed.map(|row| ListedFields {
            joined: row.joined,
            cleared: row.cleared,
            muted: row.muted,
            changed: row.changed,
        });
        Self::Link { conversation: row.conversation, user: row.user, listed }
    }
}

impl From<ListedFields> for Listed {
    fn from(fields: ListedFields) -> Self {
        let ListedFields { joined, cleared, muted, changed } = fields;
        Self { joined, cleared, muted, changed }
    }
}

/// The lane of a line; `None` if it remembers more than a lane can.
pub(crate) fn lane_state(epoch: Epoch, last: Pseq, recent: Vec<(Pseq, Seq)>) -> Option<LaneState> {
    (recent.len() <= LANE_ACKS_REMEMBERED).then(|| LaneState { epoch, last, recent: recent.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    #[test]
    fn lines_are_pinned_and_come_back() {
        let user = UserId::new(257).unwrap();
        let conversation = ConversationId::new(512).unwrap();
        let record = Record {
            seq: seq(7),
            kind: RecordKind::Message,
            sender: user,
            device: DeviceId::FIRST,
            epoch: Epoch::FIRST,
            pseq: Pseq::FIRST,
            time: UnixMillis::new(1_700_000_000_000).unwrap(),
            count: 6,
            target: Some(seq(5)),
            ttl: None,
            more: false,
            continues: false,
            silent: true,
            payload: Bytes::from_static(b"hi\n"),
        };
        let mut lane = LaneState::default();
        lane.note(Epoch::FIRST, Pseq::FIRST, seq(7));
        for (line, want) in [
            (
                Line::Record(Box::new((conversation, record).into())),
                r#"{"type":"record","conversation":512,"seq":7,"kind":"message","sender":257,"device":1,"epoch":1,"pseq":1,"time":1700000000000,"count":6,"target":5,"silent":true,"payload":"aGkK"}"#,
            ),
            (
                Line::lane(conversation, user, DeviceId::FIRST, lane),
                r#"{"type":"lane","conversation":512,"user":257,"device":1,"epoch":1,"last":1,"recent":[[1,7]]}"#,
            ),
            (
                Line::User {
                    user,
                    app: App(AppId::new(0xabc).unwrap()),
                    name: "al\"ice".to_owned(),
                    created: UnixMillis::default(),
                },
                r#"{"type":"user","user":257,"app":"0000000000000abc","name":"al\"ice","created":0}"#,
            ),
            (
                Line::Device {
                    user,
                    device: DeviceId::FIRST,
                    uid: DeviceUid([0xab; 16]),
                    class: DeviceClass::Tablet,
                    epoch: Epoch::FIRST,
                    class_epoch: ClassEpoch::ZERO,
                    seen: UnixMillis::default(),
                },
                r#"{"type":"device","user":257,"device":1,"uid":"abababababababababababababababab","class":"tablet","epoch":1,"class_epoch":0,"seen":0}"#,
            ),
            (
                Line::Member {
                    conversation,
                    user,
                    role: RoleName::Owner,
                    joined: seq(1),
                    since: UnixMillis::default(),
                },
                r#"{"type":"member","conversation":512,"user":257,"role":"owner","joined":1,"since":0}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&line).unwrap(), want);
            assert_eq!(serde_json::from_str::<Line>(want).unwrap(), line);
        }
    }

    #[test]
    fn what_is_not_a_line_is_refused() {
        for text in [
            r#"{"type":"read","conversation":512,"user":257,"seq":1,"more":1}"#,
            r#"{"type":"read","conversation":512,"user":257}"#,
            r#"{"type":"read","conversation":-1,"user":257,"seq":1}"#,
            r#"{"type":"read","conversation":9223372036854775807,"user":257,"seq":1}"#,
            r#"{"type":"reed","conversation":512,"user":257,"seq":1}"#,
            r#"{"type":"user","user":257,"app":"abc","name":"alice","created":0}"#,
            "[]",
        ] {
            assert!(serde_json::from_str::<Line>(text).is_err(), "{text}");
        }
    }
}
