//! How far devices have received and users have read: kept a while in memory, written with the commits of others.
//!
//! - Cursors only move forward, so they may wait, and wait again when a commit failed. So many of each do.
//!
//! Not here: what a device lacks (`receipt`).

use std::collections::HashMap;

use fulmar_protocol::{
    frame::Receipt,
    id::{AppId, ConversationId, DeviceId, Seq, UserId},
};
use fulmar_store::Op;

use super::{CURSORS_WAITING_MAX, Shard};
use crate::{conversation::state::Progress, ground::now};

impl Shard {
    /// Puts cursors that wait into the batch: all of them when they are due, else only if there is room to spare.
    pub(super) fn add_cursors(&mut self, due: bool) {
        let enough = self.cursors.len() + self.reads.len() >= CURSORS_WAITING_MAX;
        if !(due || enough) || self.storage.admits(self.batch.ops.is_empty(), now()).is_err() {
            return;
        }
        for ((conversation, user), seq) in std::mem::take(&mut self.reads) {
            self.batch.push(Op::Read { conversation, user, seq });
        }
        let mut rest = HashMap::new();
        for ((user, device, conversation), seq) in std::mem::take(&mut self.cursors) {
            if self.batch.has_room() {
                self.batch.push(Op::Recv { user, device, conversation, seq });
            } else {
                rest.insert((user, device, conversation), seq);
            }
        }
        self.cursors_since = if rest.is_empty() { None } else { Some(now()) };
        self.cursors = rest;
    }

    /// A received-cursor waits for a commit. While the log can't be written only so many do: the device's own is the
    /// truth.
    pub(super) fn wait_received(
        &mut self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
        seq: Seq,
    ) {
        let key = (user, device, conversation);
        if self.cursors.len() >= CURSORS_WAITING_MAX && !self.cursors.contains_key(&key) {
            return;
        }
        let known = self.cursors.entry(key).or_default();
        *known = (*known).max(seq);
        self.cursors_since.get_or_insert_with(now);
    }

    /// A read-cursor waits for a commit, within the same bound.
    pub(super) fn wait_read(&mut self, conversation: ConversationId, user: UserId, seq: Seq) {
        let key = (conversation, user);
        if self.reads.len() >= CURSORS_WAITING_MAX && !self.reads.contains_key(&key) {
            return;
        }
        let known = self.reads.entry(key).or_default();
        *known = (*known).max(seq);
        self.cursors_since.get_or_insert_with(now);
    }

    /// Whether a device's cursor is worth keeping: for the conversations of its user, and those it once was in. What
    /// is not kept is asked for at the next resume, and a client that makes conversations up fills no disk.
    pub(super) fn keeps_cursor(&self, user: UserId, device: DeviceId, conversation: ConversationId) -> bool {
        self.cursors.contains_key(&(user, device, conversation))
            || self.reader.user_conversation(user, conversation).is_ok_and(|listed| listed.is_some())
            || self.reader.recv_cursor(user, device, conversation).is_ok_and(|seq| seq != Seq::ZERO)
    }

    pub(super) fn mark(&mut self, app: AppId, user: UserId, conversation: ConversationId, read: Seq) {
        let Ok(loaded) = self.load(app, conversation) else { return };
        if loaded.state.member(user).is_none() {
            return;
        }
        let read = read.min(loaded.state.head().seq);
        self.wait_read(conversation, user, read);
        self.progressed(conversation, user, Seq::ZERO, read);
    }

    /// Tells the others of a small conversation how far a member has come, if that is news.
    pub(super) fn progressed(&mut self, conversation: ConversationId, user: UserId, recv: Seq, read: Seq) {
        let Some(loaded) = self.loaded.get_mut(&conversation) else { return };
        if loaded.state.member_count() > self.limits.receipts_members_max {
            return;
        }
        let Some(Progress { recv, read }) = loaded.state.progressed(user, recv, read) else { return };
        let receipt = Receipt { conversation, user, recv, read };
        for session in self.roster.present(conversation) {
            session.receipt(receipt);
        }
    }
}
