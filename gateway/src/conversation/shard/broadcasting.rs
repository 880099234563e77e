//! Broadcasts: found or made at the start, then told to all shards.
//!
//! Not here: who is told of a record and when (`fanout::broadcast`).

use std::sync::Arc;

use fulmar_protocol::{
    close::RefusalCode,
    id::{AppId, ConversationId, UserId},
};
use fulmar_store::ConversationClass;
use tracing::error;

use super::{Shard, ShardHandle};
use crate::{
    broadcasts::{Broadcast, Broadcasts},
    config::{AppConfig, BroadcastConfig},
    conversation::{
        command::{Command, Refusal},
        route::{Named, Route},
    },
};

impl Shard {
    pub(super) fn broadcast(
        &mut self,
        app: AppId,
        name: &str,
        owner: UserId,
    ) -> Result<ConversationId, Refusal> {
        let found = self.directory.conversation(app, ConversationClass::Broadcast, name);
        if let Some(found) = self.read(found)? {
            return Ok(found);
        }
        self.create(app, ConversationClass::Broadcast, name.to_owned(), owner, &[])
            .map(|(conversation, _)| conversation)
    }

    pub(super) fn broadcasts(&mut self, broadcasts: Arc<Broadcasts>) {
        for (conversation, broadcast) in broadcasts.iter() {
            if conversation.shard() == self.id {
                self.broadcasting.serve(broadcast.app, conversation);
                if let Some(loaded) = self.loaded.get_mut(&conversation) {
                    loaded.state.open_to_all(broadcast.writers.clone());
                }
            }
        }
        self.broadcasts = broadcasts;
    }
}

/// Finds the broadcasts of the apps, makes those that are new, and tells all shards. To be called before anybody connects. What
/// can't be made now is logged, and not served until the next start.
pub async fn open_broadcasts(apps: &[AppConfig], shards: &[ShardHandle], route: Route) -> Arc<Broadcasts> {
    let mut broadcasts = Broadcasts::default();
    for app in apps {
        let id = AppId::of(&app.name);
        for config in &app.broadcasts {
            match open_broadcast(id, config, shards, route).await {
                Ok((conversation, broadcast)) => broadcasts.insert(conversation, broadcast),
                Err(refusal) => error!(
                    app = app.name,
                    broadcast = config.name,
                    "the broadcast can't be made, and is not served until the next start: {}",
                    refusal.code.text()
                ),
            }
        }
    }
    let broadcasts = Arc::new(broadcasts);
    for shard in shards {
        // One that is gone serves nobody.
        let _ = shard.send(Command::Broadcasts(Arc::clone(&broadcasts))).await;
    }
    broadcasts
}

async fn open_broadcast(
    app: AppId,
    config: &BroadcastConfig,
    shards: &[ShardHandle],
    route: Route,
) -> Result<(ConversationId, Broadcast), Refusal> {
    let named = |kind, name: &str| {
        shards.get(route.name(app, kind, name)).ok_or(Refusal::new(RefusalCode::StorageUnavailable))
    };
    let mut writers = Vec::with_capacity(config.senders.len());
    for name in &config.senders {
        let (shard, name) = (named(Named::User, name)?, name.clone());
        writers.push(shard.ask(|answer| Command::User { app, name, create: true, answer }).await?);
    }
    let owner = writers.first().copied().ok_or(RefusalCode::UnknownUser)?;
    let (shard, name) = (named(Named::Broadcast, &config.name)?, config.name.clone());
    let conversation = shard.ask(|answer| Command::Broadcast { app, name, owner, answer }).await?;
    let writers = writers.into_iter().collect();
    Ok((conversation, Broadcast { app, name: config.name.clone(), writers }))
}
