//! Which shard owns what. Pure; part of the disk format, so it never changes for a data folder.

use fulmar_protocol::id::{AppId, ConversationId, ShardId, UserId};

/// What kind of name is placed; keeps users and conversations of each kind apart, whatever they are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Named {
    /// A user.
    User = 0,
    /// A direct conversation.
    Direct = 1,
    /// A group.
    Group = 2,
    /// A broadcast.
    Broadcast = 3,
}

/// The shards of this data folder.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    shards: u16,
}

impl Route {
    /// Of a folder with this many shards (at least 1).
    #[must_use]
    pub const fn new(shards: u16) -> Self {
        Self { shards: if shards == 0 { 1 } else { shards } }
    }

    /// Where a name is looked up and handed out.
    #[must_use]
    pub fn name(self, app: AppId, kind: Named, name: &str) -> usize {
        ShardId::of_name(app, kind as u8, name.as_bytes(), self.shards).get().into()
    }

    /// Where a user lives; `None` for a number of no shard of this folder.
    #[must_use]
    pub fn user(self, user: UserId) -> Option<usize> {
        self.existing(user.shard())
    }

    /// Where a conversation lives; `None` for a number of no shard of this folder.
    #[must_use]
    pub fn conversation(self, conversation: ConversationId) -> Option<usize> {
        self.existing(conversation.shard())
    }

    fn existing(self, shard: ShardId) -> Option<usize> {
        (shard.get() < self.shards).then_some(shard.get().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_route_to_their_shard_or_nowhere() {
        let route = Route::new(2);
        for (number, want) in [(256, Some(0)), (257, Some(1)), (258, None), (511, None)] {
            assert_eq!(route.user(UserId::new(number).unwrap()), want, "user {number}");
            assert_eq!(
                route.conversation(ConversationId::new(number).unwrap()),
                want,
                "conversation {number}"
            );
        }
        assert!(route.name(AppId::of("demo"), Named::User, "alice") < 2);
    }
}
