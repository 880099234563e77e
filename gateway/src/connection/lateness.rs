//! How late the thread of a core is, and what follows from it for the sends that come there.
//!
//! - A core's thread has a watch, as it has a desk. Where there is none (one endpoint on shared threads, the simulated world) nothing
//!   is refused for being late.
//! - The age of what is read is asked for when sends come, every few milliseconds at the most: an idle core asks nothing.
//!
//! Not here: who is refused ([`super::turns`]), where the age comes from (`cores`).

use std::{cell::RefCell, fmt, time::Duration};

use fulmar_protocol::close::RefusalCode;
use tokio::time::Instant;

use super::turns::{Offered, Turns};
use crate::{
    conversation::Refusal,
    metrics::{CoreNumber, Metrics},
};

/// Between two looks at how old the packets are that are read.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How long the packet that was read last had waited, if that is known.
pub(crate) type Age = Box<dyn Fn() -> Option<Duration>>;

thread_local! {
    static HERE: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

struct Watch {
    core: CoreNumber,
    age: Age,
    turns: Turns,
    begin: Instant,
    looked: Duration,
    metrics: Metrics,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("core", &self.core).field("turns", &self.turns).finish_non_exhaustive()
    }
}

impl Watch {
    fn tell(&self) {
        let (late, share) = self.turns.state();
        self.metrics.core_lateness.get_or_create(&self.core).set(late.as_secs_f64());
        self.metrics.core_open_share.get_or_create(&self.core).set(share);
    }
}

/// From now on this thread, which is core number `core`, refuses sends when it is late for more than `wait`.
pub(crate) fn open(core: u16, wait: Duration, age: Age, metrics: Metrics) {
    let watch = Watch {
        core: CoreNumber { core },
        age,
        turns: Turns::new(wait),
        begin: Instant::now(),
        looked: Duration::ZERO,
        metrics,
    };
    watch.tell();
    HERE.set(Some(watch));
}

/// This thread is a core no more.
pub(crate) fn close() {
    HERE.set(None);
}

/// Says how late this core is also when nobody sends any more.
pub(crate) fn tell() {
    HERE.with_borrow_mut(|here| {
        if let Some(watch) = here
            && watch.turns.go_on(watch.begin.elapsed())
        {
            watch.tell();
        }
    });
}

/// A send comes by this thread. `fresh`: in a packet whose age is known. Answers if it is refused.
pub(super) fn refuses(offered: Offered, fresh: bool) -> Option<Refusal> {
    HERE.with_borrow_mut(|here| {
        let watch = here.as_mut()?;
        let now = watch.begin.elapsed();
        if fresh && now.saturating_sub(watch.looked) >= LOOK_EVERY {
            watch.looked = now;
            if let Some(age) = (watch.age)() {
                watch.turns.looked(age);
            }
            if watch.turns.go_on(now) {
                watch.tell();
            }
        }
        let wait = watch.turns.offer(offered, now)?;
        watch.metrics.send_turned_away("turn");
        let retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        Some(Refusal { retry_after_ms, ..Refusal::new(RefusalCode::Busy) })
    })
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Producer, Pseq, UserId};

    use super::*;

    fn refused(connections: std::ops::Range<u64>, fresh: bool) -> Vec<u32> {
        let refused = connections.filter_map(|connection| {
            let user = UserId::new(256 + connection).unwrap();
            let producer = Producer { user, device: DeviceId::FIRST, epoch: Epoch::FIRST };
            let lane = (ConversationId::new(256).unwrap(), producer);
            let offered = Offered { app: AppId::of("a"), connection, lane, pseq: Pseq::FIRST, bytes: 1 };
            refuses(offered, fresh)
        });
        refused
            .inspect(|refusal| assert_eq!(refusal.code, RefusalCode::Busy))
            .map(|r| r.retry_after_ms)
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_core_refuses_while_what_it_reads_is_old() {
        assert!(refused(0..100, true).is_empty(), "no core");
        for (age, fresh, late) in
            [(Some(500), true, true), (Some(500), false, false), (None, true, false), (Some(50), true, false)]
        {
            let metrics = Metrics::default();
            open(
                3,
                Duration::from_millis(100),
                Box::new(move || age.map(Duration::from_millis)),
                metrics.clone(),
            );
            let mut told = Vec::new();
            for _ in 0..100 {
                tokio::time::advance(Duration::from_millis(20)).await;
                told.extend(refused(0..100, fresh));
            }
            assert_eq!(!told.is_empty(), late, "{age:?} {fresh}");
            assert!(told.iter().all(|wait| (50..=1_500).contains(wait)));
            let text = metrics.encode();
            let of_core = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}{{core=\"3\"}} ")));
                line.unwrap().parse::<f64>().unwrap()
            };
            assert_eq!(of_core("fulmar_core_open_share") < 1.0, late);
            assert_eq!(of_core("fulmar_core_lateness_seconds") > 0.1, late);
            assert_eq!(text.contains("sends_turned_away_total{reason=\"turn\"}"), late);
            tokio::time::advance(Duration::from_secs(20)).await;
            tell();
            let text = metrics.encode();
            assert!(text.contains("fulmar_core_open_share{core=\"3\"} 1.0"), "nobody sends any more");
            close();
        }
        assert!(refused(0..100, true).is_empty(), "a core no more");
    }
}
