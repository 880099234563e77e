//! Which conversations everybody of an app reads, and who writes there. Pure; told to all shards once, at the start.
//!
//! - The configuration says it, not the log: nobody joins a broadcast and nobody leaves it, so a new user costs it nothing.
//! - A broadcast that is no longer configured is served to nobody; its log stays.

use std::collections::{BTreeMap, HashMap, HashSet};

use fulmar_protocol::id::{AppId, ConversationId, Seq, UnixMillis, UserId};
use fulmar_store::{Member, Role};

/// What anybody of its app is in a broadcast.
pub const READER: Member = Member {
    role: Role::Member,
    joined: Seq::FIRST,
    since: match UnixMillis::new(0) {
        Some(since) => since,
        None => unreachable!(),
    },
};

/// What those are who may write there: they may take back what another of them wrote as well.
pub const WRITER: Member = Member { role: Role::Admin, ..READER };

/// One broadcast.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broadcast {
    /// Whose users read it.
    pub app: AppId,
    /// Its name.
    pub name: String,
    /// Who writes there.
    pub writers: HashSet<UserId>,
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Broadcasts {
    all: BTreeMap<ConversationId, Broadcast>,
    of_app: HashMap<AppId, Vec<ConversationId>>,
}

impl Broadcasts {
    /// Takes one in.
    pub fn insert(&mut self, conversation: ConversationId, broadcast: Broadcast) {
        let app = broadcast.app;
        if self.all.insert(conversation, broadcast).is_none() {
            let of_app = self.of_app.entry(app).or_default();
            of_app.push(conversation);
            of_app.sort_unstable();
        }
    }

    /// What everybody of `app` reads, in the order of the numbers.
    #[must_use]
    pub fn of(&self, app: AppId) -> &[ConversationId] {
        self.of_app.get(&app).map_or(&[], Vec::as_slice)
    }

    /// Whether everybody of `app` reads this conversation.
    #[must_use]
    pub fn has(&self, app: AppId, conversation: ConversationId) -> bool {
        self.of(app).contains(&conversation)
    }

    /// The broadcast of this name.
    #[must_use]
    pub fn named(&self, app: AppId, name: &str) -> Option<ConversationId> {
        self.of(app).iter().copied().find(|broadcast| self.get(*broadcast).is_some_and(|b| b.name == name))
    }

    /// The broadcast that is this conversation.
    #[must_use]
    pub fn get(&self, conversation: ConversationId) -> Option<&Broadcast> {
        self.all.get(&conversation)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (ConversationId, &Broadcast)> {
        self.all.iter().map(|(conversation, broadcast)| (*conversation, broadcast))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_has_its_own_broadcasts_and_no_other_s() {
        let conversation = |n| ConversationId::new(n).unwrap();
        let (acme, other) = (AppId::of("acme"), AppId::of("other"));
        let mut broadcasts = Broadcasts::default();
        for (number, app) in [(900, acme), (300, acme), (301, other), (900, acme)] {
            let name = number.to_string();
            broadcasts.insert(conversation(number), Broadcast { app, name, writers: HashSet::new() });
        }
        assert_eq!(broadcasts.of(acme), [conversation(300), conversation(900)]);
        assert_eq!(broadcasts.of(AppId::of("third")), []);
        for (app, number, want) in
            [(acme, 300, true), (acme, 301, false), (other, 301, true), (other, 1, false)]
        {
            assert_eq!(broadcasts.has(app, conversation(number)), want, "{number}");
        }
        assert_eq!(broadcasts.named(acme, "300"), Some(conversation(300)));
        assert_eq!((broadcasts.named(acme, "301"), broadcasts.named(other, "300")), (None, None));
        assert_eq!(broadcasts.iter().count(), 3);
    }
}
