//! The rows kept beside the log, and their bytes.
//!
//! - A row is absolute: written twice it is the same row, so replaying a commit does no harm.
//! - Its bytes are a version byte (1) followed by the fields in postcard's encoding. A row of another version, or with
//!   bytes left over, is refused: growth is a new version, written down in `docs/storage.md`.
//!
//! Not here: the keys they lie under (`key`), who may change them (the gateway).

use std::collections::VecDeque;

use fulmar_protocol::{
    id::{AppId, ClassEpoch, ConversationId, DeviceClass, DeviceUid, Epoch, Pseq, Seq, UnixMillis, UserId},
    limit::LANE_ACKS_REMEMBERED,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::codec::{Cursor, Malformed, put_varint};

/// What kind of conversation it is. The number keeps their names apart and is part of the disk format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ConversationClass {
    /// Between two users; its name is made of theirs.
    Direct = 1,
    /// Of any number of users.
    Group = 2,
    /// Of everybody in its app, without rows that say so.
    Broadcast = 3,
}

/// What a conversation is; set once when it begins, replaced as a whole when it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationMeta {
    /// The app it belongs to.
    pub app: AppId,
    /// Of what kind it is.
    pub class: ConversationClass,
    /// Its name at the edge, unique within (app, class); at most `NAME_BYTES_MAX`.
    pub name: String,
    /// Who made it.
    pub creator: UserId,
    /// When.
    pub created: UnixMillis,
}

/// Where a conversation's log stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The last record.
    pub seq: Seq,
    /// Its `count`.
    pub count: u64,
    /// Its time.
    pub time: UnixMillis,
    /// Records up to and including this one are gone (retention); zero if none are.
    pub low: Seq,
    /// `count` of the record `low`.
    pub low_count: u64,
    /// Members there are.
    pub members: u64,
}

/// What a member may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Role {
    /// Reads and writes.
    #[default]
    Member = 0,
    /// Adds and removes members as well.
    Admin = 1,
    /// Made the group.
    Owner = 2,
}

/// A user's membership of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What they may do.
    pub role: Role,
    /// The record that says they joined; they see what comes after it.
    pub joined: Seq,
    /// When.
    pub since: UnixMillis,
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The app the user belongs to.
    pub app: AppId,
    /// The user's name at the edge, unique within the app; at most `NAME_BYTES_MAX`.
    pub name: String,
    /// When the user was first seen.
    pub created: UnixMillis,
}

/// A conversation in a user's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The record that says the user joined.
    pub joined: Seq,
    /// The user cleared the conversation up to here; zero if never.
    pub cleared: Seq,
    /// The user wants no notifications from it.
    pub muted: bool,
    /// When this row last changed.
    pub changed: UnixMillis,
}

/// A device of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What the device's SDK database calls itself.
    pub uid: DeviceUid,
    /// What kind of device it is.
    pub class: DeviceClass,
    /// The producer epoch it was last given.
    pub epoch: Epoch,
    /// The login counter of its class when it last logged in; below the class' present one it is kicked.
    pub class_epoch: ClassEpoch,
    /// When it was last seen (updated when it connects, not by the minute).
    pub seen: UnixMillis,
}

/// A step into the user's shard that a conversation's shard still owes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingLink {
    /// The conversation that changed.
    pub conversation: ConversationId,
    /// The user whose list must follow.
    pub user: UserId,
    /// What the list must hold; `None`: the conversation leaves the list.
    pub listed: Option<Listed>,
}

/// How far a lane of sending (one device, one conversation) has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneState {
    /// The producer's incarnation the numbers belong to.
    pub epoch: Epoch,
    /// The last pseq that was taken or refused.
    pub last: Pseq,
    /// The last pairs of pseq and seq, oldest first, at most [`LANE_ACKS_REMEMBERED`]. A seq of zero: refused for good.
    pub recent: VecDeque<(Pseq, Seq)>,
}

impl LaneState {
    /// Takes note of what became of `pseq`. Taking note again changes nothing.
    pub(crate) fn note(&mut self, epoch: Epoch, pseq: Pseq, seq: Seq) {
        if epoch < self.epoch || (epoch == self.epoch && pseq <= self.last) {
            return;
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.recent.clear();
        }
        self.last = pseq;
        if self.recent.len() >= LANE_ACKS_REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((pseq, seq));
    }

    /// The seq that `pseq` was given; `Seq::ZERO` if it was refused, `None` if it is not remembered.
    #[must_use]
    pub fn seq_of(&self, pseq: Pseq) -> Option<Seq> {
        self.recent.iter().rev().find(|(p, _)| *p == pseq).map(|(_, s)| *s)
    }
}

/// Bytes of a row and back.
pub(crate) trait Row: Sized {
    fn to_row(&self) -> Vec<u8>;
    fn from_row(bytes: &[u8]) -> Result<Self, Malformed>;
}

const ROW_VERSION: u8 = 1;

fn to_postcard<T: Serialize>(row: &T) -> Vec<u8> {
    // Into a growing vector only types of unknown length fail, and no row has one.
    let mut out = vec![ROW_VERSION];
    match postcard::to_extend(row, Vec::new()) {
        Ok(bytes) => out.extend_from_slice(&bytes),
        Err(error) => debug_assert!(false, "a row could not be encoded: {error}"),
    }
    out
}

fn from_postcard<T: DeserializeOwned>(bytes: &[u8], what: &'static str) -> Result<T, Malformed> {
    let (version, fields) = bytes.split_first().ok_or(Malformed(what))?;
    if *version != ROW_VERSION {
        return Err(Malformed(what));
    }
    match postcard::take_from_bytes(fields) {
        Ok((row, [])) => Ok(row),
        _ => Err(Malformed(what)),
    }
}

macro_rules! postcard_row {
    ($($row:ty => $what:literal),* $(,)?) => {$(
        impl Row for $row {
            fn to_row(&self) -> Vec<u8> {
                to_postcard(self)
            }
            fn from_row(bytes: &[u8]) -> Result<Self, Malformed> {
                from_postcard(bytes, $what)
            }
        }
    )*};
}

postcard_row! {
    ConversationMeta => "conversation row",
    Head => "head row",
    Member => "member row",
    User => "user row",
    Listed => "listed row",
    Device => "device row",
    PendingLink => "link row",
    Number => "number row",
}

/// A row that is one number: an id behind a name, a cursor, a login counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Number(pub(crate) u64);

impl Row for LaneState {
    /// `version epoch last n (pseq since the one before, seq since the one before, zig-zag; refused: absolute 0 flagged)`
    fn to_row(&self) -> Vec<u8> {
        let mut out = vec![ROW_VERSION];
        put_varint(&mut out, self.epoch.get());
        put_varint(&mut out, self.last.get());
        put_varint(&mut out, self.recent.len() as u64);
        let (mut pseq_before, mut seq_before) = (0, 0);
        for (pseq, seq) in &self.recent {
            // Both grow along the lane; a refused one has no seq and is written as 0, the others as the step + 1.
            put_varint(&mut out, pseq.get().wrapping_sub(pseq_before));
            pseq_before = pseq.get();
            if *seq == Seq::ZERO {
                out.push(0);
            } else {
                put_varint(&mut out, seq.get().wrapping_sub(seq_before).wrapping_add(1));
                seq_before = seq.get();
            }
        }
        out
    }

    fn from_row(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(bytes);
        if at.u8("lane version")? != ROW_VERSION {
            return Err(Malformed("lane version"));
        }
        let epoch = at.number("lane epoch")?;
        let last = at.number("lane last")?;
        let n = at.length("lane length")?;
        if n > LANE_ACKS_REMEMBERED {
            return Err(Malformed("lane length"));
        }
        let mut recent = VecDeque::with_capacity(n);
        let (mut pseq_before, mut seq_before) = (0u64, 0u64);
        for _ in 0..n {
            pseq_before = pseq_before.wrapping_add(at.varint("lane pseq")?);
            let pseq = Pseq::new(pseq_before).ok_or(Malformed("lane pseq"))?;
            let step = at.varint("lane seq")?;
            let seq = if step == 0 {
                Seq::ZERO
            } else {
                seq_before = seq_before.wrapping_add(step - 1);
                Seq::new(seq_before).ok_or(Malformed("lane seq"))?
            };
            recent.push_back((pseq, seq));
        }
        if !at.is_empty() {
            return Err(Malformed("lane"));
        }
        Ok(Self { epoch, last, recent })
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::limit::VARINT_MAX;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_are_pinned() {
        let head = Head {
            seq: Seq::new(300).unwrap(),
            count: 299,
            time: UnixMillis::new(1_700_000_000_000).unwrap(),
            low: Seq::new(1).unwrap(),
            low_count: 1,
            members: 2,
        };
        assert_eq!(crate::hex(&head.to_row()), "01ac02ab0280d095ffbc31010102");
        let member =
            Member { role: Role::Owner, joined: Seq::new(2).unwrap(), since: UnixMillis::new(5).unwrap() };
        assert_eq!(crate::hex(&member.to_row()), "01020205");
        let classes = [ConversationClass::Direct, ConversationClass::Group, ConversationClass::Broadcast];
        for (class, byte) in classes.into_iter().zip(["00", "01", "02"]) {
            let (app, created) = (AppId::new(1).unwrap(), UnixMillis::new(5).unwrap());
            let creator = UserId::new(300).unwrap();
            let meta = ConversationMeta { app, class, name: "news".to_owned(), creator, created };
            assert_eq!(crate::hex(&meta.to_row()), format!("0101{byte}046e657773ac0205"));
        }
        let mut lane = LaneState::default();
        lane.note(Epoch::FIRST, Pseq::new(1).unwrap(), Seq::new(10).unwrap());
        lane.note(Epoch::FIRST, Pseq::new(2).unwrap(), Seq::ZERO);
        lane.note(Epoch::FIRST, Pseq::new(3).unwrap(), Seq::new(12).unwrap());
        assert_eq!(crate::hex(&lane.to_row()), "01010303010b01000103");
        assert_eq!(LaneState::from_row(&lane.to_row()), Ok(lane));
    }

    #[test]
    fn another_version_or_bytes_left_over_are_refused() {
        let mut row = Number(7).to_row();
        assert_eq!(Number::from_row(&row), Ok(Number(7)));
        row.push(0);
        assert!(Number::from_row(&row).is_err());
        assert!(Number::from_row(&[2, 7]).is_err());
        assert!(Number::from_row(&[]).is_err());
    }

    #[test]
    fn a_lane_remembers_a_window_and_never_goes_back() {
        let mut lane = LaneState::default();
        for n in 1..=100 {
            lane.note(Epoch::FIRST, Pseq::new(n).unwrap(), Seq::new(1000 + n).unwrap());
        }
        assert_eq!(lane.recent.len(), LANE_ACKS_REMEMBERED);
        assert_eq!(lane.seq_of(Pseq::new(36).unwrap()), None);
        assert_eq!(lane.seq_of(Pseq::new(37).unwrap()), Seq::new(1037));
        let before = lane.clone();
        lane.note(Epoch::FIRST, Pseq::new(100).unwrap(), Seq::new(1).unwrap());
        assert_eq!(lane, before, "the same again changes nothing");
        lane.note(Epoch::new(2).unwrap(), Pseq::new(1).unwrap(), Seq::new(2000).unwrap());
        assert_eq!(
            (lane.last, lane.recent.len()),
            (Pseq::new(1).unwrap(), 1),
            "a new incarnation starts anew"
        );
    }

    proptest! {
        #[test]
        fn a_lane_comes_back(epoch in 0..=VARINT_MAX, pairs in proptest::collection::vec((0..=VARINT_MAX, 0..=VARINT_MAX), 0..=64)) {
            let lane = LaneState {
                epoch: Epoch::new(epoch).unwrap(),
                last: Pseq::new(pairs.last().map_or(0, |p| p.0)).unwrap(),
                recent: pairs.iter().map(|(p, s)| (Pseq::new(*p).unwrap(), Seq::new(*s).unwrap())).collect(),
            };
            prop_assert_eq!(LaneState::from_row(&lane.to_row()), Ok(lane));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = LaneState::from_row(&bytes);
            let _ = Head::from_row(&bytes);
            let _ = User::from_row(&bytes);
            let _ = Device::from_row(&bytes);
            let _ = PendingLink::from_row(&bytes);
        }
    }
}
