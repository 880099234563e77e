//! From a conversation's shard to the shards of its users: their lists follow, sooner or later.
//!
//! - A link stays on disk until both sides have it, so what could not follow is found again.

use fulmar_protocol::close::RefusalCode;
use fulmar_store::PendingLink;
use tracing::warn;

use super::ShardHandle;
use crate::{
    conversation::{
        command::{Command, Refusal},
        route::Route,
    },
    ground::blocking,
};

/// Links the repair asks for at a time.
const LINKS_PAGE: usize = 256;

/// Repairs what a crash or a failing log left half done: users' lists that don't follow their conversations yet. Looks
/// at everything that is owed once.
pub async fn repair_links(shards: &[ShardHandle], route: Route) {
    for shard in shards {
        let mut after = None;
        loop {
            let reader = shard.reader.clone();
            let pending = blocking(move || reader.pending_links(after, LINKS_PAGE)).await;
            let pending = match pending {
                Ok(Ok(pending)) => pending,
                Ok(Err(error)) => {
                    warn!(%error, "links that wait can't be read");
                    break;
                }
                Err(_) => break,
            };
            let Some(last) = pending.last() else { break };
            after = Some((last.conversation, last.user));
            for link in pending {
                if let Err(refusal) = carry_link(shards, route, link).await {
                    warn!(conversation = %link.conversation, user = %link.user, code = %refusal.code, "a link waits");
                }
            }
        }
    }
}

/// One link: the user's list follows, then the conversation's shard is told that it did.
///
/// # Errors
/// The user's shard can't do it at the moment; the link stays pending.
pub async fn carry_link(shards: &[ShardHandle], route: Route, link: PendingLink) -> Result<(), Refusal> {
    let unknown = Refusal::new(RefusalCode::UnknownUser);
    let user = route.user(link.user).and_then(|shard| shards.get(shard)).ok_or(unknown)?;
    user.ask(|answer| Command::Link(link, answer)).await?;
    let conversation =
        route.conversation(link.conversation).and_then(|shard| shards.get(shard)).ok_or(unknown)?;
    conversation.send(Command::LinkDone { conversation: link.conversation, user: link.user }).await
}
