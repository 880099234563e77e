//! A digest of receive cursors both ends keep without sending them.
//!
//! The digest is the XOR of one hash per (conversation, cursor): moving one cursor costs two hashes, whatever the
//! number of conversations, and the order of changes does not matter. It finds differences, it is no defence
//! against an attacker: a client that lies about its cursors only harms itself.

use crate::id::{ConversationId, Seq};

/// See the module's text. Cursors at [`Seq::ZERO`] count as absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CursorDigest(pub u64);

impl CursorDigest {
    /// Moves one cursor.
    pub fn moved(&mut self, conversation: ConversationId, from: Seq, to: Seq) {
        self.0 ^= term(conversation, from) ^ term(conversation, to);
    }

    /// The digest of `cursors`.
    #[must_use]
    pub fn of(cursors: impl IntoIterator<Item = (ConversationId, Seq)>) -> Self {
        let mut digest = Self::default();
        for (conversation, seq) in cursors {
            digest.moved(conversation, Seq::ZERO, seq);
        }
        digest
    }
}

fn term(conversation: ConversationId, seq: Seq) -> u64 {
    if seq == Seq::ZERO {
        return 0;
    }
    xxhash_rust::xxh3::xxh3_64_with_seed(&seq.get().to_be_bytes(), conversation.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_changes_does_not_matter() {
        let c = |n| ConversationId::new(n).unwrap();
        let s = |n| Seq::new(n).unwrap();
        let mut moved = CursorDigest::default();
        moved.moved(c(1), Seq::ZERO, s(4));
        moved.moved(c(2), Seq::ZERO, s(9));
        moved.moved(c(1), s(4), s(5));
        assert_eq!(moved, CursorDigest::of([(c(2), s(9)), (c(1), s(5)), (c(3), Seq::ZERO)]));
        assert_ne!(moved, CursorDigest::of([(c(2), s(5)), (c(1), s(9))]), "cursors are not exchangeable");
    }
}
