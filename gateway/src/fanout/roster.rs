//! Which sessions are here, and in which loaded conversations they are.
//!
//! - A conversation's roster lists the sessions of its members that are connected; it is filled once when the
//!   conversation is loaded and kept up to date by arrivals and departures.
//! - Work at an arrival is proportional to the user's *loaded* conversations.
//!
//! One per shard, owned by the shard's thread. Not here: who is a member (`conversation::state`).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use fulmar_protocol::id::{ConversationId, UserId};

use super::owed::Owed;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Roster {
    here: HashMap<UserId, Vec<Arc<Owed>>>,
    present: HashMap<ConversationId, Vec<Arc<Owed>>>,
    loaded: HashMap<UserId, HashSet<ConversationId>>,
}

impl Roster {
    /// A session arrived.
    pub fn arrive(&mut self, session: &Arc<Owed>) {
        self.here.entry(session.user).or_default().push(Arc::clone(session));
        for conversation in self.loaded.get(&session.user).into_iter().flatten() {
            self.present.entry(*conversation).or_default().push(Arc::clone(session));
        }
    }

    /// A session left.
    pub fn depart(&mut self, session: &Owed) {
        if let Some(sessions) = self.here.get_mut(&session.user) {
            sessions.retain(|here| here.connection != session.connection);
            if sessions.is_empty() {
                self.here.remove(&session.user);
            }
        }
        for conversation in self.loaded.get(&session.user).into_iter().flatten() {
            if let Some(present) = self.present.get_mut(conversation) {
                present.retain(|here| here.connection != session.connection);
            }
        }
    }

    /// A conversation was loaded: these are its members.
    pub fn load(&mut self, conversation: ConversationId, members: impl IntoIterator<Item = UserId>) {
        let mut present = Vec::new();
        for user in members {
            self.loaded.entry(user).or_default().insert(conversation);
            present.extend(self.here.get(&user).into_iter().flatten().cloned());
        }
        self.present.insert(conversation, present);
    }

    /// A conversation was put away.
    pub fn unload(&mut self, conversation: ConversationId, members: impl IntoIterator<Item = UserId>) {
        self.present.remove(&conversation);
        for user in members {
            self.forget(user, conversation);
        }
    }

    /// A user became a member of a loaded conversation.
    pub fn join(&mut self, conversation: ConversationId, user: UserId) {
        if self.loaded.entry(user).or_default().insert(conversation) {
            let sessions = self.here.get(&user).into_iter().flatten().cloned();
            self.present.entry(conversation).or_default().extend(sessions);
        }
    }

    /// A user is no longer a member of a loaded conversation.
    pub fn leave(&mut self, conversation: ConversationId, user: UserId) {
        self.forget(user, conversation);
        if let Some(present) = self.present.get_mut(&conversation) {
            present.retain(|session| session.user != user);
        }
    }

    /// The sessions to tell of a record of `conversation`.
    #[must_use]
    pub fn present(&self, conversation: ConversationId) -> &[Arc<Owed>] {
        self.present.get(&conversation).map_or(&[], Vec::as_slice)
    }

    /// The sessions of `user`.
    #[must_use]
    pub fn sessions(&self, user: UserId) -> &[Arc<Owed>] {
        self.here.get(&user).map_or(&[], Vec::as_slice)
    }

    fn forget(&mut self, user: UserId, conversation: ConversationId) {
        if let Some(loaded) = self.loaded.get_mut(&user) {
            loaded.remove(&conversation);
            if loaded.is_empty() {
                self.loaded.remove(&user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::DeviceId;

    use super::*;

    fn user(n: u64) -> UserId {
        UserId::new(n).unwrap()
    }

    fn session(n: u64, connection: u64) -> Arc<Owed> {
        Arc::new(Owed::new(user(n), DeviceId::FIRST, connection, 10))
    }

    fn present(roster: &Roster, n: u64) -> Vec<u64> {
        let mut here: Vec<u64> =
            roster.present(ConversationId::new(n).unwrap()).iter().map(|s| s.connection).collect();
        here.sort_unstable();
        here
    }

    #[test]
    fn presence_follows_arrivals_members_and_loading() {
        let (c1, c2) = (ConversationId::new(1).unwrap(), ConversationId::new(2).unwrap());
        let mut roster = Roster::default();
        let (a, b, b2) = (session(1, 10), session(2, 20), session(2, 21));
        roster.arrive(&a);
        roster.load(c1, [user(1), user(2)]);
        assert_eq!(present(&roster, 1), [10]);
        roster.arrive(&b);
        roster.arrive(&b2);
        assert_eq!(present(&roster, 1), [10, 20, 21]);
        roster.load(c2, [user(1)]);
        roster.join(c2, user(2));
        roster.join(c2, user(2));
        assert_eq!(present(&roster, 2), [10, 20, 21], "joining twice changes nothing");
        roster.leave(c1, user(2));
        assert_eq!(present(&roster, 1), [10]);
        roster.depart(&b);
        assert_eq!(present(&roster, 2), [10, 21]);
        roster.unload(c2, [user(1), user(2)]);
        assert_eq!(present(&roster, 2), [0u64; 0]);
        roster.depart(&a);
        roster.depart(&b2);
        assert!(roster.here.is_empty() && present(&roster, 1).is_empty());
    }
}
