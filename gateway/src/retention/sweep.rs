//! Walks over a shard's conversations and has the marks moved of those that keep more than they should.
//!
//! - A page of conversations at a time and so many per second; no page while the shard is busy or can't write.
//! - Reads on a thread that may wait; the mark is moved by the shard's own commit, through its bounded queue.
//! - What can't be read is left as it is, reported once per sweep, and the next conversation is looked at.
//!
//! Not here: what is kept (`policy`), which time it is (`clock`), the commit (`conversation::shard`).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fulmar_protocol::id::{ConversationId, Seq, ShardId, UnixMillis};
use fulmar_store::{ConversationMeta, ReadError, RetentionLimits, RetentionMark, ShardReader};
use tracing::{debug, info, warn};

use super::{
    clock::{LOOK_EVERY, SteadyClock},
    policy::{Kept, Policy},
};
use crate::{
    config::RetentionConfig,
    conversation::{
        Command, Refusal,
        shard::{QUEUE_MAX, ShardHandle},
    },
    ground::{blocking, now, unix_now},
    metrics::Metrics,
};

/// Conversations looked at in one go.
const PAGE: usize = 64;

/// Commands that wait for the shard from which on it counts as busy.
const BUSY: usize = QUEUE_MAX / 16;

/// How long the sweep rests when the shard is busy or can't write.
const REST: Duration = Duration::from_millis(500);

/// Times one conversation is asked about in one sweep: of a long log a mark is found in steps.
const STEPS_MAX: usize = 64;

/// What a sweep reads.
pub trait Ground: Clone + Send + 'static {
    /// The next conversations.
    ///
    /// # Errors
    /// They can't be read.
    fn conversations(
        &self,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<(ConversationId, ConversationMeta)>, ReadError>;

    /// The last record of a conversation that is beyond `limits`.
    ///
    /// # Errors
    /// The conversation can't be read.
    fn mark(
        &self,
        conversation: ConversationId,
        limits: RetentionLimits,
    ) -> Result<Option<RetentionMark>, ReadError>;
}

impl Ground for ShardReader {
    fn conversations(
        &self,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<(ConversationId, ConversationMeta)>, ReadError> {
        Self::conversations(self, after, limit)
    }

    fn mark(
        &self,
        conversation: ConversationId,
        limits: RetentionLimits,
    ) -> Result<Option<RetentionMark>, ReadError> {
        self.retention_mark(conversation, limits)
    }
}

/// Who moves marks, and whether that is a bad moment.
pub trait Trims {
    /// Moves the beginning of a conversation behind `low`; how many records went.
    ///
    /// # Errors
    /// Not now.
    fn trim(
        &self,
        conversation: ConversationId,
        low: Seq,
        count: u64,
    ) -> impl Future<Output = Result<u64, Refusal>> + Send;

    /// Whether the sweep should rest.
    fn is_busy(&self) -> bool;
}

impl Trims for ShardHandle {
    async fn trim(&self, conversation: ConversationId, low: Seq, count: u64) -> Result<u64, Refusal> {
        self.ask(|answer| Command::Trim { conversation, low, count, answer }).await
    }

    fn is_busy(&self) -> bool {
        self.queued() >= BUSY || self.fault.borrow().is_some()
    }
}

/// Sweeps one shard.
#[derive(Debug)]
pub struct Sweeper {
    policy: Arc<Policy>,
    metrics: Metrics,
    clock: SteadyClock,
    every: Duration,
    per_second: u32,
}

/// What one sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Swept {
    conversations: u64,
    records: u64,
    unreadable: u64,
}

/// What is known of one conversation of a page.
struct Found {
    conversation: ConversationId,
    limits: RetentionLimits,
    mark: Result<Option<RetentionMark>, ReadError>,
}

impl Sweeper {
    /// As configured.
    #[must_use]
    pub fn new(config: &RetentionConfig, policy: Arc<Policy>, metrics: Metrics) -> Self {
        Self {
            policy,
            metrics,
            clock: SteadyClock::new(Duration::from_secs(config.clock_settle_s)),
            every: Duration::from_secs(config.sweep_s),
            per_second: config.conversations_per_second.max(1),
        }
    }

    /// Sweeps until it is dropped.
    pub async fn run(mut self, shard: ShardHandle) {
        let id = shard.reader.shard();
        loop {
            let started = now();
            match self.sweep(&shard.reader, &shard).await {
                Ok(swept) => self.tell(id, swept, started),
                Err(error) => warn!(shard = %id, %error, "a retention sweep was broken off"),
            }
            while let Some(rest) = self
                .every
                .checked_sub(now().saturating_duration_since(started))
                .filter(|rest| !rest.is_zero())
            {
                tokio::time::sleep(rest.min(LOOK_EVERY)).await;
                self.look();
            }
        }
    }

    fn tell(&self, shard: ShardId, swept: Swept, started: Instant) {
        self.metrics.retention_swept(shard, unix_now().get() / 1_000);
        let Swept { conversations, records, unreadable } = swept;
        let took = now().saturating_duration_since(started);
        if records > 0 {
            info!(%shard, conversations, records, ?took, "retention took records away");
        } else {
            debug!(%shard, conversations, ?took, "retention found nothing to take away");
        }
        if unreadable > 0 {
            warn!(%shard, conversations = unreadable, "conversations could not be read and were left as they are");
        }
    }

    fn look(&mut self) -> Option<UnixMillis> {
        self.clock.look(unix_now(), now())
    }

    /// Looks at every conversation once.
    async fn sweep(&mut self, ground: &impl Ground, shard: &impl Trims) -> Result<Swept, ReadError> {
        let mut swept = Swept::default();
        let mut after = None;
        loop {
            while shard.is_busy() {
                tokio::time::sleep(REST).await;
            }
            let began = now();
            let time = self.look();
            let Some((last, looked, page)) = self.page(ground, after, time).await? else { return Ok(swept) };
            after = Some(last);
            swept.conversations += looked;
            self.metrics.retention_conversations.inc_by(looked);
            for found in page {
                let trimmed = self.trim(ground, shard, found).await;
                match trimmed {
                    Ok(records) => {
                        swept.records += records;
                        self.metrics.retention_records.inc_by(records);
                    }
                    Err(conversation) => {
                        swept.unreadable += 1;
                        debug!(%conversation, "retention can't read it");
                    }
                }
            }
            let pace = Duration::from_secs_f64(looked as f64 / f64::from(self.per_second));
            tokio::time::sleep(pace.saturating_sub(now().saturating_duration_since(began))).await;
        }
    }

    /// The next page: its last conversation, how many it had, and those that are not kept whole.
    async fn page<G: Ground>(
        &self,
        ground: &G,
        after: Option<ConversationId>,
        time: Option<UnixMillis>,
    ) -> Result<Option<(ConversationId, u64, Vec<Found>)>, ReadError> {
        let (ground, policy) = (ground.clone(), Arc::clone(&self.policy));
        let limit = PAGE.min(usize::try_from(self.per_second).unwrap_or(PAGE)).max(1);
        let read = blocking(move || {
            let page = ground.conversations(after, limit)?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            let (last, looked) = (*last, page.len() as u64);
            let found = page.into_iter().filter_map(|(conversation, meta)| {
                let limits = limits(policy.kept(meta.app, meta.class), time)?;
                let mark = ground.mark(conversation, limits);
                (!matches!(mark, Ok(None))).then_some(Found { conversation, limits, mark })
            });
            Ok(Some((last, looked, found.collect())))
        });
        // A panic of the store while it reads ends this sweep as an empty page does; it has been reported.
        read.await.unwrap_or(Ok(None))
    }

    /// Moves the mark of one conversation, in as many steps as it takes. The conversation, if it can't be read.
    async fn trim<G: Ground>(
        &self,
        ground: &G,
        shard: &impl Trims,
        found: Found,
    ) -> Result<u64, ConversationId> {
        let Found { conversation, limits, mut mark } = found;
        let mut records = 0;
        for _ in 0..STEPS_MAX {
            let Some(RetentionMark { low, count, bytes }) = mark.map_err(|_| conversation)? else { break };
            match shard.trim(conversation, low, count).await {
                Ok(0) => break,
                Ok(went) => {
                    records += went;
                    self.metrics.retention.inc_by(bytes);
                }
                Err(refusal) => {
                    // The next sweep finds it again.
                    debug!(%conversation, code = %refusal.code, "the shard can't move a mark now");
                    break;
                }
            }
            let ground = ground.clone();
            let next = blocking(move || ground.mark(conversation, limits));
            mark = next.await.unwrap_or(Ok(None));
        }
        Ok(records)
    }
}

/// What is beyond what is kept; `None`: nothing is, or nothing that can be said without knowing the time.
fn limits(kept: Kept, time: Option<UnixMillis>) -> Option<RetentionLimits> {
    let before = |age: u64| Some(UnixMillis::new(time?.get().checked_sub(age)?).unwrap_or_default());
    let limits = RetentionLimits { older_than: kept.age_ms.and_then(before), keep_bytes: kept.bytes };
    (limits != RetentionLimits::default()).then_some(limits)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use fulmar_protocol::{close::RefusalCode, id::AppId};

    use super::*;
    use crate::{
        config::{Config, retention::Keep},
        conversation::ConversationClass,
    };

    fn conversation(n: u64) -> ConversationId {
        ConversationId::new(n * 256).unwrap()
    }

    /// Conversations of 100 records; a mark is found in steps of 10.
    #[derive(Clone, Default)]
    struct Shard {
        low: Arc<Mutex<BTreeMap<ConversationId, u64>>>,
        asked: Arc<Mutex<Vec<RetentionLimits>>>,
        pages: Arc<AtomicUsize>,
        busy: Arc<AtomicUsize>,
        refuses: Option<ConversationId>,
        damaged: Option<ConversationId>,
    }

    impl Shard {
        fn of(conversations: u64) -> Self {
            let shard = Self::default();
            shard.low.lock().unwrap().extend((1..=conversations).map(|n| (conversation(n), 0)));
            shard
        }

        fn lows(&self) -> Vec<u64> {
            self.low.lock().unwrap().values().copied().collect()
        }
    }

    impl Ground for Shard {
        fn conversations(
            &self,
            after: Option<ConversationId>,
            limit: usize,
        ) -> Result<Vec<(ConversationId, ConversationMeta)>, ReadError> {
            self.pages.fetch_add(1, Ordering::SeqCst);
            let meta = |conversation: ConversationId| ConversationMeta {
                app: AppId::of("demo"),
                class: if (conversation.get() / 256).is_multiple_of(2) {
                    ConversationClass::Direct
                } else {
                    ConversationClass::Group
                },
                name: String::new(),
                creator: fulmar_protocol::id::UserId::default(),
                created: UnixMillis::default(),
            };
            let low = self.low.lock().unwrap();
            let after = low.keys().filter(|conversation| after.is_none_or(|after| **conversation > after));
            Ok(after.take(limit).map(|conversation| (*conversation, meta(*conversation))).collect())
        }

        fn mark(
            &self,
            conversation: ConversationId,
            limits: RetentionLimits,
        ) -> Result<Option<RetentionMark>, ReadError> {
            self.asked.lock().unwrap().push(limits);
            if self.damaged == Some(conversation) {
                let shard = ShardId::new(0).unwrap();
                let what = "a run".to_owned();
                return Err(ReadError::Damaged { shard, conversation: Some(conversation), seq: None, what });
            }
            let low = self.low.lock().unwrap()[&conversation];
            let mark = RetentionMark { low: Seq::new(low + 10).unwrap(), count: low + 10, bytes: 1_000 };
            Ok((low < 60).then_some(mark))
        }
    }

    impl Trims for Shard {
        async fn trim(&self, conversation: ConversationId, low: Seq, count: u64) -> Result<u64, Refusal> {
            assert_eq!(low.get(), count);
            if self.refuses == Some(conversation) {
                return Err(RefusalCode::StorageFull.into());
            }
            let mut lows = self.low.lock().unwrap();
            let before = lows.insert(conversation, low.get()).unwrap();
            Ok(low.get() - before)
        }

        fn is_busy(&self) -> bool {
            self.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        }
    }

    fn sweeper(change: impl FnOnce(&mut RetentionConfig)) -> Sweeper {
        let mut config = Config::in_folder("unused");
        config.retention.conversations_per_second = 100_000;
        change(&mut config.retention);
        let policy = Arc::new(Policy::new(&config.retention, &config.apps));
        Sweeper::new(&config.retention, policy, Metrics::default())
    }

    #[tokio::test(start_paused = true)]
    async fn every_conversation_is_looked_at_and_moved_in_steps() {
        let shard = Shard { busy: Arc::new(AtomicUsize::new(3)), ..Shard::of(200) };
        let mut sweeper = sweeper(|config| config.group_bytes = Keep::at(1 << 20));
        let swept = sweeper.sweep(&shard, &shard).await.unwrap();
        assert_eq!(swept, Swept { conversations: 200, records: 6_000, unreadable: 0 });
        assert_eq!(sweeper.metrics.retention.get(), 600_000);
        assert_eq!(shard.pages.load(Ordering::SeqCst), 5, "four pages, and one that ends it");
        assert_eq!(shard.busy.load(Ordering::SeqCst), 0, "it rested while the shard was busy");
        for (n, low) in shard.lows().into_iter().enumerate() {
            assert_eq!(low, if n % 2 == 0 { 60 } else { 0 }, "groups only");
        }
        let kept = RetentionLimits { older_than: None, keep_bytes: Some(1 << 20) };
        assert!(shard.asked.lock().unwrap().iter().all(|asked| *asked == kept));
        let again = sweeper.sweep(&shard, &shard).await.unwrap();
        assert_eq!(again, Swept { conversations: 200, records: 0, unreadable: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_goes_by_age_until_the_clock_is_believed() {
        let shard = Shard::of(2);
        let mut sweeper = sweeper(|config| config.age = Keep::at(86_400_000));
        sweeper.sweep(&shard, &shard).await.unwrap();
        assert_eq!((shard.lows(), shard.asked.lock().unwrap().len()), (vec![0, 0], 0));
        sweeper.clock = SteadyClock::new(Duration::ZERO);
        sweeper.look();
        sweeper.sweep(&shard, &shard).await.unwrap();
        assert_eq!(shard.lows(), [60, 60]);
        let before = shard.asked.lock().unwrap()[0].older_than.unwrap();
        assert!(before.get() <= unix_now().get() - 86_400_000);
    }

    #[tokio::test(start_paused = true)]
    async fn what_can_not_be_read_or_moved_is_left_and_the_others_go_on() {
        let shard = Shard { refuses: Some(conversation(1)), damaged: Some(conversation(2)), ..Shard::of(4) };
        let mut sweeper = sweeper(|config| config.bytes = Keep::at(1 << 20));
        let swept = sweeper.sweep(&shard, &shard).await.unwrap();
        assert_eq!(swept, Swept { conversations: 4, records: 120, unreadable: 1 });
        assert_eq!(shard.lows(), [0, 0, 60, 60]);
    }
}
