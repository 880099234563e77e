//! Races of a phone for a connection, against a real gateway: several attempts say HELLO, and each may be answered.

use std::time::Duration;

use fulmar_client::{ConnectionState, RecordKind};
use fulmar_sim::{
    Path, World,
    net::{Delay, Impairment},
};

fn path(rtt_ms: u64) -> Path {
    Path::symmetric(Impairment {
        delay: Delay::fixed(Duration::from_millis(rtt_ms / 2)),
        ..Impairment::default()
    })
}

/// The network has become slower than it is known to be, so each attempt is overdue before it is answered, and all of them are
/// answered. One wins; the WELCOMEs that come late, and the sessions behind them, disturb nobody.
#[test]
fn welcomes_of_attempts_that_lost_come_late_and_disturb_nobody() -> anyhow::Result<()> {
    let ended = World::new(1).path(path(50)).run(async |sim| {
        let (phone, other) = (sim.phone("alice"), sim.phone("bob"));
        let (alice, bob) = (phone.connect().await?, other.connect().await?);
        let to_bob = alice.direct("bob").await?;
        to_bob.send("before").await?.acked().await?;
        sim.sleep(Duration::from_secs(5)).await;
        for rtt in [400, 600] {
            alice.suspend().await?;
            sim.sleep(Duration::from_secs(5)).await;
            phone.set_path(path(rtt));
            let (before, attempts) = (alice.traffic().connections, alice.attempts().len());
            let queued = to_bob.send(format!("queued at {rtt} ms")).await?;
            let since = sim.now();
            alice.resume().await?;
            queued.acked().await?;
            let took = sim.now().since(since);
            anyhow::ensure!(took < Duration::from_millis(rtt + 50), "the first attempt wins: {took:?}");
            // As long as whatever is on its way may take.
            sim.sleep(Duration::from_secs(20)).await;
            let tried = alice.attempts().len() - attempts;
            anyhow::ensure!(tried >= 3, "{tried} attempts");
            anyhow::ensure!(alice.traffic().connections == before + 1, "one connection was enough");
            anyhow::ensure!(alice.state().current() == ConnectionState::Live);
            to_bob.send("after").await?.acked().await?;
            phone.set_path(path(50));
            sim.sleep(Duration::from_secs(60)).await;
        }
        let mut inbox = bob.messages();
        let mut texts = Vec::new();
        while texts.len() < 5 {
            let message = inbox.next().await.ok_or_else(|| anyhow::anyhow!("bob's client ended"))?;
            if message.kind == RecordKind::Message {
                texts.push(String::from_utf8_lossy(&message.payload).into_owned());
            }
        }
        Ok(texts)
    });
    let texts = ended.value?;
    assert_eq!(texts, ["before", "queued at 400 ms", "after", "queued at 600 ms", "after"]);
    Ok(())
}

/// An attempt takes what it takes, and on a network that is as it was nobody helps it.
#[test]
fn on_a_network_that_is_known_one_attempt_is_made_and_is_timed() -> anyhow::Result<()> {
    let rtt = 300;
    let ended = World::new(2).path(path(rtt)).run(async |sim| {
        sim.phone("bob").connect().await?;
        let alice = sim.phone("alice").connect().await?;
        let to_bob = alice.direct("bob").await?;
        to_bob.send("before").await?.acked().await?;
        sim.sleep(Duration::from_secs(5)).await;
        let mut made = Vec::new();
        for _ in 0..3 {
            alice.suspend().await?;
            sim.sleep(Duration::from_secs(5)).await;
            let before = alice.attempts().len();
            let queued = to_bob.send("queued").await?;
            alice.resume().await?;
            queued.acked().await?;
            sim.sleep(Duration::from_secs(5)).await;
            made.push(alice.attempts().split_off(before));
        }
        Ok(made)
    });
    for attempts in ended.value? {
        assert_eq!(attempts.len(), 1, "{attempts:?}");
        assert!(attempts.iter().all(|attempt| attempt.took >= Duration::from_millis(rtt)), "{attempts:?}");
    }
    Ok(())
}
