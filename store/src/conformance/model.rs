//! What a shard must hold: the same operations, applied to plain maps; random batches for it; and a shard read back as one.
//!
//! Not here: what is done to the shard meanwhile (`crash`, `faults`).

use std::collections::BTreeMap;

use bytes::Bytes;
use fulmar_protocol::id::{DeviceId, Epoch, Pseq, Seq, UnixMillis};

use super::{Open, conversation, message, seq, user};
use crate::{Limits, Member, Op, ReadError, Record, Role, files::faulty::Chance};

/// Conversations of the model.
pub(crate) const CONVERSATIONS: u64 = 4;

const USERS: u64 = 5;

pub(crate) const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

/// One conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Talk {
    pub(crate) seq: u64,
    pub(crate) low: u64,
    /// Those after `low`.
    pub(crate) records: BTreeMap<u64, Record>,
    pub(crate) members: BTreeMap<u64, Role>,
    pub(crate) reads: BTreeMap<u64, u64>,
    /// (user, device) → last pseq and its seq.
    pub(crate) lanes: BTreeMap<(u64, u64), (u64, u64)>,
}

/// A shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) talks: [Talk; CONVERSATIONS as usize],
}

impl Model {
    /// A random batch; the model becomes what it leaves behind.
    pub(crate) fn batch(&mut self, chance: &mut Chance) -> Vec<Op> {
        let mut batch = Vec::new();
        for _ in 0..=chance.below(8) {
            let local = 1 + chance.below(CONVERSATIONS);
            let talk = &mut self.talks[local as usize - 1];
            let id = conversation(local);
            let by = 1 + chance.below(3);
            let device = 1 + chance.below(2);
            let lane = talk.lanes.get(&(by, device)).map_or(1, |(last, _)| last + 1);
            let pseq = Pseq::new(lane).unwrap();
            let device_id = DeviceId::new(device).unwrap();
            match chance.below(20) {
                0..=11 => {
                    talk.seq += 1;
                    let most = if chance.percent(4) { 16_384 } else { 400 };
                    let size = chance.below(most) as usize;
                    let payload = Bytes::from(vec![(talk.seq * 7 + local) as u8; size]);
                    let record =
                        Record { sender: user(by), device: device_id, pseq, ..message(talk.seq, payload) };
                    talk.lanes.insert((by, device), (lane, talk.seq));
                    talk.records.insert(talk.seq, record.clone());
                    batch.push(Op::Append { conversation: id, record });
                }
                12 => {
                    talk.lanes.insert((by, device), (lane, 0));
                    let (user, epoch) = (user(by), Epoch::FIRST);
                    batch.push(Op::Refuse { conversation: id, user, device: device_id, epoch, pseq });
                }
                13..=15 => {
                    let who = 1 + chance.below(USERS);
                    let role = if chance.percent(50) { Role::Admin } else { Role::Member };
                    let row = chance.percent(65).then(|| Member {
                        role,
                        joined: seq(1),
                        since: UnixMillis::default(),
                    });
                    match row {
                        Some(_) => talk.members.insert(who, role),
                        None => talk.members.remove(&who),
                    };
                    batch.push(Op::Member { conversation: id, user: user(who), row });
                }
                16..=17 => {
                    let who = 1 + chance.below(USERS);
                    let to = chance.below(talk.seq + 1);
                    if to > 0 {
                        let read = talk.reads.entry(who).or_default();
                        *read = to.max(*read);
                        batch.push(Op::Read { conversation: id, user: user(who), seq: seq(to) });
                    }
                }
                _ => {
                    let low = talk.low + chance.below(talk.seq - talk.low + 1);
                    if low > talk.low {
                        talk.low = low;
                        talk.records = talk.records.split_off(&(low + 1));
                        batch.push(Op::Low { conversation: id, low: seq(low), count: low });
                    }
                }
            }
        }
        if batch.is_empty() {
            return self.batch(chance);
        }
        batch
    }

    /// Everything a shard says, read in several ways that must agree.
    ///
    /// # Errors
    /// What can't be read.
    pub(crate) fn read_back(open: &Open, chance: &mut Chance) -> Result<Self, ReadError> {
        let mut found = Self::default();
        for (talk, local) in found.talks.iter_mut().zip(1..) {
            let (id, reader) = (conversation(local), &open.reader);
            let head = reader.head(id)?.unwrap_or_default();
            assert_eq!((head.count, head.low_count), (head.seq.get(), head.low.get()), "{id}: counts");
            talk.seq = head.seq.get();
            talk.low = head.low.get();
            // One that is not in any cache, first.
            let one = seq(head.low.get() + 1 + chance.below(head.seq.get() - head.low.get() + 1));
            let alone = reader.record(id, one)?;
            let records = reader.records(id, seq(1), seq(u64::from(u32::MAX)), ALL)?;
            assert_eq!(records.iter().find(|record| record.seq == one), alone.as_ref(), "{id}: one of them");
            assert_eq!(
                reader.records_before(id, head.seq.saturating_add(1), ALL)?,
                records,
                "{id}: backwards"
            );
            talk.records = records.into_iter().map(|record| (record.seq.get(), record)).collect();
            let local_of = |id: fulmar_protocol::id::UserId| (1..=USERS).find(|local| user(*local) == id);
            for (who, member) in reader.members(id, None, usize::MAX)? {
                talk.members.insert(local_of(who).unwrap(), member.role);
            }
            assert_eq!(reader.member_count(id)?, talk.members.len() as u64, "{id}: members");
            for (who, read) in reader.read_cursors(id, None, usize::MAX)? {
                talk.reads.insert(local_of(who).unwrap(), read.get());
            }
            for (who, device, lane) in reader.lanes(id, None, usize::MAX)? {
                let at = lane.seq_of(lane.last).unwrap_or(Seq::ZERO);
                talk.lanes.insert((local_of(who).unwrap(), device.get()), (lane.last.get(), at.get()));
            }
        }
        Ok(found)
    }

    /// Where two of them differ, in few words.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let mut text = String::new();
        for ((mine, theirs), local) in self.talks.iter().zip(&other.talks).zip(1..) {
            let seqs = |talk: &Talk| talk.records.keys().copied().collect::<Vec<_>>();
            let brief = |talk: &Talk| {
                let (seq, low) = (talk.seq, talk.low);
                format!("seq {seq} low {low} {:?} {:?} {:?}", talk.members, talk.reads, talk.lanes)
            };
            if brief(mine) != brief(theirs) || seqs(mine) != seqs(theirs) {
                text += &format!(
                    "\n{local}: {} {:?}\n   {} {:?}",
                    brief(mine),
                    seqs(mine),
                    brief(theirs),
                    seqs(theirs)
                );
            } else if mine != theirs {
                text += &format!("\n{local}: the records differ");
            }
        }
        text
    }
}
