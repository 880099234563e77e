//! Reading a shard: cheap, synchronous, from any thread.
//!
//! - A read sees every commit that was acknowledged before it began. Two reads need not see the same commit.
//! - What can't be verified is [`ReadError::Damaged`], never a wrong answer.
//! - Warm reads touch memory only; cold ones read the disk and belong on a thread that may wait.
//!
//! Not here: changing anything (`writer`).

use std::sync::{Arc, atomic::Ordering};

use fulmar_protocol::id::{
    AppId, ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Seq, ShardId, UserId,
};

use crate::{
    error::ReadError,
    key::{self, Key, Table},
    record::Record,
    row::{
        ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, Number, PendingLink,
        User,
    },
    shard::{Shared, view::Limits},
};

/// Reads one shard.
#[derive(Clone, Debug)]
pub struct ShardReader {
    pub(crate) shared: Arc<Shared>,
}

impl ShardReader {
    /// The shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.shared.id
    }

    /// Hands out a number for a new user; each only once, also across restarts if it was committed
    /// ([`crate::Op::NameUser`]). `None` when they are used up.
    #[must_use]
    pub fn allocate_user(&self) -> Option<UserId> {
        let local = self.shared.users.fetch_add(1, Ordering::Relaxed).checked_add(1)?;
        UserId::new(self.shared.id.number(local)?)
    }

    /// Hands out a number for a new conversation; each only once, also across restarts if it was committed
    /// ([`crate::Op::NameConversation`]). `None` when they are used up.
    #[must_use]
    pub fn allocate_conversation(&self) -> Option<ConversationId> {
        let local = self.shared.conversations.fetch_add(1, Ordering::Relaxed).checked_add(1)?;
        ConversationId::new(self.shared.id.number(local)?)
    }

    // ---- the log of a conversation

    /// Where the log of `conversation` stands; `None` if nothing ever happened in it.
    ///
    /// # Errors
    /// Damage, or a failing engine. So with every method here.
    pub fn head(&self, conversation: ConversationId) -> Result<Option<Head>, ReadError> {
        self.shared.view.head(conversation)
    }

    /// What the conversation is; `None` if there is none of this number.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn meta(&self, conversation: ConversationId) -> Result<Option<ConversationMeta>, ReadError> {
        self.shared.view.row(Table::Conversation, &Key::conversation(conversation))
    }

    /// Records `from..=to`, ascending, without a gap. Fewer than asked for: those after the head or beyond the limits are
    /// not there, those up to the head's `low` are gone.
    ///
    /// # Errors
    /// As [`Self::head`]; damage anywhere in the range refuses the whole answer and names the first seq that is affected.
    pub fn records(
        &self,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
        limits: Limits,
    ) -> Result<Vec<Record>, ReadError> {
        self.shared.view.records(conversation, from, to, limits)
    }

    /// The newest records before `before`, ascending, without a gap.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn records_before(
        &self,
        conversation: ConversationId,
        before: Seq,
        limits: Limits,
    ) -> Result<Vec<Record>, ReadError> {
        self.shared.view.records_before(conversation, before, limits)
    }

    /// One record; `None` if it is not written yet, or gone.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn record(&self, conversation: ConversationId, seq: Seq) -> Result<Option<Record>, ReadError> {
        let one = Limits { records: 1, bytes: usize::MAX };
        let records = self.shared.view.records(conversation, seq, seq, one)?;
        Ok(records.into_iter().next().filter(|record| record.seq == seq))
    }

    /// How many countable messages lie in the log up to and including `seq`; what retention took counts as well.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn count_at(&self, conversation: ConversationId, seq: Seq) -> Result<u64, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(0) };
        if seq <= head.low {
            return Ok(head.low_count);
        }
        if seq >= head.seq {
            return Ok(head.count);
        }
        Ok(self.record(conversation, seq)?.map_or(head.low_count, |record| record.count))
    }

    /// The lane of one device.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn lane(
        &self,
        conversation: ConversationId,
        user: UserId,
        device: DeviceId,
    ) -> Result<Option<LaneState>, ReadError> {
        self.shared.view.lane(conversation, user, device)
    }

    /// Lanes of a conversation in order of (user, device), after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn lanes(
        &self,
        conversation: ConversationId,
        after: Option<(UserId, DeviceId)>,
        limit: usize,
    ) -> Result<Vec<(UserId, DeviceId, LaneState)>, ReadError> {
        self.shared.view.lanes(conversation, after, limit)
    }

    // ---- beside the log, in the conversation's shard

    /// A membership.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn member(&self, conversation: ConversationId, user: UserId) -> Result<Option<Member>, ReadError> {
        self.shared.view.row(Table::Member, &Key::conversation_user(conversation, user))
    }

    /// Members in order of their numbers, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn members(
        &self,
        conversation: ConversationId,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<Vec<(UserId, Member)>, ReadError> {
        let prefix = Key::conversation(conversation);
        let after = after.map(|user| Key::conversation_user(conversation, user));
        self.listed(Table::Member, &prefix, after, limit, 1)
    }

    /// How many members there are.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn member_count(&self, conversation: ConversationId) -> Result<u64, ReadError> {
        Ok(self.head(conversation)?.map_or(0, |head| head.members))
    }

    /// How far a user has read; `Seq::ZERO` if nothing.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn read_cursor(&self, conversation: ConversationId, user: UserId) -> Result<Seq, ReadError> {
        self.seq(Table::Read, &Key::conversation_user(conversation, user))
    }

    /// Read cursors of a conversation in order of users, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn read_cursors(
        &self,
        conversation: ConversationId,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<Vec<(UserId, Seq)>, ReadError> {
        let prefix = Key::conversation(conversation);
        let after = after.map(|user| Key::conversation_user(conversation, user));
        let rows: Vec<(UserId, Number)> = self.listed(Table::Read, &prefix, after, limit, 1)?;
        rows.into_iter().map(|(user, seq)| Ok((user, self.as_id(seq)?))).collect()
    }

    /// The conversation called `name`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn conversation_by_name(
        &self,
        app: AppId,
        class: ConversationClass,
        name: &str,
    ) -> Result<Option<ConversationId>, ReadError> {
        self.id(Table::Name, &Key::name(app, key::kind_of(class), name))
    }

    /// Steps that this shard's conversations still owe to users' lists, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn pending_links(
        &self,
        after: Option<(ConversationId, UserId)>,
        limit: usize,
    ) -> Result<Vec<PendingLink>, ReadError> {
        let after = after.map(|(conversation, user)| Key::conversation_user(conversation, user));
        let rows: Vec<(Vec<u8>, PendingLink)> =
            self.shared.view.list(Table::Link, &[], after.as_ref().map(AsRef::as_ref), limit)?;
        Ok(rows.into_iter().map(|(_, link)| link).collect())
    }

    // ---- in the user's shard

    /// A user.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn user(&self, user: UserId) -> Result<Option<User>, ReadError> {
        self.shared.view.row(Table::User, &Key::user(user))
    }

    /// The user called `name`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn user_by_name(&self, app: AppId, name: &str) -> Result<Option<UserId>, ReadError> {
        self.id(Table::Name, &Key::name(app, key::KIND_USER, name))
    }

    /// A conversation of a user's list.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn user_conversation(
        &self,
        user: UserId,
        conversation: ConversationId,
    ) -> Result<Option<Listed>, ReadError> {
        self.shared.view.row(Table::Listed, &Key::user_conversation(user, conversation))
    }

    /// A user's list in order of conversation numbers, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn user_conversations(
        &self,
        user: UserId,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<(ConversationId, Listed)>, ReadError> {
        let after = after.map(|conversation| Key::user_conversation(user, conversation));
        self.listed(Table::Listed, &Key::user(user), after, limit, 1)
    }

    /// A device.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn device(&self, user: UserId, device: DeviceId) -> Result<Option<Device>, ReadError> {
        self.shared.view.row(Table::Device, &Key::device(user, device))
    }

    /// The device whose database calls itself `uid`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn device_by_uid(
        &self,
        user: UserId,
        uid: DeviceUid,
    ) -> Result<Option<(DeviceId, Device)>, ReadError> {
        let Some(device) = self.id(Table::Uid, &Key::uid(user, uid))? else { return Ok(None) };
        Ok(self.device(user, device)?.map(|row| (device, row)))
    }

    /// A user's devices in order of their numbers, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn devices(
        &self,
        user: UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Vec<(DeviceId, Device)>, ReadError> {
        let after = after.map(|device| Key::device(user, device));
        self.listed(Table::Device, &Key::user(user), after, limit, 1)
    }

    /// The login counter of a device class; zero if nobody ever logged in.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn class_epoch(&self, user: UserId, class: DeviceClass) -> Result<ClassEpoch, ReadError> {
        let epoch = self.id(Table::ClassEpoch, &Key::class_epoch(user, class))?;
        Ok(epoch.unwrap_or(ClassEpoch::ZERO))
    }

    /// How much of a conversation a device has; `Seq::ZERO` if nothing.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn recv_cursor(
        &self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
    ) -> Result<Seq, ReadError> {
        self.seq(Table::Recv, &Key::recv(user, device, conversation))
    }

    /// A device's cursors in order of conversation numbers, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn recv_cursors(
        &self,
        user: UserId,
        device: DeviceId,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<(ConversationId, Seq)>, ReadError> {
        let prefix = Key::device(user, device);
        let after = after.map(|conversation| Key::recv(user, device, conversation));
        let rows: Vec<(ConversationId, Number)> = self.listed(Table::Recv, &prefix, after, limit, 2)?;
        rows.into_iter().map(|(conversation, seq)| Ok((conversation, self.as_id(seq)?))).collect()
    }

    // ---- how

    fn listed<T: TryFrom<u64>, R: crate::row::Row>(
        &self,
        table: Table,
        prefix: &Key,
        after: Option<Key>,
        limit: usize,
        id_at: usize,
    ) -> Result<Vec<(T, R)>, ReadError> {
        let view = &self.shared.view;
        let rows = view.list(table, prefix.as_ref(), after.as_ref().map(AsRef::as_ref), limit)?;
        rows.into_iter().map(|(key, row)| Ok((view.id_at(&key, id_at)?, row))).collect()
    }

    fn id<T: TryFrom<u64>>(&self, table: Table, key: &Key) -> Result<Option<T>, ReadError> {
        let number: Option<Number> = self.shared.view.row(table, key)?;
        number.map(|number| self.as_id(number)).transpose()
    }

    pub(crate) fn as_id<T: TryFrom<u64>>(&self, number: Number) -> Result<T, ReadError> {
        T::try_from(number.0)
            .map_err(|_| self.shared.view.damaged(None, None, crate::codec::Malformed("number row")))
    }

    fn seq(&self, table: Table, key: &Key) -> Result<Seq, ReadError> {
        Ok(self.id(table, key)?.unwrap_or(Seq::ZERO))
    }
}
