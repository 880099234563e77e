//! What a commit can say. A commit is a sequence of operations, applied together or not at all.
//!
//! - Every operation is absolute and self-describing: applying it twice, or to tables that already hold it, gives the
//!   same tables. That is what makes replay safe.
//! - Bytes: a tag, then the fields. Tags and fields of format 1 never change; growth is a new tag.
//!
//! Not here: the frame around them (`commit`), applying them (`shard::view`).

use bytes::Bytes;
use fulmar_protocol::id::{ClassEpoch, ConversationId, DeviceClass, DeviceId, Epoch, Pseq, Seq, UserId};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    codec::{Cursor, Malformed, put_varint},
    record::Record,
    row::{ConversationMeta, Device, Listed, Member, PendingLink, User},
};

/// One durable change of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// The next record of a conversation's log. Its `seq` must be the head's next.
    Append {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The record.
        record: Record,
    },
    /// A send that was refused for good: its number is used up, no record carries it.
    Refuse {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// Who sent it.
        user: UserId,
        /// The sender's device.
        device: DeviceId,
        /// The producer's incarnation.
        epoch: Epoch,
        /// The number that is used up.
        pseq: Pseq,
    },
    /// A user and the name it is found by.
    NameUser {
        /// The user, of this shard.
        user: UserId,
        /// The row; its name must not belong to another user.
        row: User,
    },
    /// A conversation and the name it is found by.
    NameConversation {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The row; its name must not belong to another conversation.
        row: ConversationMeta,
    },
    /// A membership; `None`: no longer a member.
    Member {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The user, of any shard.
        user: UserId,
        /// The row.
        row: Option<Member>,
    },
    /// A conversation in a user's list; `None`: no longer there.
    Listed {
        /// The user, of this shard.
        user: UserId,
        /// The conversation, of any shard.
        conversation: ConversationId,
        /// The row.
        row: Option<Listed>,
    },
    /// A device of a user, found by its number and by its uid.
    Device {
        /// The user, of this shard.
        user: UserId,
        /// The device's number.
        device: DeviceId,
        /// The row.
        row: Device,
    },
    /// The login counter of a device class of a user.
    ClassEpoch {
        /// The user, of this shard.
        user: UserId,
        /// The class.
        class: DeviceClass,
        /// The counter.
        epoch: ClassEpoch,
    },
    /// A device has everything of a conversation up to `seq`. Never moves back.
    Recv {
        /// The user, of this shard.
        user: UserId,
        /// The user's device.
        device: DeviceId,
        /// The conversation, of any shard.
        conversation: ConversationId,
        /// The last record it has.
        seq: Seq,
    },
    /// A user has read a conversation up to `seq`. Never moves back.
    Read {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The user, of any shard.
        user: UserId,
        /// The last record they read.
        seq: Seq,
    },
    /// Records up to and including `low` are gone. Never moves back.
    Low {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The last record that is gone; at most the head.
        low: Seq,
        /// Its `count`.
        count: u64,
    },
    /// A user's list must follow; kept until [`Op::LinkDone`].
    Link(PendingLink),
    /// The user's list has followed.
    LinkDone {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// The user whose list followed.
        user: UserId,
    },
    /// How many members a conversation has. Written by the store itself; refused in a [`Batch`].
    MemberCount {
        /// The conversation, of this shard.
        conversation: ConversationId,
        /// Members there are.
        members: u64,
    },
    /// A writer took the shard over: whoever had an older epoch is fenced. Written by the store itself; refused in a
    /// [`Batch`].
    Acquire {
        /// The writer's epoch, one more than the last.
        epoch: u64,
    },
}

/// The operations of one commit.
pub type Batch = Vec<Op>;

/// Operations in one commit.
pub const BATCH_OPS_MAX: usize = 8_192;

/// Bytes of one commit's operations: 128 records of the largest size and then some.
pub const BATCH_BYTES_MAX: usize = 3 * 1024 * 1024;

const APPEND: u8 = 1;
const REFUSE: u8 = 2;
const NAME_USER: u8 = 3;
const NAME_CONVERSATION: u8 = 4;
const MEMBER: u8 = 5;
const LISTED: u8 = 6;
const DEVICE: u8 = 7;
const CLASS_EPOCH: u8 = 8;
const RECV: u8 = 9;
const READ: u8 = 10;
const LOW: u8 = 11;
const LINK: u8 = 12;
const LINK_DONE: u8 = 13;
const MEMBER_COUNT: u8 = 14;
const ACQUIRE: u8 = 15;

impl Op {
    /// Appends the operation's bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Append { conversation, record } => {
                out.push(APPEND);
                put_varint(out, conversation.get());
                record.encode(*conversation, out);
            }
            Self::Refuse { conversation, user, device, epoch, pseq } => {
                numbers(
                    out,
                    REFUSE,
                    &[conversation.get(), user.get(), device.get(), epoch.get(), pseq.get()],
                );
            }
            Self::NameUser { user, row } => cold(out, NAME_USER, &(user, row)),
            Self::NameConversation { conversation, row } => {
                cold(out, NAME_CONVERSATION, &(conversation, row))
            }
            Self::Member { conversation, user, row } => cold(out, MEMBER, &(conversation, user, row)),
            Self::Listed { user, conversation, row } => cold(out, LISTED, &(user, conversation, row)),
            Self::Device { user, device, row } => cold(out, DEVICE, &(user, device, row)),
            Self::ClassEpoch { user, class, epoch } => cold(out, CLASS_EPOCH, &(user, class, epoch)),
            Self::Recv { user, device, conversation, seq } => {
                numbers(out, RECV, &[user.get(), device.get(), conversation.get(), seq.get()]);
            }
            Self::Read { conversation, user, seq } => {
                numbers(out, READ, &[conversation.get(), user.get(), seq.get()]);
            }
            Self::Low { conversation, low, count } => {
                numbers(out, LOW, &[conversation.get(), low.get(), *count]);
            }
            Self::Link(link) => cold(out, LINK, link),
            Self::LinkDone { conversation, user } => {
                numbers(out, LINK_DONE, &[conversation.get(), user.get()])
            }
            Self::MemberCount { conversation, members } => {
                numbers(out, MEMBER_COUNT, &[conversation.get(), *members]);
            }
            Self::Acquire { epoch } => numbers(out, ACQUIRE, &[*epoch]),
        }
    }

    /// Reads one operation from the start of `bytes`. Payloads share `bytes`.
    pub(crate) fn decode(bytes: &Bytes) -> Result<Decoded, Malformed> {
        let mut at = Cursor::new(bytes);
        let op = match at.u8("operation tag")? {
            APPEND => {
                let conversation = at.number("append conversation")?;
                let start = at.at();
                let (record, taken) = Record::decode(conversation, &bytes.slice(start..))?;
                return Ok(Decoded {
                    op: Self::Append { conversation, record },
                    record_at: start,
                    taken: start + taken,
                });
            }
            REFUSE => Self::Refuse {
                conversation: at.number("refuse conversation")?,
                user: at.number("refuse user")?,
                device: at.number("refuse device")?,
                epoch: at.number("refuse epoch")?,
                pseq: at.number("refuse pseq")?,
            },
            NAME_USER => {
                let (user, row) = postcarded(&mut at, "user name")?;
                Self::NameUser { user, row }
            }
            NAME_CONVERSATION => {
                let (conversation, row) = postcarded(&mut at, "conversation name")?;
                Self::NameConversation { conversation, row }
            }
            MEMBER => {
                let (conversation, user, row) = postcarded(&mut at, "member")?;
                Self::Member { conversation, user, row }
            }
            LISTED => {
                let (user, conversation, row) = postcarded(&mut at, "listed")?;
                Self::Listed { user, conversation, row }
            }
            DEVICE => {
                let (user, device, row) = postcarded(&mut at, "device")?;
                Self::Device { user, device, row }
            }
            CLASS_EPOCH => {
                let (user, class, epoch) = postcarded(&mut at, "class epoch")?;
                Self::ClassEpoch { user, class, epoch }
            }
            RECV => Self::Recv {
                user: at.number("recv user")?,
                device: at.number("recv device")?,
                conversation: at.number("recv conversation")?,
                seq: at.number("recv seq")?,
            },
            READ => Self::Read {
                conversation: at.number("read conversation")?,
                user: at.number("read user")?,
                seq: at.number("read seq")?,
            },
            LOW => Self::Low {
                conversation: at.number("low conversation")?,
                low: at.number("low seq")?,
                count: at.varint("low count")?,
            },
            LINK => Self::Link(postcarded(&mut at, "link")?),
            LINK_DONE => Self::LinkDone {
                conversation: at.number("link conversation")?,
                user: at.number("link user")?,
            },
            MEMBER_COUNT => Self::MemberCount {
                conversation: at.number("member count conversation")?,
                members: at.varint("member count")?,
            },
            ACQUIRE => Self::Acquire { epoch: at.varint("acquire epoch")? },
            _ => return Err(Malformed("operation tag")),
        };
        Ok(Decoded { op, record_at: at.at(), taken: at.at() })
    }
}

/// An operation as it was read.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) op: Op,
    /// Where an appended record's own bytes begin; the end for other operations.
    pub(crate) record_at: usize,
    /// Bytes of the whole operation.
    pub(crate) taken: usize,
}

fn numbers(out: &mut Vec<u8>, tag: u8, fields: &[u64]) {
    out.push(tag);
    for field in fields {
        put_varint(out, *field);
    }
}

/// `tag length fields`, the fields in postcard's encoding.
fn cold<T: Serialize>(out: &mut Vec<u8>, tag: u8, fields: &T) {
    out.push(tag);
    match postcard::to_extend(fields, Vec::new()) {
        Ok(bytes) => {
            put_varint(out, bytes.len() as u64);
            out.extend_from_slice(&bytes);
        }
        // Only types of unknown length fail in a growing vector, and no operation has one.
        Err(error) => debug_assert!(false, "an operation could not be encoded: {error}"),
    }
}

fn postcarded<T: DeserializeOwned>(at: &mut Cursor<'_>, what: &'static str) -> Result<T, Malformed> {
    let length = at.length(what)?;
    match postcard::take_from_bytes(at.take(length, what)?) {
        Ok((fields, [])) => Ok(fields),
        _ => Err(Malformed(what)),
    }
}
