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
use fulmar_store::{Op, ShardReader};

use super::{CURSORS_WAITING_MAX, Shard};
use crate::{
    conversation::{
        command::{KnownCursors, Refusal},
        state::Progress,
    },
    ground::now,
};

/// Receive cursors that are not on disk yet, by device.
#[derive(Debug, Default)]
pub(super) struct WaitingCursors {
    devices: HashMap<(UserId, DeviceId), HashMap<ConversationId, Waiting>>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    seq: Seq,
    /// A batch that is not committed yet holds it.
    on_its_way: bool,
}

impl WaitingCursors {
    /// How many wait, those on their way included.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    fn get(&self, user: UserId, device: DeviceId, conversation: ConversationId) -> Option<Seq> {
        Some(self.devices.get(&(user, device))?.get(&conversation)?.seq)
    }

    fn of(&self, user: UserId, device: DeviceId) -> impl Iterator<Item = (ConversationId, Seq)> {
        let of_device = self.devices.get(&(user, device));
        of_device.into_iter().flatten().map(|(conversation, waiting)| (*conversation, waiting.seq))
    }

    /// `false`: there is no room.
    fn put(&mut self, user: UserId, device: DeviceId, conversation: ConversationId, seq: Seq) -> bool {
        let of_device = self.devices.entry((user, device)).or_default();
        if !of_device.contains_key(&conversation) {
            if self.len >= CURSORS_WAITING_MAX {
                if of_device.is_empty() {
                    self.devices.remove(&(user, device));
                }
                return false;
            }
            self.len += 1;
        }
        of_device.insert(conversation, Waiting { seq, on_its_way: false });
        true
    }

    /// A commit holds this one: it waits no longer, unless it has moved meanwhile.
    pub(super) fn committed(
        &mut self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
        seq: Seq,
    ) {
        let Some(of_device) = self.devices.get_mut(&(user, device)) else { return };
        if of_device.get(&conversation).is_some_and(|waiting| waiting.seq <= seq) {
            of_device.remove(&conversation);
            self.len -= 1;
            if of_device.is_empty() {
                self.devices.remove(&(user, device));
            }
        }
    }

    /// The batch that held this one is void.
    pub(super) fn void(&mut self, user: UserId, device: DeviceId, conversation: ConversationId) {
        let of_device = self.devices.get_mut(&(user, device));
        if let Some(waiting) = of_device.and_then(|of_device| of_device.get_mut(&conversation)) {
            waiting.on_its_way = false;
        }
    }
}

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
        let mut rest = false;
        for ((user, device), of_device) in &mut self.cursors.devices {
            for (conversation, waiting) in of_device.iter_mut().filter(|(_, waiting)| !waiting.on_its_way) {
                if self.batch.has_room() {
                    let (user, device, conversation, seq) = (*user, *device, *conversation, waiting.seq);
                    self.batch.push(Op::Recv { user, device, conversation, seq });
                    waiting.on_its_way = true;
                } else {
                    rest = true;
                }
            }
        }
        self.cursors_since = if rest { Some(now()) } else { None };
    }

    /// A device has committed records up to `seq`: its cursor waits for a commit, if it is worth keeping (for the
    /// conversations of its user, and those it once was in). What is not kept is asked for at the next resume, and a client
    /// that makes conversations up fills no disk.
    pub(super) fn received(
        &mut self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
        seq: Seq,
    ) {
        let known = match self.cursors.get(user, device, conversation) {
            Some(waiting) => Ok(waiting),
            None => self.reader.recv_cursor(user, device, conversation),
        };
        let listed = |reader: &ShardReader| {
            self.broadcasts.get(conversation).is_some()
                || reader.user_conversation(user, conversation).is_ok_and(|listed| listed.is_some())
        };
        match known {
            Ok(known) if seq <= known => {}
            Ok(known) if known != Seq::ZERO || listed(&self.reader) => {
                if self.cursors.put(user, device, conversation, seq) {
                    self.cursors_since.get_or_insert_with(now);
                    self.roster.cursor_moved(user, device, conversation, known, seq);
                } else {
                    // While the log can't be written only so many wait: the device's own is the truth.
                    self.roster.forget_digest(user, device);
                }
            }
            Ok(_) => {}
            Err(_) => self.roster.forget_digest(user, device),
        }
    }

    /// What is known of a device's cursors: in some conversations, or of all those that are not on disk yet.
    pub(super) fn known_cursors(
        &mut self,
        user: UserId,
        device: DeviceId,
        of: Option<Vec<ConversationId>>,
    ) -> Result<KnownCursors, Refusal> {
        let cursors = match of {
            None => self.cursors.of(user, device).collect(),
            Some(of) => {
                let mut cursors = Vec::with_capacity(of.len());
                for conversation in of {
                    let seq = self.known_cursor(user, device, conversation)?;
                    if seq != Seq::ZERO {
                        cursors.push((conversation, seq));
                    }
                }
                cursors
            }
        };
        Ok(KnownCursors { cursors, moves: self.roster.digest(user, device).1 })
    }

    pub(super) fn known_cursor(
        &mut self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
    ) -> Result<Seq, Refusal> {
        if let Some(waiting) = self.cursors.get(user, device, conversation) {
            return Ok(waiting);
        }
        let on_disk = self.reader.recv_cursor(user, device, conversation);
        self.read(on_disk)
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
        let before = loaded.state.progress(user).unwrap_or_default();
        let Some(Progress { recv, read }) = loaded.state.progressed(user, recv, read) else { return };
        let receipt = Receipt { conversation, user, recv, read };
        for session in self.roster.present(conversation) {
            // What one device has received is no news to the user's others, what was read there is.
            if session.user != user || read > before.read {
                session.receipt(receipt);
            }
        }
    }
}
