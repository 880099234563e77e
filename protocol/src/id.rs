//! The numbers that name things on the wire and on disk.
//!
//! - A number that means something has its own type; every one of them fits a QUIC variable-length integer
//!   (RFC 9000 section 16), so encoding it can't fail.
//! - Users and conversations are numbered by the shard that owns them:
//!   `number = local_counter * SHARDS_MAX + shard`. A number says where it lives.
//! - `AppId` is the stable hash of the app's configured name: equal on every node and after every restart.
//!
//! Not here: names (they are strings at the edge), and the handing out of numbers (the store's shards).

use serde::{Deserialize, Serialize};

use crate::limit::{SHARDS_MAX, VARINT_MAX};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name(u64);

        impl $name {
            /// `None` above [`VARINT_MAX`]: such a number has no encoding.
            #[must_use]
            pub const fn new(number: u64) -> Option<Self> {
                if number <= VARINT_MAX { Some(Self(number)) } else { None }
            }

            /// The bare number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = NumberTooLarge;

            fn try_from(number: u64) -> Result<Self, NumberTooLarge> {
                Self::new(number).ok_or(NumberTooLarge)
            }
        }

        impl From<$name> for u64 {
            fn from(number: $name) -> u64 {
                number.0
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// A number above [`VARINT_MAX`], which has no encoding on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the number does not fit a variable-length integer (62 bits)")]
pub struct NumberTooLarge;

number!(
    /// An app (tenant): the 62-bit hash of its configured name, see [`AppId::of`].
    AppId
);
number!(
    /// A user of an app, numbered by the shard that owns the user.
    UserId
);
number!(
    /// A direct or group conversation, numbered by the shard that owns its log.
    ConversationId
);
number!(
    /// A device of a user: 1, 2, 3 … in the order in which the user's devices were first seen.
    DeviceId
);
number!(
    /// A business back end that is called by clients; 0 is built in.
    ServiceId
);
number!(
    /// Position of a record in its conversation's log: contiguous from 1, never reused. 0 means "nothing yet".
    Seq
);
number!(
    /// Position of a send in a lane of sending (one producer, one conversation): contiguous from 1.
    Pseq
);
number!(
    /// Incarnation of a device's producer state, handed out by the server, increasing. 0 means "none yet".
    Epoch
);
number!(
    /// Login counter of one device class of one user; a frame of an older one is fenced.
    ClassEpoch
);
number!(
    /// A device's stay at the gateway; survives connections.
    SessionId
);
number!(
    /// Correlates a request with its answer on one connection.
    RequestId
);
number!(
    /// Milliseconds since 1970-01-01T00:00:00Z by the gateway's clock, never going back within a conversation.
    UnixMillis
);

impl AppId {
    /// The number of the app called `name`.
    #[must_use]
    pub fn of(name: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(name.as_bytes()) & VARINT_MAX)
    }
}

macro_rules! counter {
    ($name:ident, $what:literal) => {
        impl $name {
            /// Before the first.
            pub const ZERO: Self = Self(0);
            /// The first there is.
            pub const FIRST: Self = Self(1);

            #[doc = concat!("The next ", $what, "; `None` when the numbers are used up: a wrapped one would reorder history.")]
            #[must_use]
            pub const fn next(self) -> Option<Self> {
                Self::new(self.0 + 1)
            }

            /// The one before; stays at zero.
            #[must_use]
            pub const fn prev(self) -> Self {
                Self(self.0.saturating_sub(1))
            }

            /// How far `self` is ahead of `other`; 0 when it is not.
            #[must_use]
            pub const fn since(self, other: Self) -> u64 {
                self.0.saturating_sub(other.0)
            }

            /// `self + n`, stopping at the largest number there is.
            #[must_use]
            pub const fn saturating_add(self, n: u64) -> Self {
                let sum = self.0.saturating_add(n);
                if sum > VARINT_MAX { Self(VARINT_MAX) } else { Self(sum) }
            }
        }
    };
}

counter!(Seq, "seq");
counter!(Pseq, "pseq");
counter!(Epoch, "epoch");
counter!(ClassEpoch, "class epoch");
counter!(DeviceId, "device");
counter!(RequestId, "request");
counter!(SessionId, "session");

/// Where a user or a conversation lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(u16);

impl ShardId {
    /// `None` from [`SHARDS_MAX`] on.
    #[must_use]
    pub const fn new(shard: u16) -> Option<Self> {
        if (shard as u64) < SHARDS_MAX { Some(Self(shard)) } else { None }
    }

    /// The bare number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number of the `local`-th thing this shard owns; `None` when they are used up. `local` counts from 1, so
    /// that no number is 0.
    #[must_use]
    pub const fn number(self, local: u64) -> Option<u64> {
        match local.checked_mul(SHARDS_MAX) {
            Some(base) if base + self.0 as u64 <= VARINT_MAX => Some(base + self.0 as u64),
            _ => None,
        }
    }

    /// The shard that owns what is called `name` in `app`, of `shards` in all. `kind` keeps users, direct
    /// conversations and groups apart. The result is part of the disk format: it must never change.
    #[must_use]
    pub fn of_name(app: AppId, kind: u8, name: &[u8], shards: u16) -> Self {
        let seed = app.get() ^ (u64::from(kind) << 56);
        let hash = xxhash_rust::xxh3::xxh3_64_with_seed(name, seed);
        let shard = hash % u64::from(shards.max(1));
        Self(u16::try_from(shard).unwrap_or(0))
    }
}

impl core::fmt::Display for ShardId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

impl UserId {
    /// The shard that owns the user.
    #[must_use]
    pub fn shard(self) -> ShardId {
        ShardId(u16::try_from(self.0 % SHARDS_MAX).unwrap_or(0))
    }
}

impl ConversationId {
    /// The shard that owns the conversation's log.
    #[must_use]
    pub fn shard(self) -> ShardId {
        ShardId(u16::try_from(self.0 % SHARDS_MAX).unwrap_or(0))
    }
}

/// What a device's SDK database calls itself: 16 random bytes, drawn once when the database is created.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceUid(pub [u8; 16]);

impl core::fmt::Debug for DeviceUid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a gateway's data folder calls itself: 16 random bytes, drawn when its log was begun. All numbers the gateway hands
/// out mean something in this folder only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FolderId(pub [u8; 16]);

impl core::fmt::Debug for FolderId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What kind of device it is; login policies and push work per class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[serde(rename_all = "lowercase")]
pub enum DeviceClass {
    /// A phone.
    #[default]
    Phone = 0,
    /// A tablet.
    Tablet = 1,
    /// A program on a desktop or laptop.
    Desktop = 2,
    /// A browser.
    Web = 3,
    /// A program that acts for nobody in particular.
    Bot = 4,
}

/// Who sends: a user's device in one incarnation of its database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Producer {
    /// The user.
    pub user: UserId,
    /// The user's device.
    pub device: DeviceId,
    /// The incarnation of the device's database.
    pub epoch: Epoch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_says_where_it_lives() {
        for shard in [0u16, 1, 7, 255] {
            let shard = ShardId::new(shard).unwrap();
            for local in [1u64, 2, 1000, 1 << 40] {
                let number = shard.number(local).unwrap();
                assert_eq!(UserId::new(number).unwrap().shard(), shard);
                assert_eq!(ConversationId::new(number).unwrap().shard(), shard);
            }
            assert_eq!(shard.number(VARINT_MAX), None);
        }
        assert_eq!(ShardId::new(256), None);
    }

    #[test]
    fn placement_of_names_is_pinned() {
        let app = AppId::of("demo");
        let placed: Vec<u16> = ["alice", "bob", "carol", "dave", "group"]
            .iter()
            .map(|n| ShardId::of_name(app, 0, n.as_bytes(), 8).get())
            .collect();
        assert_eq!((app.get(), placed), (PINNED_DEMO, PINNED_SHARDS.to_vec()));
    }

    const PINNED_DEMO: u64 = 573_979_926_299_239_216;
    const PINNED_SHARDS: [u16; 5] = [3, 6, 7, 3, 1];

    #[test]
    fn counters_stop_instead_of_wrapping() {
        let last = Seq::new(VARINT_MAX).unwrap();
        assert_eq!(last.next(), None);
        assert_eq!(last.saturating_add(5), last);
        assert_eq!(Seq::ZERO.prev(), Seq::ZERO);
        assert_eq!(Seq::new(VARINT_MAX + 1), None);
    }
}
