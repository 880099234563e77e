//! What is committed and not yet in the tables.
//!
//! - Values are absolute: what the overlay holds for a key hides what the tables hold.
//! - Its size is bounded by the committer (`settle_bytes`, `settle_commits`), which settles it into the tables.
//!
//! Not here: reading through it (`view`), writing it out (`settle`).

use std::collections::{BTreeMap, VecDeque, btree_map::Entry};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, UserId};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::{
    commit::CommitId,
    key::Table,
    record::Record,
    row::{Head, LaneState},
};

/// Bytes of memory one record, row or lane costs besides its own bytes, about.
const ENTRY_OVERHEAD: usize = 200;

/// Bytes of memory a lane costs, with its remembered pairs.
const LANE_BYTES: usize = 1_200;

/// A committed record and the bytes it will lie in a block with.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) record: Record,
    pub(crate) encoded: Bytes,
}

/// What happened to one conversation's log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Touched {
    pub(crate) head: Head,
    /// Consecutive; the last one is the head.
    pub(crate) records: VecDeque<Pending>,
    pub(crate) lanes: BTreeMap<(UserId, DeviceId), LaneState>,
    /// The retention mark moved: blocks below it may go.
    pub(crate) low_moved: bool,
}

/// Numbers handed out by the shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counters {
    /// The last local number of a user.
    pub(crate) users: u64,
    /// The last local number of a conversation.
    pub(crate) conversations: u64,
    /// The epoch of the last writer.
    pub(crate) epoch: u64,
}

/// One generation of committed changes.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    /// Table number and key → row; `None`: the row is gone.
    pub(crate) rows: BTreeMap<Vec<u8>, Option<Bytes>>,
    pub(crate) touched: FxHashMap<ConversationId, Touched>,
    pub(crate) counters: Counters,
    /// The last commit in it.
    pub(crate) last: CommitId,
    pub(crate) commits: u64,
    pub(crate) bytes: usize,
}

/// A row's key with its table in front.
pub(crate) fn full_key(table: Table, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 1);
    full.push(table as u8);
    full.extend_from_slice(key);
    full
}

impl Overlay {
    pub(crate) fn is_empty(&self) -> bool {
        self.commits == 0
    }

    pub(crate) fn put(&mut self, table: Table, key: &[u8], row: Option<Vec<u8>>) {
        self.bytes += key.len() + row.as_ref().map_or(0, Vec::len) + ENTRY_OVERHEAD;
        self.rows.insert(full_key(table, key), row.map(Bytes::from));
    }

    /// Takes over what a later commit changed.
    ///
    /// Costs what the later one holds, not what is here already: every commit does this (`BTreeMap::append` would make the whole map
    /// anew each time).
    pub(crate) fn merge(&mut self, later: Self) {
        self.rows.extend(later.rows);
        for (conversation, mut touched) in later.touched {
            let mine = self.touched.entry(conversation).or_default();
            mine.head = touched.head;
            mine.low_moved |= touched.low_moved;
            mine.lanes.extend(touched.lanes);
            mine.records.append(&mut touched.records);
        }
        self.counters = later.counters;
        self.last = later.last;
        self.commits += later.commits;
        self.bytes += later.bytes;
    }

    pub(crate) fn lane(
        &self,
        conversation: ConversationId,
        user: UserId,
        device: DeviceId,
    ) -> Option<&LaneState> {
        self.touched.get(&conversation)?.lanes.get(&(user, device))
    }

    /// A lane to be changed in place; `base` if it is not here yet.
    pub(crate) fn lane_mut(
        &mut self,
        conversation: ConversationId,
        user: UserId,
        device: DeviceId,
        base: Option<LaneState>,
    ) -> &mut LaneState {
        let lanes = &mut self.touched.entry(conversation).or_default().lanes;
        match lanes.entry((user, device)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                self.bytes += LANE_BYTES;
                entry.insert(base.unwrap_or_default())
            }
        }
    }

    pub(crate) fn weigh_record(&mut self, encoded: usize) {
        self.bytes += encoded + ENTRY_OVERHEAD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_is_merged_costs_what_it_holds() {
        let mut overlay = Overlay::default();
        for n in 0..1_000u32 {
            overlay.put(Table::User, &n.to_be_bytes(), Some(vec![1]));
        }
        let places = |overlay: &Overlay| -> Vec<*const Option<Bytes>> {
            overlay.rows.values().take(900).map(std::ptr::from_ref).collect()
        };
        let before = places(&overlay);
        let mut later = Overlay::default();
        later.put(Table::User, &2_000u32.to_be_bytes(), Some(vec![2]));
        later.put(Table::User, &999u32.to_be_bytes(), None);
        overlay.merge(later);
        assert_eq!(overlay.rows.len(), 1_001);
        assert_eq!(overlay.rows.get(&full_key(Table::User, &999u32.to_be_bytes())), Some(&None));
        // Rows far from what was changed lie where they lay: the map was not made anew.
        assert!(before == places(&overlay));
    }
}
