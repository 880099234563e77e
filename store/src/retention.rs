//! What retention needs to know of a shard: which conversations there are, and up to where one may be forgotten.
//!
//! - Nothing is changed here: moving the mark is [`crate::Op::Low`], in a commit like any other.
//! - Records of a conversation never go back in time, so what is too old is a prefix of the log.
//!
//! Not here: what is to be kept, and when to look (the gateway).

use fulmar_protocol::id::{ConversationId, Seq, UnixMillis};

use crate::{
    error::ReadError,
    key::{Key, Table},
    reader::ShardReader,
    row::ConversationMeta,
    shard::view::Limits,
};

/// What is beyond what is to be kept. `None` in both: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionLimits {
    /// Records stored before this are too old.
    pub older_than: Option<UnixMillis>,
    /// Bytes of records, the newest ones, that are kept.
    pub keep_bytes: Option<u64>,
}

/// Records looked at in one answer, so that no answer takes long: what is left is found by asking again.
const LOOKED_AT_MAX: usize = 16_384;

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

    /// The last record that is beyond `limits`, and its `count`; `None` if none is. Of a long log not everything may be
    /// named at once: ask again when the mark is there.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn retention_mark(
        &self,
        conversation: ConversationId,
        limits: RetentionLimits,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        let old = match limits.older_than {
            Some(time) => self.last_before(conversation, time)?,
            None => None,
        };
        let excess = match limits.keep_bytes {
            Some(bytes) => self.last_beyond(conversation, bytes)?,
            None => None,
        };
        Ok(old.max(excess))
    }

    fn last_before(
        &self,
        conversation: ConversationId,
        time: UnixMillis,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(None) };
        let (mut from, mut looked, mut mark) = (head.low.saturating_add(1), 0, None);
        while looked < LOOKED_AT_MAX && from <= head.seq {
            let page = self.records(conversation, from, head.seq, PAGE)?;
            let Some(last) = page.last() else { break };
            from = last.seq.saturating_add(1);
            looked += page.len();
            for record in &page {
                if record.time >= time {
                    return Ok(mark);
                }
                mark = Some((record.seq, record.count));
            }
        }
        Ok(mark)
    }

    fn last_beyond(
        &self,
        conversation: ConversationId,
        keep_bytes: u64,
    ) -> Result<Option<(Seq, u64)>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(None) };
        let (mut before, mut kept) = (head.seq.saturating_add(1), 0u64);
        while before > head.low.saturating_add(1) {
            let page = self.records_before(conversation, before, PAGE)?;
            let Some(first) = page.first() else { break };
            before = first.seq;
            for record in page.iter().rev() {
                kept = kept.saturating_add(record.weight() as u64);
                if kept > keep_bytes {
                    return Ok(Some((record.seq, record.count)));
                }
            }
        }
        Ok(None)
    }
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
            silent: false,
            payload: Bytes::from(vec![7; 936]),
        };
        Op::Append { conversation: conversation(1), record }
    }

    #[tokio::test]
    async fn the_mark_is_what_is_too_old_or_too_much_and_moves_with_low() {
        let options = StoreOptions { shards: 1, engine: EngineKind::Memory, ..StoreOptions::default() };
        let store = Store::open("unused", &options).unwrap();
        let (mut writer, reader) = store.shard(ShardId::new(0).unwrap()).unwrap();
        let names: Vec<Op> = (1..=5).map(named).collect();
        writer.commit(&names).await.unwrap();
        writer.commit(&(1..=100).map(record).collect::<Vec<_>>()).await.unwrap();
        let mut listed = Vec::new();
        while let Some((last, _)) = {
            let page = reader.conversations(listed.last().copied(), 2).unwrap();
            listed.extend(page.iter().map(|(conversation, _)| *conversation));
            page.into_iter().last()
        } {
            assert!(listed.len() <= 5, "{last} again");
        }
        assert_eq!(listed, (1..=5).map(conversation).collect::<Vec<_>>());

        let mark = |older_than: Option<u64>, keep_bytes: Option<u64>| {
            let older_than = older_than.map(|time| UnixMillis::new(time).unwrap());
            let limits = RetentionLimits { older_than, keep_bytes };
            reader.retention_mark(conversation(1), limits).unwrap().map(|(seq, count)| (seq.get(), count))
        };
        assert_eq!(mark(None, None), None);
        assert_eq!(mark(Some(1_000), None), None, "the first is just young enough");
        assert_eq!(mark(Some(40_500), None), Some((40, 20)));
        assert_eq!(mark(Some(1 << 40), None), Some((100, 50)));
        assert_eq!(mark(None, Some(10_000)), Some((90, 45)), "ten records of 1 000 bytes stay");
        assert_eq!(mark(None, Some(100_000)), None);
        assert_eq!(mark(Some(40_500), Some(50_000)), Some((50, 25)), "whichever takes more");
        let low = Op::Low { conversation: conversation(1), low: Seq::new(60).unwrap(), count: 30 };
        writer.commit(&[low]).await.unwrap();
        assert_eq!(mark(Some(40_500), Some(50_000)), None, "that is gone already");
        assert_eq!(mark(Some(70_500), None), Some((70, 35)));
        assert_eq!(reader.retention_mark(conversation(2), RetentionLimits::default()), Ok(None));
        store.close().unwrap();
    }
}
