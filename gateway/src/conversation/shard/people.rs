//! Users, their devices and conversations: who is let in, what is found by name, who joins and leaves.
//!
//! - Whoever is known is found without a write; a write is asked for before anything is decided.
//!
//! Not here: what a change of members says (`state`), names that are not on disk yet (`directory`).

use std::{collections::HashMap, sync::Arc};

use fulmar_protocol::{
    close::RefusalCode,
    id::{AppId, ConversationId, Producer, Seq, UserId},
};
use fulmar_store::{ConversationClass, Device, Op, PendingLink, User};

use super::{Loaded, Shard};
use crate::{
    conversation::{
        command::{DirectRequest, Found, GroupRequest, LoggedIn, LoginRequest, MembersRequest, Refusal},
        commit::Effect,
        state::{self, MembersChange, State},
    },
    fanout::ring::Ring,
    ground::{now as monotonic, unix_now},
};

impl Shard {
    pub(super) fn login(&mut self, request: &LoginRequest) -> Result<LoggedIn, Refusal> {
        let now = unix_now();
        let before = self.batch.ops.len();
        let user = self.user(request.app, &request.name, true)?;
        let new_user = self.batch.ops.len() > before;
        let known = self.directory.device(user, request.uid);
        let known = self.read(known)?;
        let class_epoch = self.reader.class_epoch(user, request.class);
        let class_epoch = self.read(class_epoch)?;
        let (device, mut row, fresh) = match known {
            Some((device, row)) => (device, row, row.epoch != request.epoch),
            None => {
                self.writable()?;
                let next = self.directory.next_device(user);
                let device = self.read(next)?.ok_or(RefusalCode::StorageFull)?;
                let row = Device {
                    uid: request.uid,
                    class: request.class,
                    // Another one than the HELLO names: what was numbered under that is of another folder, or of a time this one
                    // has lost.
                    epoch: request.epoch,
                    class_epoch,
                    seen: now,
                };
                (device, row, true)
            }
        };
        let again = self.recent_epochs.given((user, request.uid), request.epoch, monotonic());
        let renewed = fresh && again != Some(row.epoch);
        if renewed {
            self.writable()?;
            row.epoch = row.epoch.saturating_add(1);
            self.recent_epochs.give((user, request.uid), request.epoch, row.epoch, monotonic());
        }
        // A device that comes back writes nothing, but for an hourly note of when it was seen, which can wait.
        let note = row.class != request.class || now.get().saturating_sub(row.seen.get()) > 3_600_000;
        if renewed || (note && !self.storage.is_failing()) {
            row.seen = now;
            row.class = request.class;
            self.directory.put_device(user, device, row);
            self.batch.push(Op::Device { user, device, row });
        }
        let clock = self.clock();
        self.roster.expect(user, device, clock);
        let mut digest = None;
        if fresh {
            self.roster.start_over(user, device);
        } else if let (Some(mut known), _) = self.roster.digest(user, device) {
            let changed: HashMap<ConversationId, Seq> = request.changed.iter().copied().collect();
            for (conversation, seq) in changed {
                known.moved(conversation, self.known_cursor(user, device, conversation)?, seq);
            }
            digest = Some(known);
        }
        Ok(LoggedIn { user, device, epoch: row.epoch, class_epoch, fresh, new_user, digest })
    }

    pub(super) fn user(&mut self, app: AppId, name: &str, create: bool) -> Result<UserId, Refusal> {
        let found = self.directory.user(app, name);
        if let Some(user) = self.read(found)? {
            return Ok(user);
        }
        if !create {
            return Err(RefusalCode::UnknownUser.into());
        }
        self.writable()?;
        let row = User { app, name: name.to_owned(), created: unix_now() };
        let user = self.directory.name_user(&row).ok_or(RefusalCode::StorageFull)?;
        self.batch.push(Op::NameUser { user, row });
        Ok(user)
    }

    pub(super) fn direct(
        &mut self,
        request: &DirectRequest,
    ) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        let name = state::direct_name(request.user.0, request.peer.0);
        let found = self.directory.conversation(request.app, ConversationClass::Direct, &name);
        if let Some(found) = self.read(found)? {
            return Ok((found, Vec::new()));
        }
        let owner = request.user.0;
        let mut members = vec![request.user.clone()];
        if request.peer.0 != owner {
            members.push(request.peer.clone());
        }
        self.create(request.app, ConversationClass::Direct, name, owner, &members)
    }

    pub(super) fn group(
        &mut self,
        request: &GroupRequest,
    ) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        let found = self.directory.conversation(request.app, ConversationClass::Group, &request.name);
        let owner = request.owner.0;
        if let Some(found) = self.read(found)? {
            let loaded = self.load(request.app, found)?;
            let mine = loaded.state.meta().creator == owner;
            return if mine { Ok((found, Vec::new())) } else { Err(RefusalCode::NameTaken.into()) };
        }
        let mut members = vec![request.owner.clone()];
        for member in &request.members {
            if !members.iter().any(|(user, _)| *user == member.0) {
                members.push(member.clone());
            }
        }
        self.create(request.app, ConversationClass::Group, request.name.clone(), owner, &members)
    }

    pub(super) fn create(
        &mut self,
        app: AppId,
        class: ConversationClass,
        name: String,
        owner: UserId,
        members: &[(UserId, String)],
    ) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        self.writable()?;
        let now = unix_now();
        let meta = state::meta(app, class, name, owner, now);
        let id = self.directory.name_conversation(&meta).ok_or(RefusalCode::StorageFull)?;
        let creation = State::create(id, meta, owner, members, now);
        self.tick += 1;
        let ring = Arc::new(Ring::new(self.limits.ring));
        self.roster.load(id, [].into_iter());
        self.loaded.insert(id, Loaded { state: creation.state, ring, inline: true, used: self.tick });
        Ok((id, self.put_change(id, creation.change)))
    }

    pub(super) fn put_change(
        &mut self,
        conversation: ConversationId,
        change: MembersChange,
    ) -> Vec<PendingLink> {
        let MembersChange { record, ops, links, joined, left } = change;
        self.batch.extend(ops);
        self.batch.effects.push(Effect::Publish { conversation, record, joined, left });
        links
    }

    pub(super) fn members(
        &mut self,
        request: &MembersRequest,
    ) -> Result<(u32, Seq, Vec<PendingLink>), Refusal> {
        let members_max = self.limits.members_max;
        self.writable()?;
        let loaded = self.load(request.app, request.conversation)?;
        let change =
            loaded.state.change(request.by, &request.add, &request.remove, members_max, unix_now())?;
        let Some(change) = change else { return Ok((0, Seq::ZERO, Vec::new())) };
        let changed = u32::try_from(change.joined.len() + change.left.len()).unwrap_or(u32::MAX);
        let seq = change.record.seq;
        Ok((changed, seq, self.put_change(request.conversation, change)))
    }

    pub(super) fn find(
        &mut self,
        app: AppId,
        conversation: ConversationId,
        producer: Producer,
    ) -> Result<Found, Refusal> {
        let member = self.load(app, conversation)?.state.member(producer.user).copied();
        let member = member.ok_or(RefusalCode::UnknownConversation)?;
        let on_disk = self.reader.read_cursor(conversation, producer.user);
        let on_disk = self.read(on_disk)?;
        let waiting = self.reads.get(&(conversation, producer.user)).copied().unwrap_or_default();
        let lane = self.reader.lane(conversation, producer.user, producer.device);
        let lane = self.read(lane)?;
        let receipts_members_max = self.limits.receipts_members_max;
        let loaded = self.load(app, conversation)?;
        loaded.state.restore_lane(producer.user, producer.device, lane);
        Ok(Found {
            conversation,
            meta: loaded.state.meta().clone(),
            // The answer leaves after the commit this state rests on.
            head: *loaded.state.head(),
            progress: if loaded.state.member_count() <= receipts_members_max {
                loaded.state.members().filter_map(|user| Some((user, loaded.state.progress(user)?))).collect()
            } else {
                Vec::new()
            },
            member,
            read: on_disk.max(waiting),
            last_pseq: loaded.state.last_pseq(producer),
        })
    }
}
