//! What retention needs to know of a shard: which conversations there are, and up to where one may be forgotten.
//!
//! - Nothing is changed here: moving the mark is [`crate::Op::Low`], in a commit like any other.
//! - Records of a conversation never go back in time, so what is too old is a prefix of the log.
//!
//! Not here: what is to be kept, and when to look (the gateway).

use fulmar_protocol::id::{ConversationId, Seq, UnixMillis};

use crate::{
    engine::Direction,
    error::ReadError,
    key::{Key, Table},
    reader::ShardReader,
    record::{RECORD_HEADER_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX, Record},
    row::ConversationMeta,
    shard::view::{Limits, next_key},
};

/// What is beyond what is to be kept. `None` in both: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionLimits {
    /// Records stored before this are too old.
    pub older_than: Option<UnixMillis>,
    /// Bytes of records, the newest ones, that are kept.
    pub keep_bytes: Option<u64>,
}

/// Up to where a conversation may be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionMark {
    /// The last record that is beyond what is to be kept.
    pub low: Seq,
    /// Its `count`.
    pub count: u64,
    /// Bytes of records that go with it, about.
    pub bytes: u64,
}

/// Records looked at in one answer, so that no answer takes long: what is left is found by asking again.
const LOOKED_AT_MAX: usize = 16_384;

/// Rows of the index looked at in one answer: pages, and rows of a page.
const INDEX_PAGES_MAX: usize = 64;
const INDEX_ROWS: usize = 256;

/// Bytes a record has at most.
const RECORD_BYTES_MAX: u64 = (RECORD_PAYLOAD_BYTES_MAX + RECORD_HEADER_BYTES_MAX) as u64;

const PAGE: Limits = Limits { records: 512, bytes: 1 << 20 };

impl ShardReader {
    /// Conversations of this shard in order of their numbers, after one of them; at most `limit`.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn conversations(
        &self,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<(ConversationId, ConversationMeta)>, ReadError> {
        let view = &self.shared.view;
        let after = after.map(Key::conversation);
        let rows = view.list(Table::Conversation, &[], after.as_ref().map(AsRef::as_ref), limit)?;
        rows.into_iter().map(|(key, row)| Ok((view.id_at(&key, 0)?, row))).collect()
    }

    /// The last record that is beyond `limits`; `None` if none is. Of a long log not everything may be named at once: ask
    /// again when the mark is there.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn retention_mark(
        &self,
        conversation: ConversationId,
        limits: RetentionLimits,
    ) -> Result<Option<RetentionMark>, ReadError> {
        let old = match limits.older_than {
            Some(time) => self.last_before(conversation, time)?,
            None => None,
        };
        let excess = match limits.keep_bytes {
            Some(bytes) => self.last_beyond(conversation, bytes)?,
            None => None,
        };
        let Some((low, count)) = old.max(excess) else { return Ok(None) };
        Ok(Some(RetentionMark { low, count, bytes: self.bytes_up_to(conversation, low)? }))
    }

    /// Bytes of the records from the beginning of a conversation's log up to `last`: as the index knows them, and of what
    /// is not settled yet, by reading it.
    fn bytes_up_to(&self, conversation: ConversationId, last: Seq) -> Result<u64, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(0) };
        let (mut next, mut bytes) = (head.low.saturating_add(1), 0u64);
        let view = &self.shared.view;
        if let Some(first) = view.run_at(conversation, next)? {
            let mut cursor = Key::run(conversation, first).into_bytes();
            let end = Key::run(conversation, last.saturating_add(1));
            for _ in 0..INDEX_PAGES_MAX {
                let rows = view
                    .engine()
                    .scan(Table::Run, &cursor, Some(end.as_ref()), Direction::Ascending, INDEX_ROWS)
                    .map_err(|error| view.failed(error))?;
                let Some((last_key, _)) = rows.last() else { break };
                cursor = next_key(last_key);
                for (key, value) in rows {
                    let run = view.placed(conversation, &key, &value)?.run;
                    let upto = run.last().min(last);
                    if upto < next {
                        continue;
                    }
                    let share = upto.since(next.max(run.first)) + 1;
                    bytes += u64::from(run.bytes) * share / run.count.max(1);
                    next = upto.saturating_add(1);
                }
            }
        }
        let mut looked = 0;
        while next <= last && looked < LOOKED_AT_MAX {
            let page = self.records(conversation, next, last, PAGE)?;
            let Some(newest) = page.last() else { break };
            next = newest.seq.saturating_add(1);
            looked += page.len();
            bytes += page.iter().map(|record| bytes_of(conversation, record)).sum::<u64>();
        }
        Ok(bytes)
    }

    fn last_before(
        &self,
        conversation: ConversationId,
        time: UnixMillis,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(None) };
        if head.low >= head.seq {
            return Ok(None);
        }
        // By the index first, which knows of each run how old its newest record is.
        let view = &self.shared.view;
        let mut old = head.low;
        if let Some(first) = view.run_at(conversation, head.low.saturating_add(1))? {
            let mut cursor = Key::run(conversation, first).into_bytes();
            let end = Key::run(conversation, head.seq.saturating_add(1));
            'runs: for _ in 0..INDEX_PAGES_MAX {
                let rows = view
                    .engine()
                    .scan(Table::Run, &cursor, Some(end.as_ref()), Direction::Ascending, INDEX_ROWS)
                    .map_err(|error| view.failed(error))?;
                let Some((last_key, _)) = rows.last() else { break };
                cursor = next_key(last_key);
                for (key, value) in rows {
                    let run = view.placed(conversation, &key, &value)?.run;
                    if run.newest >= time {
                        break 'runs;
                    }
                    old = old.max(run.last().min(head.seq));
                }
            }
        }
        // The rest record by record: a part of one run, and what is not settled yet.
        let (mut from, mut looked, mut mark) = (old.saturating_add(1), 0, None);
        let mut limits = Limits { records: 1, bytes: usize::MAX };
        'records: while looked < LOOKED_AT_MAX && from <= head.seq {
            let page = self.records(conversation, from, head.seq, limits)?;
            limits = PAGE;
            let Some(last) = page.last() else { break };
            from = last.seq.saturating_add(1);
            looked += page.len();
            for record in &page {
                if record.time >= time {
                    break 'records;
                }
                mark = Some((record.seq, record.count));
            }
        }
        if mark.is_none() && old > head.low {
            mark = self.record(conversation, old)?.map(|record| (old, record.count));
        }
        Ok(mark)
    }

    fn last_beyond(
        &self,
        conversation: ConversationId,
        keep_bytes: u64,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(None) };
        let records = head.seq.since(head.low);
        if records.saturating_mul(RECORD_BYTES_MAX) <= keep_bytes {
            return Ok(None);
        }
        let (mut before, mut kept) = (head.seq.saturating_add(1), 0u64);
        // What is not settled yet, record by record; then the index, which knows how long each run is, as far as whole
        // runs are kept; then the run in which the limit lies, record by record again.
        let view = &self.shared.view;
        let settled = match view.run_at(conversation, head.seq)? {
            Some(first) => self.settled_up_to(conversation, first)?,
            None => Seq::ZERO,
        };
        if let Some(mark) = self.walk_back(conversation, &mut before, settled, &mut kept, keep_bytes)? {
            return Ok(Some(mark));
        }
        let from = Key::run(conversation, Seq::ZERO);
        let mut end = Key::run(conversation, before).into_bytes();
        'runs: for _ in 0..INDEX_PAGES_MAX {
            let rows = view
                .engine()
                .scan(Table::Run, from.as_ref(), Some(&end), Direction::Descending, INDEX_ROWS)
                .map_err(|error| view.failed(error))?;
            let Some((first_key, _)) = rows.last() else { break };
            end.clone_from(first_key);
            for (key, value) in rows {
                let run = view.placed(conversation, &key, &value)?.run;
                let follows = run.last().saturating_add(1) == before;
                if !follows || run.first <= head.low || kept + u64::from(run.bytes) > keep_bytes {
                    break 'runs;
                }
                kept += u64::from(run.bytes);
                before = run.first;
            }
        }
        self.walk_back(conversation, &mut before, head.low, &mut kept, keep_bytes)
    }

    /// The last record of the run that begins at `first`.
    fn settled_up_to(&self, conversation: ConversationId, first: Seq) -> Result<Seq, ReadError> {
        let view = &self.shared.view;
        let (from, to) = (Key::run(conversation, first), Key::run(conversation, first.saturating_add(1)));
        let rows = view
            .engine()
            .scan(Table::Run, from.as_ref(), Some(to.as_ref()), Direction::Ascending, 1)
            .map_err(|error| view.failed(error))?;
        let Some((key, value)) = rows.first() else { return Ok(Seq::ZERO) };
        Ok(view.placed(conversation, key, value)?.run.last())
    }

    /// Adds up the records after `down_to` and before `before`, newest first; the one that is beyond `keep_bytes`.
    fn walk_back(
        &self,
        conversation: ConversationId,
        before: &mut Seq,
        down_to: Seq,
        kept: &mut u64,
        keep_bytes: u64,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        while *before > down_to.saturating_add(1) {
            let page = self.records_before(conversation, *before, PAGE)?;
            if page.is_empty() {
                break;
            }
            for record in page.iter().rev() {
                if record.seq <= down_to {
                    return Ok(None);
                }
                *kept = kept.saturating_add(bytes_of(conversation, record));
                if *kept > keep_bytes {
                    return Ok(Some((record.seq, record.count)));
                }
                *before = record.seq;
            }
        }
        Ok(None)
    }
}

/// What a record takes in a run: the same number whether it is settled or not, or marks would jump when it is.
fn bytes_of(conversation: ConversationId, record: &Record) -> u64 {
    let mut bytes = Vec::with_capacity(record.payload.len() + RECORD_HEADER_BYTES_MAX);
    record.encode(conversation, &mut bytes);
    bytes.len() as u64
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_protocol::id::{AppId, DeviceId, Epoch, Pseq, ShardId, UserId};

    use super::*;
    use crate::{ConversationClass, EngineKind, Op, Record, RecordKind, Store, StoreOptions};

    fn conversation(local: u64) -> ConversationId {
        ConversationId::new(local * 256).unwrap()
    }

    fn named(local: u64) -> Op {
        let row = ConversationMeta {
            app: AppId::of("demo"),
            class: ConversationClass::Group,
            name: format!("group {local}"),
            creator: UserId::default(),
            created: UnixMillis::default(),
        };
        Op::NameConversation { conversation: conversation(local), row }
    }

    fn record(n: u64) -> Op {
        let record = Record {
            seq: Seq::new(n).unwrap(),
            kind: RecordKind::Message,
            sender: UserId::new(512).unwrap(),
            device: DeviceId::ZERO,
            epoch: Epoch::ZERO,
            pseq: Pseq::ZERO,
            time: UnixMillis::new(n * 1_000).unwrap(),
            count: n / 2,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::from(vec![7; 968]),
        };
        Op::Append { conversation: conversation(1), record }
    }

    /// Settled as often as `settle_commits` says; a commit is ten records.
    async fn mark_follows(settle_commits: u64) {
        let options =
            StoreOptions { shards: 1, engine: EngineKind::Memory, settle_commits, ..StoreOptions::default() };
        let store = Store::open("unused", &options).unwrap();
        let (mut writer, reader) = store.shard(ShardId::new(0).unwrap()).unwrap();
        let names: Vec<Op> = (1..=5).map(named).collect();
        writer.commit(&names).await.unwrap();
        for n in 0..40 {
            writer.commit(&(10 * n + 1..=10 * n + 10).map(record).collect::<Vec<_>>()).await.unwrap();
        }
        let mut listed: Vec<ConversationId> = Vec::new();
        loop {
            let page = reader.conversations(listed.last().copied(), 2).unwrap();
            if page.is_empty() {
                break;
            }
            listed.extend(page.iter().map(|(conversation, _)| *conversation));
        }
        assert_eq!(listed, (1..=5).map(conversation).collect::<Vec<_>>());

        let mark = |older_than: Option<u64>, keep_bytes: Option<u64>| {
            let older_than = older_than.map(|time| UnixMillis::new(time).unwrap());
            let limits = RetentionLimits { older_than, keep_bytes };
            let mark = reader.retention_mark(conversation(1), limits).unwrap()?;
            let low = reader.head(conversation(1)).unwrap().unwrap().low;
            let about = mark.low.since(low) * 1_000;
            assert!(mark.bytes.abs_diff(about) <= 1_000 + about / 50, "{} of {about} bytes", mark.bytes);
            Some((mark.low.get(), mark.count))
        };
        assert_eq!(mark(None, None), None);
        assert_eq!(mark(Some(1_000), None), None, "the first is just young enough");
        for last in [1, 2, 9, 10, 11, 40, 99, 250, 399] {
            assert_eq!(mark(Some(last * 1_000 + 500), None), Some((last, last / 2)));
        }
        assert_eq!(mark(Some(1 << 40), None), Some((400, 200)));
        assert_eq!(mark(None, Some(10_000_000)), None);
        for keep in [2_000, 10_000, 75_000, 200_000] {
            let (last, count) = mark(None, Some(keep)).unwrap();
            let kept = (400 - last) * 1_000;
            assert!(kept.abs_diff(keep) <= 1_000 + keep / 50, "{kept} of {keep} bytes are kept");
            assert_eq!(count, last / 2);
        }
        let both = mark(Some(40_500), Some(200_000));
        assert_eq!(both, mark(None, Some(200_000)), "whichever takes more");
        let low = Op::Low { conversation: conversation(1), low: Seq::new(305).unwrap(), count: 152 };
        writer.commit(&[low]).await.unwrap();
        assert_eq!(mark(Some(300_500), None), None, "that is gone already");
        assert_eq!(mark(None, Some(100_000)), None);
        assert_eq!(mark(Some(310_500), None), Some((310, 155)));
        assert_eq!(mark(Some(306_500), None), Some((306, 153)));
        let (last, _) = mark(None, Some(20_000)).unwrap();
        assert!((378..=382).contains(&last), "{last}");
        assert_eq!(reader.retention_mark(conversation(2), RetentionLimits::default()), Ok(None));
        store.close().unwrap();
    }

    #[tokio::test]
    async fn the_mark_is_what_is_too_old_or_too_much_settled_or_not() {
        for settle_commits in [1, 3, 12, 1_000] {
            mark_follows(settle_commits).await;
        }
    }
}
