//! The tables of a shard and the keys of their rows.
//!
//! - Every number in a key is big-endian and of fixed width, so byte order is number order.
//! - A key starts with what it is listed by: the rows of one conversation, user or device lie side by side.
//!
//! - Numbers 1 and 2 were the commits and blocks of format 1; they are not given again.
//!
//! Not here: the rows (`row`), the files beside the tables (`commit`, `segment`).

use fulmar_protocol::id::{AppId, ConversationId, DeviceClass, DeviceId, DeviceUid, Seq, UserId};

use crate::{codec::Malformed, row::ConversationClass};

/// A table of a shard's database. The name is part of the disk format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(crate) enum Table {
    /// conversation → `Head`.
    Head = 3,
    /// conversation → `ConversationMeta`.
    Conversation = 4,
    /// (app, kind u8, name bytes) → number of the user or conversation.
    Name = 5,
    /// user → `User`.
    User = 6,
    /// (conversation, user) → `Member`.
    Member = 7,
    /// (user, conversation) → `Listed`.
    Listed = 8,
    /// (user, device) → `Device`.
    Device = 9,
    /// (user, uid 16 bytes) → number of the device.
    Uid = 10,
    /// (user, class u8) → login counter.
    ClassEpoch = 11,
    /// (user, device, conversation) → seq.
    Recv = 12,
    /// (conversation, user) → seq.
    Read = 13,
    /// (conversation, user, device) → `LaneState`.
    Lane = 14,
    /// (conversation, user) → `PendingLink`.
    Link = 15,
    /// A few named rows about the index itself.
    Shard = 16,
    /// (conversation, first seq) → where the run of records that begins there lies.
    Run = 17,
}

impl Table {
    /// Every table, in order of their numbers.
    pub(crate) const ALL: [Self; 15] = [
        Self::Head,
        Self::Conversation,
        Self::Name,
        Self::User,
        Self::Member,
        Self::Listed,
        Self::Device,
        Self::Uid,
        Self::ClassEpoch,
        Self::Recv,
        Self::Read,
        Self::Lane,
        Self::Link,
        Self::Shard,
        Self::Run,
    ];

    /// The table of this number; `None` if there is none.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|table| *table as u8 == number)
    }

    /// Its place among [`Self::ALL`].
    pub(crate) fn place(self) -> usize {
        usize::from(self as u8).saturating_sub(Self::Head as u8 as usize)
    }

    /// What the engine calls it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Conversation => "conversation",
            Self::Name => "name",
            Self::User => "user",
            Self::Member => "member",
            Self::Listed => "listed",
            Self::Device => "device",
            Self::Uid => "uid",
            Self::ClassEpoch => "class_epoch",
            Self::Recv => "recv",
            Self::Read => "read",
            Self::Lane => "lane",
            Self::Link => "link",
            Self::Shard => "shard",
            Self::Run => "run",
        }
    }
}

/// Names of users are kept apart from those of conversations, whose kind is their class' number.
pub(crate) const KIND_USER: u8 = 0;

/// The kind under which a conversation's name is placed and found.
pub(crate) const fn kind_of(class: ConversationClass) -> u8 {
    class as u8
}

/// A key being put together: big-endian numbers, then at most one run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Key(Vec<u8>);

impl Key {
    fn with(parts: &[u64]) -> Self {
        let mut bytes = Vec::with_capacity(parts.len() * 8 + 2);
        for part in parts {
            bytes.extend_from_slice(&part.to_be_bytes());
        }
        Self(bytes)
    }

    fn and(mut self, more: &[u8]) -> Self {
        self.0.extend_from_slice(more);
        self
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn run(conversation: ConversationId, first: Seq) -> Self {
        Self::with(&[conversation.get(), first.get()])
    }

    pub(crate) fn conversation(conversation: ConversationId) -> Self {
        Self::with(&[conversation.get()])
    }

    pub(crate) fn user(user: UserId) -> Self {
        Self::with(&[user.get()])
    }

    pub(crate) fn name(app: AppId, kind: u8, name: &str) -> Self {
        Self::with(&[app.get()]).and(&[kind]).and(name.as_bytes())
    }

    /// Rows of a conversation by user: members, reads, links.
    pub(crate) fn conversation_user(conversation: ConversationId, user: UserId) -> Self {
        Self::with(&[conversation.get(), user.get()])
    }

    /// Rows of a user by conversation: the user's list.
    pub(crate) fn user_conversation(user: UserId, conversation: ConversationId) -> Self {
        Self::with(&[user.get(), conversation.get()])
    }

    pub(crate) fn device(user: UserId, device: DeviceId) -> Self {
        Self::with(&[user.get(), device.get()])
    }

    pub(crate) fn uid(user: UserId, uid: DeviceUid) -> Self {
        Self::with(&[user.get()]).and(&uid.0)
    }

    pub(crate) fn class_epoch(user: UserId, class: DeviceClass) -> Self {
        Self::with(&[user.get()]).and(&[class as u8])
    }

    pub(crate) fn recv(user: UserId, device: DeviceId, conversation: ConversationId) -> Self {
        Self::with(&[user.get(), device.get(), conversation.get()])
    }

    pub(crate) fn lane(conversation: ConversationId, user: UserId, device: DeviceId) -> Self {
        Self::with(&[conversation.get(), user.get(), device.get()])
    }
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The first key after all that start with `prefix`; `None` if there is none.
pub(crate) fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

/// The `n`-th number of a key.
pub(crate) fn number_at(key: &[u8], n: usize) -> Result<u64, Malformed> {
    let bytes = key.get(n * 8..n * 8 + 8).ok_or(Malformed("key"))?;
    Ok(u64::from_be_bytes(bytes.try_into().map_err(|_| Malformed("key"))?))
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::limit::VARINT_MAX;
    use proptest::prelude::*;

    use super::*;

    fn id<T: TryFrom<u64>>(n: u64) -> T {
        T::try_from(n).ok().unwrap()
    }

    #[test]
    fn keys_are_pinned() {
        let hex = |key: Key| crate::hex(key.as_ref());
        assert_eq!(hex(Key::run(id(256), id(7))), "00000000000001000000000000000007");
        assert_eq!(hex(Key::name(id(9), 2, "ab")), "0000000000000009026162");
        assert_eq!(hex(Key::recv(id(1), id(2), id(3))), "000000000000000100000000000000020000000000000003");
        assert_eq!(hex(Key::lane(id(1), id(2), id(3))), "000000000000000100000000000000020000000000000003");
        assert_eq!(
            hex(Key::uid(id(1), DeviceUid([0xab; 16]))),
            "0000000000000001abababababababababababababababab"
        );
        assert_eq!(hex(Key::class_epoch(id(1), DeviceClass::Web)), "000000000000000103");
        let names: Vec<_> = Table::ALL.iter().map(|t| (*t as u8, t.name())).collect();
        assert_eq!((names.first(), names.last()), (Some(&(3, "head")), Some(&(17, "run"))));
        for (place, table) in Table::ALL.into_iter().enumerate() {
            assert_eq!(table.place(), place);
            assert_eq!(Table::from_number(table as u8), Some(table));
        }
        assert_eq!((Table::from_number(2), Table::from_number(18)), (None, None));
    }

    proptest! {
        #[test]
        fn byte_order_is_number_order(a in any::<[u64; 3]>(), b in any::<[u64; 3]>()) {
            let a = a.map(|n| n % (VARINT_MAX + 1));
            let b = b.map(|n| n % (VARINT_MAX + 1));
            prop_assert_eq!(
                Key::recv(id(a[0]), id(a[1]), id(a[2])).as_ref().cmp(Key::recv(id(b[0]), id(b[1]), id(b[2])).as_ref()),
                a.cmp(&b)
            );
            prop_assert_eq!(
                Key::run(id(a[0]), id(a[1])).as_ref().cmp(Key::run(id(b[0]), id(b[1])).as_ref()),
                (a[0], a[1]).cmp(&(b[0], b[1]))
            );
        }

        #[test]
        fn the_end_of_a_prefix_is_its_end(prefix in proptest::collection::vec(any::<u8>(), 0..5), key in proptest::collection::vec(any::<u8>(), 0..8)) {
            let inside = key.starts_with(&prefix);
            let below_end = after_prefix(&prefix).is_none_or(|end| key < end);
            prop_assert_eq!(inside, key >= prefix && below_end);
        }
    }
}
