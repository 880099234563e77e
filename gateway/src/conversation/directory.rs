//! Names, numbers and devices of one shard, with what is decided but not on disk yet laid over what is.
//!
//! - A name gets one number: whoever asks while the commit is under way gets the same one.
//! - Numbers are handed out once; one whose commit failed is skipped.

use std::collections::HashMap;

use fulmar_protocol::id::{AppId, ConversationId, DeviceId, DeviceUid, UserId};
use fulmar_store::{ConversationClass, ConversationMeta, Device, ReadError, ShardReader, User};

/// Devices looked at at a time.
const DEVICES_PAGE: usize = 64;

#[derive(Debug, Default)]
struct Overlay {
    users: HashMap<(AppId, String), UserId>,
    conversations: HashMap<(AppId, u8, String), ConversationId>,
    devices: HashMap<(UserId, DeviceUid), (DeviceId, Device)>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Directory {
    reader: ShardReader,
    /// Decided for the batch that is being filled.
    filling: Overlay,
    /// Decided for the batch that is on its way to disk.
    committing: Overlay,
}

impl Directory {
    pub(super) fn new(reader: ShardReader) -> Self {
        Self { reader, filling: Overlay::default(), committing: Overlay::default() }
    }

    /// The batch that was being filled goes to disk.
    pub(super) fn batch_started(&mut self) {
        self.committing = std::mem::take(&mut self.filling);
    }

    /// The batch is on disk.
    pub(super) fn batch_committed(&mut self) {
        self.committing = Overlay::default();
    }

    /// The batch, and what was decided after it, is lost.
    pub(super) fn batch_failed(&mut self) {
        self.committing = Overlay::default();
        self.filling = Overlay::default();
    }

    /// What was decided about one conversation is lost.
    pub(super) fn forget(&mut self, conversation: ConversationId) {
        for overlay in [&mut self.filling, &mut self.committing] {
            overlay.conversations.retain(|_, known| *known != conversation);
        }
    }

    pub(super) fn user(&self, app: AppId, name: &str) -> Result<Option<UserId>, ReadError> {
        let key = (app, name.to_owned());
        if let Some(user) = self.filling.users.get(&key).or_else(|| self.committing.users.get(&key)) {
            return Ok(Some(*user));
        }
        self.reader.user_by_name(app, name)
    }

    /// A number for a user that has none.
    pub(super) fn name_user(&mut self, row: &User) -> Option<UserId> {
        let user = self.reader.allocate_user()?;
        self.filling.users.insert((row.app, row.name.clone()), user);
        Some(user)
    }

    pub(super) fn conversation(
        &self,
        app: AppId,
        class: ConversationClass,
        name: &str,
    ) -> Result<Option<ConversationId>, ReadError> {
        let key = (app, class as u8, name.to_owned());
        let overlays = [&self.filling, &self.committing];
        if let Some(found) = overlays.into_iter().find_map(|overlay| overlay.conversations.get(&key)) {
            return Ok(Some(*found));
        }
        self.reader.conversation_by_name(app, class, name)
    }

    /// A number for a conversation that has none.
    pub(super) fn name_conversation(&mut self, meta: &ConversationMeta) -> Option<ConversationId> {
        let conversation = self.reader.allocate_conversation()?;
        self.filling.conversations.insert((meta.app, meta.class as u8, meta.name.clone()), conversation);
        Some(conversation)
    }

    pub(super) fn device(
        &self,
        user: UserId,
        uid: DeviceUid,
    ) -> Result<Option<(DeviceId, Device)>, ReadError> {
        let key = (user, uid);
        let overlays = [&self.filling, &self.committing];
        if let Some(found) = overlays.into_iter().find_map(|overlay| overlay.devices.get(&key)) {
            return Ok(Some(*found));
        }
        self.reader.device_by_uid(user, uid)
    }

    /// The number the user's next device gets.
    pub(super) fn next_device(&self, user: UserId) -> Result<Option<DeviceId>, ReadError> {
        let mut last = DeviceId::ZERO;
        while let Some((device, _)) = self.reader.devices(user, Some(last), DEVICES_PAGE)?.last() {
            last = *device;
        }
        let decided = [&self.filling, &self.committing]
            .into_iter()
            .flat_map(|overlay| &overlay.devices)
            .filter(|((of, _), _)| *of == user)
            .map(|(_, (device, _))| *device);
        Ok(decided.max().unwrap_or(last).max(last).next())
    }

    pub(super) fn put_device(&mut self, user: UserId, device: DeviceId, row: Device) {
        self.filling.devices.insert((user, row.uid), (device, row));
    }
}
