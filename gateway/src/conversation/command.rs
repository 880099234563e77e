//! What can be asked of a shard, and what it answers.

use std::sync::Arc;

use fulmar_protocol::{
    close::RefusalCode,
    frame::{self, Event},
    id::{
        AppId, ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Producer, Pseq, Seq,
        UserId,
    },
    session::digest::CursorDigest,
};
use fulmar_store::{ConversationMeta, Head, Member, PendingLink};
use tokio::sync::oneshot;

use crate::{broadcasts::Broadcasts, fanout::owed::Owed};

/// A request that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why; says whether to retry.
    pub code: RefusalCode,
    /// Milliseconds after which to try again, for retryable codes.
    pub retry_after_ms: u32,
}

impl Refusal {
    /// A refusal that is answered with the usual pause of its retry class.
    #[must_use]
    pub const fn new(code: RefusalCode) -> Self {
        let retry_after_ms = match code {
            RefusalCode::StorageFull => 5_000,
            RefusalCode::StorageUnavailable => 1_000,
            RefusalCode::Busy | RefusalCode::OutOfOrder => 200,
            _ => 0,
        };
        Self { code, retry_after_ms }
    }
}

impl From<RefusalCode> for Refusal {
    fn from(code: RefusalCode) -> Self {
        Self::new(code)
    }
}

/// The answer to a request.
pub type Answer<T> = oneshot::Sender<Result<T, Refusal>>;

/// A device asks to be let in; its user is authenticated.
#[derive(Clone, Debug)]
pub struct LoginRequest {
    /// The app.
    pub app: AppId,
    /// The user's name.
    pub name: String,
    /// The device's database.
    pub uid: DeviceUid,
    /// The device's class.
    pub class: DeviceClass,
    /// The epoch the device thinks it has; 0 for none.
    pub epoch: Epoch,
    /// Receive cursors it says have changed.
    pub changed: Vec<(ConversationId, Seq)>,
}

/// The device is known now.
#[derive(Clone, Debug)]
pub struct LoggedIn {
    /// The user.
    pub user: UserId,
    /// The device.
    pub device: DeviceId,
    /// The epoch to send under.
    pub epoch: Epoch,
    /// The login the session belongs to.
    pub class_epoch: ClassEpoch,
    /// The device was not known before, or had lost its state.
    pub fresh: bool,
    /// The user came into being by this.
    pub new_user: bool,
    /// The digest over what the gateway knows of the device's receive cursors, those it says have changed being as it says.
    /// `None`: it is to be made from all of them ([`Command::KnownCursors`]).
    pub digest: Option<CursorDigest>,
}

/// What a shard knows of a device's receive cursors.
#[derive(Clone, Debug)]
pub struct KnownCursors {
    /// The cursors that were asked for, where there is one; of all, those that are not on disk yet.
    pub cursors: Vec<(ConversationId, Seq)>,
    /// How often one of the device's cursors has moved.
    pub moves: u64,
}

/// The direct conversation of two users is asked for.
#[derive(Clone, Debug)]
pub struct DirectRequest {
    /// The app.
    pub app: AppId,
    /// Who asks.
    pub user: (UserId, String),
    /// With whom.
    pub peer: (UserId, String),
}

/// A group is asked for.
#[derive(Clone, Debug)]
pub struct GroupRequest {
    /// The app.
    pub app: AppId,
    /// Its name.
    pub name: String,
    /// Who asks.
    pub owner: (UserId, String),
    /// The first members besides.
    pub members: Vec<(UserId, String)>,
}

/// Members are to be added or removed.
#[derive(Clone, Debug)]
pub struct MembersRequest {
    /// The app.
    pub app: AppId,
    /// The conversation.
    pub conversation: ConversationId,
    /// Who asks.
    pub by: UserId,
    /// Whom to add.
    pub add: Vec<(UserId, String)>,
    /// Whom to remove.
    pub remove: Vec<(UserId, String)>,
}

/// A conversation as a member sees it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its number.
    pub conversation: ConversationId,
    /// What it is.
    pub meta: ConversationMeta,
    /// How far it has come on disk.
    pub head: Head,
    /// How far its members have come, if it is small enough for receipts.
    pub progress: Vec<(UserId, super::state::Progress)>,
    /// The asker's membership.
    pub member: Member,
    /// How far the asker has read.
    pub read: Seq,
    /// The last settled pseq of the asker's producer.
    pub last_pseq: Pseq,
}

/// What can be asked of a shard. Answers come after what they say is on disk.
#[derive(Debug)]
pub enum Command {
    /// A send; its fate is told to the session.
    Send {
        /// The session.
        session: Arc<Owed>,
        /// The session's app.
        app: AppId,
        /// Who sends.
        producer: Producer,
        /// What.
        send: frame::Send,
    },
    /// Lets a device in (user's shard).
    Login(LoginRequest, Answer<LoggedIn>),
    /// The number of a user, handed out if `create` (user's shard).
    User {
        /// The app.
        app: AppId,
        /// The user's name.
        name: String,
        /// Whether a name never heard of gets a number.
        create: bool,
        /// The number.
        answer: Answer<UserId>,
    },
    /// Looks up or makes the direct conversation of two users (its name's shard).
    Direct(DirectRequest, Answer<(ConversationId, Vec<PendingLink>)>),
    /// Looks up a group by name (its name's shard).
    GroupByName {
        /// The app.
        app: AppId,
        /// Its name.
        name: String,
        /// Its number.
        answer: Answer<ConversationId>,
    },
    /// Looks up a broadcast by name, or makes it (its name's shard).
    Broadcast {
        /// The app.
        app: AppId,
        /// Its name.
        name: String,
        /// Who counts as its maker.
        owner: UserId,
        /// Its number.
        answer: Answer<ConversationId>,
    },
    /// All broadcasts of the gateway.
    Broadcasts(Arc<Broadcasts>),
    /// Makes a group, or finds the one the owner made before (its name's shard).
    Group(GroupRequest, Answer<(ConversationId, Vec<PendingLink>)>),
    /// Adds or removes members (conversation's shard): how many changed, the record's seq, and what is owed to the users' shards.
    Members(MembersRequest, Answer<(u32, Seq, Vec<PendingLink>)>),
    /// A conversation as a member sees it (conversation's shard).
    Find {
        /// The app.
        app: AppId,
        /// Which.
        conversation: ConversationId,
        /// Who asks.
        producer: Producer,
        /// What is found.
        answer: Answer<Found>,
    },
    /// A user's list follows a change of members (user's shard).
    Link(PendingLink, Answer<()>),
    /// The user's list has followed (conversation's shard).
    LinkDone {
        /// The conversation.
        conversation: ConversationId,
        /// The user.
        user: UserId,
    },
    /// A session arrived. Answers in which conversations of the shard the device may lack something; `None`: in any.
    Arrive(Arc<Owed>, oneshot::Sender<Option<Vec<ConversationId>>>),
    /// A session that arrived counts for others from now on: on its user's shard older connections of the same device are
    /// ended.
    Confirm(Arc<Owed>),
    /// A session left.
    Depart(Arc<Owed>),
    /// A device's cursors in some conversations, or (`None`) those in any that are not on disk yet (user's shard). What is
    /// not among these is on disk by now.
    KnownCursors {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// Where.
        of: Option<Vec<ConversationId>>,
        /// What is known.
        answer: Answer<KnownCursors>,
    },
    /// The digest over all cursors of a device as they were when they had moved so often (user's shard keeps it, if none has
    /// moved since).
    KeepDigest {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// The digest.
        digest: CursorDigest,
        /// How often a cursor had moved.
        moves: u64,
    },
    /// A device has committed records (user's shard keeps the cursor).
    Cursors {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// Conversation and last record.
        entries: Vec<(ConversationId, Seq)>,
    },
    /// A device has committed records (conversation's shard tells the others).
    Received {
        /// The user.
        user: UserId,
        /// Conversation and last record.
        entries: Vec<(ConversationId, Seq)>,
    },
    /// The user has read.
    Mark {
        /// The session's app.
        app: AppId,
        /// The user.
        user: UserId,
        /// The conversation.
        conversation: ConversationId,
        /// The last record read.
        read: Seq,
    },
    /// Something that need not be stored, for whoever is here.
    Event {
        /// The session's app.
        app: AppId,
        /// What; `sender` is set.
        event: Event,
    },
    /// Which of these users are here.
    Online(Vec<UserId>, oneshot::Sender<Vec<bool>>),
    /// Which devices of a user are here (user's shard).
    DevicesHere(UserId, oneshot::Sender<Vec<DeviceId>>),
    /// Records up to and including `low` go, by retention (conversation's shard). Answers how many went.
    Trim {
        /// The conversation.
        conversation: ConversationId,
        /// The last record to go.
        low: Seq,
        /// Its `count`.
        count: u64,
        /// How many records went.
        answer: Answer<u64>,
    },
    /// Answers when everything asked before is on disk.
    Flush(Answer<()>),
}

impl Command {
    /// How much it is, in commands of which each reads a row or two.
    pub(super) fn work(&self) -> usize {
        match self {
            Self::Cursors { entries, .. } | Self::Received { entries, .. } => entries.len().max(1),
            Self::Login(request, _) => 1 + request.changed.len(),
            _ => 1,
        }
    }
}
