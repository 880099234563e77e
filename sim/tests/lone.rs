//! A message that travels alone and is lost, with real quinn in virtual time: exact, and the same for every run of a seed.
#![expect(clippy::expect_used, reason = "helpers of tests")]

use std::time::Duration;

use fulmar_sim::{
    Path, Share, World,
    net::{Delay, Impairment, Loss},
};

const RTT: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// A path of [`RTT`] whose packets take up to `jitter` percent less or more.
fn path(jitter: u32, up: Share, down: Share) -> Path {
    let way = |loss| Impairment {
        delay: Delay::fixed(RTT / 2 - RTT / 2 * jitter / 100).with_jitter(RTT * jitter / 100),
        loss: Loss::random(loss),
        ..Impairment::default()
    };
    Path { up: way(up), down: way(down) }
}

/// Round trips the way of a lone message takes whose packet is lost.
fn lone(seed: u64, jitter: u32, way: Way) -> f64 {
    let (none, all) = (Share::NONE, Share::ALL);
    let ended = World::new(seed).path(path(jitter, none, none)).run(async move |sim| {
        let (writer, reader) = (sim.phone("alice"), sim.phone("bob"));
        let alice = writer.connect().await?;
        let bob = reader.connect().await?;
        let mut inbox = bob.messages();
        let to_bob = alice.direct("bob").await?;
        for n in 0..12 {
            to_bob.send(format!("before {n}")).await?.acked().await?;
            sim.sleep(Duration::from_secs(1)).await;
        }
        let said_at = sim.now();
        let (who, up, down, dark) = match way {
            Way::Up => (&writer, all, none, RTT / 4),
            Way::Down => (&reader, none, all, RTT * 9 / 10),
        };
        who.set_path(path(jitter, up, down));
        to_bob.send("lone").await?;
        sim.sleep(dark).await;
        who.set_path(path(jitter, none, none));
        loop {
            let message = inbox.next().await.ok_or_else(|| anyhow::anyhow!("bob's client ended"))?;
            if &message.payload[..] == b"lone" {
                return Ok(sim.now().since(said_at));
            }
        }
    });
    // The way that lost nothing takes half a round trip.
    ended.value.expect("it arrives").as_secs_f64() / RTT.as_secs_f64() - 0.5
}

#[test]
fn a_lone_lost_message_takes_less_than_two_round_trips() {
    for way in [Way::Up, Way::Down] {
        for (jitter, p50_max, p95_max) in [(0, 1.8, 1.8), (30, 2.1, 2.4)] {
            let mut took: Vec<f64> = (0..20).map(|seed| lone(seed, jitter, way)).collect();
            took.sort_by(f64::total_cmp);
            let (p50, p95) = (took[took.len() / 2], took[took.len() * 9 / 10]);
            assert!(p50 <= p50_max && p95 <= p95_max, "{way:?}, jitter {jitter} %: {took:.2?} RTT");
        }
    }
}
