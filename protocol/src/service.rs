//! Service 0, built into the gateway: groups, members, the conversation list, devices, names.
//!
//! Bodies are postcard. A response of a method never changes within a major version; a new shape is a new method.
//! Lists are paged so that a page fits one REPLY ([`crate::limit::CALL_BODY_BYTES_MAX`]).

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    frame::ConversationClass,
    id::{ConversationId, DeviceClass, DeviceId, Seq, ServiceId, UnixMillis, UserId},
    limit::CALL_BODY_BYTES_MAX,
};

/// The number of the built-in service.
pub const BUILTIN: ServiceId = match ServiceId::new(0) {
    Some(service) => service,
    None => unreachable!(),
};

/// Members one call may add or remove, and the entries of one page.
pub const PAGE_MAX: usize = 64;

/// Methods of service 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Method {
    /// [`CreateGroup`] → [`GroupCreated`].
    CreateGroup = 1,
    /// [`ChangeMembers`] → [`MembersChanged`].
    AddMembers = 2,
    /// [`ChangeMembers`] → [`MembersChanged`]; removing oneself is leaving.
    RemoveMembers = 3,
    /// [`ListMembers`] → [`MemberPage`].
    ListMembers = 4,
    /// [`ListConversations`] → [`ConversationPage`].
    ListConversations = 5,
    /// `()` → [`Devices`].
    MyDevices = 6,
    /// [`Names`] → [`NamesFound`].
    Names = 7,
}

impl Method {
    /// The method with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::CreateGroup,
            2 => Self::AddMembers,
            3 => Self::RemoveMembers,
            4 => Self::ListMembers,
            5 => Self::ListConversations,
            6 => Self::MyDevices,
            7 => Self::Names,
            _ => return None,
        })
    }
}

/// Encodes a body; `None` when it does not fit a frame.
#[must_use]
pub fn encode(body: &impl Serialize) -> Option<bytes::Bytes> {
    let bytes = postcard::to_allocvec(body).ok()?;
    (bytes.len() <= CALL_BODY_BYTES_MAX).then(|| bytes.into())
}

/// Decodes a body; `None` when it is not one, or has bytes left over.
#[must_use]
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Some(value),
        _ => None,
    }
}

/// Makes a group whose first member and owner is the caller. Calling again with the same name finds the same group
/// when the caller owns it, so a repeated call is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateGroup {
    /// Unique in the app.
    pub name: String,
    /// Names of the first members besides the caller, at most [`PAGE_MAX`].
    pub members: Vec<String>,
}

/// Answers [`CreateGroup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupCreated {
    /// The group.
    pub conversation: ConversationId,
}

/// Adds or removes members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeMembers {
    /// The group.
    pub conversation: ConversationId,
    /// Names of users, at most [`PAGE_MAX`].
    pub members: Vec<String>,
}

/// Answers [`ChangeMembers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembersChanged {
    /// How many were not (or were) members before.
    pub changed: u32,
    /// The record of the change; 0 when nothing changed.
    pub seq: Seq,
}

/// Lists members in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListMembers {
    /// The conversation.
    pub conversation: ConversationId,
    /// Only members after this one; 0 for the first page.
    pub after: UserId,
}

/// What a member may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Sends and reads.
    #[default]
    Member,
    /// Also adds and removes members.
    Admin,
    /// Made the group; also everything else.
    Owner,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberEntry {
    /// The user.
    pub user: UserId,
    /// The user's name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// The seq of its joining.
    pub joined: Seq,
    /// Whether a device of it is connected.
    pub online: bool,
}

/// One page of members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberPage {
    /// The members.
    pub members: Vec<MemberEntry>,
    /// Members in all.
    pub total: u64,
    /// Ask again after the last one.
    pub more: bool,
}

/// Lists the caller's conversations in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListConversations {
    /// Only conversations after this one; 0 for the first page.
    pub after: ConversationId,
}

/// One conversation of the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationEntry {
    /// The conversation.
    pub conversation: ConversationId,
    /// What kind it is.
    pub class: ConversationClass,
    /// The group's, the broadcast's or the other user's name.
    pub name: String,
    /// The other user of a direct conversation; 0 for others.
    pub peer: UserId,
    /// The newest seq.
    pub head: Seq,
    /// The oldest seq.
    pub low: Seq,
    /// How far the caller has read.
    pub read: Seq,
    /// Countable messages of others beyond that, exact up to [`UNREAD_MAX`] and then that.
    pub unread: u32,
    /// Time of the newest record.
    pub time: UnixMillis,
}

/// Where counting unread messages stops ("999+").
pub const UNREAD_MAX: u32 = 1_000;

/// One page of conversations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationPage {
    /// The conversations.
    pub conversations: Vec<ConversationEntry>,
    /// Ask again after the last one.
    pub more: bool,
}

/// One device of the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// The device.
    pub device: DeviceId,
    /// Its class.
    pub class: DeviceClass,
    /// When it was last welcomed.
    pub last_seen: UnixMillis,
    /// Whether it is connected.
    pub online: bool,
    /// Whether it is the one that asks.
    pub this: bool,
}

/// The caller's devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// One per device.
    pub devices: Vec<DeviceEntry>,
}

/// Asks for the names of users with whom the caller shares the app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// At most [`PAGE_MAX`].
    pub users: Vec<UserId>,
}

/// Answers [`Names`]; users that are unknown are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesFound {
    /// Number and name.
    pub names: Vec<(UserId, String)>,
}

/// The payload of CREATED, JOINED and LEFT records: who is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Number and name at the time.
    pub users: Vec<(UserId, String)>,
}
