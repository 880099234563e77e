//! What connections and services share: the shards and the way to them, who checks proofs, what counts.
//!
//! - Built once by `gateway`, then only read; everything in it is shared by reference.
//!
//! Not here: anything of one connection.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use fulmar_protocol::{
    close::RefusalCode,
    id::{AppId, ConversationId, FolderId, UserId},
};

use tokio::sync::Semaphore;

use crate::{
    broadcasts::Broadcasts,
    config::Config,
    conversation::{
        Refusal,
        route::{Named, Route},
        shard::ShardHandle,
    },
    drain::Drain,
    identity::{ticket::Tickets, token::Verifier},
    metrics::Metrics,
    telemetry::Complaints,
};

/// Resumes that look at all conversations of their users at once; each takes a thread while it reads.
pub const LOOKS_AT_ONCE: usize = 8;

/// What all connections share.
#[derive(Debug)]
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// The shards, by number.
    pub shards: Vec<ShardHandle>,
    /// Which shard owns what.
    pub route: Route,
    /// What everybody of an app reads.
    pub broadcasts: Arc<Broadcasts>,
    /// Checks tokens.
    pub verifier: Verifier,
    /// Seals and opens tickets.
    pub tickets: Tickets,
    /// What the data folder calls itself.
    pub folder: FolderId,
    /// Counts.
    pub metrics: Metrics,
    /// Says once what hostile input is wrong.
    pub complaints: Complaints,
    /// Learns when the gateway leaves.
    pub drain: Drain,
    /// Who looks at all conversations of its user; the others wait for their turn.
    pub looks: Semaphore,
    /// Numbers connections and sessions; starts at a random place, so that numbers of two runs differ.
    pub numbers: AtomicU64,
}

impl Context {
    /// A number no other connection of this run has.
    pub fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether an app takes users it never heard of.
    #[must_use]
    pub fn takes_new_users(&self, app: AppId) -> bool {
        self.config.apps.iter().any(|config| AppId::of(&config.name) == app && config.open_users)
    }

    /// The shard of a conversation.
    ///
    /// # Errors
    /// The number is of no shard of this gateway.
    pub fn conversation(&self, conversation: ConversationId) -> Result<&ShardHandle, Refusal> {
        let shard = self.route.conversation(conversation).and_then(|shard| self.shards.get(shard));
        shard.ok_or(Refusal::new(RefusalCode::UnknownConversation))
    }

    /// The shard of a user.
    ///
    /// # Errors
    /// The number is of no shard of this gateway.
    pub fn user(&self, user: UserId) -> Result<&ShardHandle, Refusal> {
        let shard = self.route.user(user).and_then(|shard| self.shards.get(shard));
        shard.ok_or(Refusal::new(RefusalCode::UnknownUser))
    }

    /// The broadcast of this name.
    ///
    /// # Errors
    /// [`RefusalCode::UnknownConversation`].
    pub fn broadcast(&self, app: AppId, name: &str) -> Result<ConversationId, Refusal> {
        self.broadcasts.named(app, name).ok_or(Refusal::new(RefusalCode::UnknownConversation))
    }

    /// The shard that owns a name.
    ///
    /// # Errors
    /// Never for a gateway with shards.
    pub fn named(&self, app: AppId, kind: Named, name: &str) -> Result<&ShardHandle, Refusal> {
        let shard = self.shards.get(self.route.name(app, kind, name));
        shard.ok_or(Refusal::new(RefusalCode::StorageUnavailable))
    }
}
