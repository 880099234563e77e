//! The weak-network figures, measured in the world: exact, and the same every time. `cargo xtask bars --help`.
//!
//! - Each figure stands beside its bar. Round trips are those of the path between a phone and the gateway.
//! - Where one direction is measured, the other phone stands beside the gateway: from a send to its read is half a round trip.
//! - "Read" is the moment the other user's app is handed the message, "acked" the moment the sender's app is told.
//!
//! Not here: what stock quinn and TCP give in the same network (docs), noisy measurements in real time (`benches/netlab`).

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use fulmar_client::{Client, ConnectionState, Conversation, NetworkKind};
use fulmar_sim::net::{Delay, Impairment, Loss, Path};
use fulmar_sim::{Direction, Phone, Profile, Rng, Share, Sim, World};
use tokio::time::Instant;

/// Measures what the weak-network bars are about, in virtual time
#[derive(Debug, Parser)]
struct Args {
    /// Only figures whose names hold this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Worlds for each figure that depends on chance
    #[arg(long, value_name = "N", default_value_t = 4)]
    worlds: u64,
    /// Writes the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
    /// Writes the event log of the last world
    #[arg(long, value_name = "FILE")]
    log: Option<std::path::PathBuf>,
}

/// Where the event log of the last world goes.
static LOG: OnceLock<std::path::PathBuf> = OnceLock::new();

/// The round trip of most figures.
const RTT: Duration = Duration::from_millis(100);

/// One line of the result.
#[derive(Clone, Debug)]
struct Figure {
    name: String,
    got: f64,
    unit: &'static str,
    bar: f64,
    samples: usize,
}

type Measured = anyhow::Result<Vec<Figure>>;
type Bar = (&'static str, fn(u64) -> Measured);

const BARS: &[Bar] = &[
    ("lone-loss-up", |worlds| lone_loss(worlds, Direction::Up, Duration::ZERO)),
    ("lone-loss-down", |worlds| lone_loss(worlds, Direction::Down, Duration::ZERO)),
    ("lone-loss-up-jitter", |worlds| lone_loss(worlds, Direction::Up, Duration::from_millis(30))),
    ("lone-loss-down-jitter", |worlds| lone_loss(worlds, Direction::Down, Duration::from_millis(30))),
    ("chat-5-percent", chat_at_loss),
    ("connect-5-percent", connect_at_loss),
    ("mobile-profile", mobile_profile),
    ("reconnect-queued", reconnect_with_queued),
    ("network-change", network_change),
    ("nat-rebinding", nat_rebinding),
    ("blackout", blackout),
    ("gateway-restart", gateway_restart),
    ("udp-blocked", udp_blocked),
    ("resume-5000", resume_of_many),
    ("wire-bytes", wire_bytes),
    ("idle-packets", idle_packets),
    ("live-during-pull", live_during_pull),
    ("pull-long-roads", pull_over_long_roads),
];

fn main() -> ExitCode {
    match work(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(args: &Args) -> anyhow::Result<()> {
    if let Some(file) = &args.log {
        LOG.get_or_init(|| file.clone());
    }
    let chosen: Vec<&Bar> =
        BARS.iter().filter(|(name, _)| args.only.as_ref().is_none_or(|only| name.contains(only))).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<52}{:>12}{:>12}  {:<8}{:>9}", "figure", "measured", "bar", "", "samples")?;
    let mut all = Vec::new();
    for (name, measure) in chosen {
        match measure(args.worlds) {
            Ok(figures) => {
                for figure in figures {
                    let verdict = if figure.got <= figure.bar { "ok" } else { "MISSED" };
                    let (got, bar) =
                        (format!("{:.2} {}", figure.got, figure.unit), format!("{:.2}", figure.bar));
                    writeln!(
                        out,
                        "{:<52}{got:>12}{bar:>12}  {verdict:<8}{:>9}",
                        figure.name, figure.samples
                    )?;
                    all.push(figure);
                }
            }
            Err(error) => writeln!(out, "{name:<52}  not measured: {error:#}")?,
        }
        out.flush()?;
    }
    if let Some(file) = &args.json {
        let json: Vec<_> = all
            .iter()
            .map(|figure| {
                serde_json::json!({
                    "name": figure.name, "measured": figure.got, "unit": figure.unit, "bar": figure.bar,
                    "samples": figure.samples,
                })
            })
            .collect();
        std::fs::write(file, serde_json::to_vec_pretty(&json)?)?;
    }
    Ok(())
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A path with this round trip and nothing else.
fn plain(rtt: Duration) -> Path {
    Path::symmetric(Impairment { delay: Delay::fixed(rtt / 2), ..Impairment::default() })
}

fn lossy(rtt: Duration, percent: u32) -> Path {
    Path::symmetric(Impairment {
        delay: Delay::fixed(rtt / 2),
        loss: Loss::random(Share::percent(percent)),
        ..Impairment::default()
    })
}

/// The time that `percent` of all stay within.
fn at(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    let index = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(index).copied().unwrap_or(Duration::MAX)
}

fn rtts(name: &str, time: Duration, bar: f64, samples: usize) -> Figure {
    let got = time.as_secs_f64() / RTT.as_secs_f64();
    Figure { name: name.to_owned(), got, unit: "RTT", bar, samples }
}

fn millis(name: &str, time: Duration, bar: f64, samples: usize) -> Figure {
    Figure { name: name.to_owned(), got: time.as_secs_f64() * 1_000.0, unit: "ms", bar, samples }
}

/// When the app on a phone was handed which message.
#[derive(Clone, Default)]
struct Inbox {
    seen: Arc<Mutex<BTreeMap<u64, Instant>>>,
}

impl Inbox {
    /// Reads everything a client gets.
    fn of(client: &Client) -> Self {
        let inbox = Self::default();
        let (mut messages, seen) = (client.messages(), Arc::clone(&inbox.seen));
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                if let Some(number) = message.payload.first_chunk() {
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.entry(u64::from_be_bytes(*number)).or_insert_with(Instant::now);
                }
            }
        });
        inbox
    }

    fn at(&self, number: u64) -> Option<Instant> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&number).copied()
    }

    /// Waits for a message; how long after `since` it came.
    async fn wait(&self, number: u64, since: Instant) -> anyhow::Result<Duration> {
        for _ in 0..600_000 {
            if let Some(at) = self.at(number) {
                return Ok(at.saturating_duration_since(since));
            }
            tokio::time::sleep(ms(1)).await;
        }
        anyhow::bail!("message {number} did not come within ten minutes")
    }
}

/// 100 bytes that begin with a number.
fn message(number: u64) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(100, b'.');
    payload
}

/// Two users who are live and know each other.
struct Pair {
    alice_phone: Phone,
    bob_phone: Phone,
    alice: Client,
    bob: Client,
    to_bob: Conversation,
    to_alice: Conversation,
    inbox: Inbox,
    alice_inbox: Inbox,
}

async fn live(client: &Client) -> anyhow::Result<()> {
    let reached = tokio::time::timeout(Duration::from_secs(600), client.state().live()).await;
    anyhow::ensure!(reached.context("not live within ten minutes")?, "the client closed");
    Ok(())
}

/// Waits until the gateway has answered for the first time.
async fn welcomed(client: &Client) -> anyhow::Result<()> {
    let mut states = client.state();
    let answered = async {
        while let Some(state) = states.next().await {
            if matches!(state, ConnectionState::Syncing | ConnectionState::Live) {
                return true;
            }
        }
        false
    };
    let answered = tokio::time::timeout(Duration::from_secs(600), answered).await;
    anyhow::ensure!(answered.context("no answer within ten minutes")?, "the client closed");
    Ok(())
}

impl Pair {
    async fn meet(sim: &Sim) -> anyhow::Result<Self> {
        Self::meet_with(sim, None).await
    }

    /// The same with the phone at the far end of this direction beside the gateway, so that only one way counts.
    async fn meet_with(sim: &Sim, only: Option<Direction>) -> anyhow::Result<Self> {
        let (alice_phone, bob_phone) = (sim.phone("alice"), sim.phone("bob"));
        match only {
            Some(Direction::Up) => bob_phone.set_path(plain(Duration::ZERO)),
            Some(Direction::Down) => alice_phone.set_path(plain(Duration::ZERO)),
            None => {}
        }
        let (alice, bob) = (alice_phone.connect().await?, bob_phone.connect().await?);
        live(&alice).await?;
        live(&bob).await?;
        let to_bob = alice.direct("bob").await?;
        to_bob.resolved().await?;
        let to_alice = bob.direct("alice").await?;
        to_alice.resolved().await?;
        let (inbox, alice_inbox) = (Inbox::of(&bob), Inbox::of(&alice));
        // Estimates of the round trip settle.
        for number in 0..20 {
            to_bob.send(message(1_000_000 + number)).await?.acked().await?;
            to_alice.send(message(2_000_000 + number)).await?.acked().await?;
        }
        sim.sleep(Duration::from_secs(3)).await;
        Ok(Self { alice_phone, bob_phone, alice, bob, to_bob, to_alice, inbox, alice_inbox })
    }
}

/// Runs one measurement in several worlds and puts the results together.
fn in_worlds<T: Send + 'static>(
    worlds: u64,
    path: &Path,
    measure: impl AsyncFn(&Sim, Rng) -> anyhow::Result<Vec<T>> + Clone + Send + 'static,
) -> anyhow::Result<Vec<T>> {
    let mut all = Vec::new();
    for seed in 0..worlds {
        let measure = measure.clone();
        let world = World::new(seed).path(path.clone()).limit(Duration::from_secs(100_000));
        let world = world.keep_log(LOG.get().is_some());
        let ended = world.run(async move |sim| measure(sim, Rng::new(seed).fork(9)).await);
        if let (Some(file), Some(log)) = (LOG.get(), ended.log) {
            std::fs::write(file, log)?;
        }
        all.extend(ended.value?);
    }
    Ok(all)
}

fn lone_loss(worlds: u64, direction: Direction, jitter: Duration) -> Measured {
    // The mean stays half a round trip.
    let way =
        Impairment { delay: Delay::fixed(RTT / 2 - jitter / 2).with_jitter(jitter), ..Impairment::default() };
    let mut times = in_worlds(worlds, &Path::symmetric(way), async move |sim, mut rng| {
        let pair = Pair::meet_with(sim, Some(direction)).await?;
        let mut times = Vec::new();
        for number in 0..50 {
            // Messages that are not lost come between: the loss is a lone one, not the manner of the path.
            for other in 0..6 {
                sim.sleep(rng.duration(ms(1_000), ms(4_000))).await;
                pair.to_bob.send(message(3_000_000 + number * 10 + other)).await?;
            }
            sim.sleep(rng.duration(ms(2_000), ms(5_000))).await;
            let since = Instant::now();
            if direction == Direction::Up {
                pair.alice_phone.cut(Direction::Up, true);
                pair.to_bob.send(message(number)).await?;
                sim.sleep(ms(3)).await;
                pair.alice_phone.cut(Direction::Up, false);
            } else {
                pair.to_bob.send(message(number)).await?;
                let lost = sim.bites().of(fulmar_sim::Bite::OneWayCut);
                pair.bob_phone.cut(Direction::Down, true);
                while sim.bites().of(fulmar_sim::Bite::OneWayCut) == lost && since.elapsed() < RTT * 3 {
                    sim.sleep(ms(1)).await;
                }
                pair.bob_phone.cut(Direction::Down, false);
            }
            times.push(pair.inbox.wait(number, since).await?);
        }
        Ok(times)
    })?;
    let count = times.len();
    let what = if direction == Direction::Up { "up" } else { "down" };
    let jittered = if jitter.is_zero() { "" } else { ", 30 % jitter" };
    let mut figures =
        vec![rtts(&format!("lone message lost {what}{jittered}: read p50"), at(&mut times, 50), 1.8, count)];
    figures.push(rtts(
        &format!("lone message lost {what}{jittered}: read p95"),
        at(&mut times, 95),
        2.3,
        count,
    ));
    Ok(figures)
}

/// (read, acked) of messages sent once in `every`.
async fn chat(
    sim: &Sim,
    only: Option<Direction>,
    count: u64,
    every: Duration,
) -> anyhow::Result<Vec<(Duration, Duration)>> {
    let pair = Pair::meet_with(sim, only).await?;
    let acks: Arc<Mutex<BTreeMap<u64, Duration>>> = Arc::default();
    let mut sent = Vec::new();
    for number in 0..count {
        let since = Instant::now();
        let handle = pair.to_bob.send(message(number)).await?;
        let acks = Arc::clone(&acks);
        tokio::spawn(async move {
            if handle.acked().await.is_ok() {
                acks.lock().unwrap_or_else(PoisonError::into_inner).insert(number, since.elapsed());
            }
        });
        sent.push((number, since));
        sim.sleep(every).await;
    }
    let mut times = Vec::new();
    for (number, since) in sent {
        let read = pair.inbox.wait(number, since).await?;
        loop {
            let acked = acks.lock().unwrap_or_else(PoisonError::into_inner).get(&number).copied();
            if let Some(acked) = acked {
                times.push((read, acked));
                break;
            }
            sim.sleep(ms(10)).await;
        }
    }
    Ok(times)
}

fn chat_at_loss(worlds: u64) -> Measured {
    let mut figures = Vec::new();
    for (direction, what) in [(Direction::Up, "up"), (Direction::Down, "down")] {
        let times = in_worlds(worlds, &lossy(RTT, 5), async move |sim, _| {
            chat(sim, Some(direction), 400, ms(1_000)).await
        })?;
        let (mut reads, mut acks): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        let count = reads.len();
        figures.push(rtts(
            &format!("chat at 5 % loss, {what}: send to read p99"),
            at(&mut reads, 99),
            2.0,
            count,
        ));
        if direction == Direction::Up {
            figures.push(rtts("chat at 5 % loss: send to ack p99", at(&mut acks, 99), 2.5, count));
        }
    }
    Ok(figures)
}

fn mobile_profile(worlds: u64) -> Measured {
    let path = Profile::MobileTail.path();
    let times = in_worlds(worlds, &path, async |sim, _| chat(sim, None, 300, ms(2_000)).await)?;
    let (_, mut acks): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let count = acks.len();
    Ok(vec![
        millis("mobile profile: send to ack p50", at(&mut acks, 50), f64::INFINITY, count),
        millis("mobile profile: send to ack p99", at(&mut acks, 99), 3_000.0, count),
    ])
}

fn connect_at_loss(worlds: u64) -> Measured {
    let times = in_worlds(worlds, &lossy(RTT, 5), async |sim, _| {
        let mut times = Vec::new();
        for number in 0..60 {
            let phone = sim.phone(&format!("user-{number}"));
            let since = Instant::now();
            let client = phone.connect().await?;
            welcomed(&client).await?;
            let full = since.elapsed();
            sim.sleep(ms(2_000)).await;
            // TLS sessions are kept by a client and end with it: an app that was restarted has its ticket only.
            client.suspend().await?;
            sim.sleep(ms(2_000)).await;
            let since = Instant::now();
            client.resume().await?;
            welcomed(&client).await?;
            times.push((full, since.elapsed()));
            client.close().await?;
        }
        Ok(times)
    })?;
    let (mut full, mut again): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let count = full.len();
    Ok(vec![
        millis("connect at 5 % loss, full: answer p50", at(&mut full, 50), f64::INFINITY, count),
        millis("connect at 5 % loss, full: answer p99", at(&mut full, 99), 800.0, count),
        millis("connect at 5 % loss, 0-RTT: answer p50", at(&mut again, 50), f64::INFINITY, count),
        millis("connect at 5 % loss, 0-RTT: answer p99", at(&mut again, 99), 500.0, count),
    ])
}

fn reconnect_with_queued(_: u64) -> Measured {
    let times = in_worlds(1, &plain(RTT), async |sim, _| {
        let pair = Pair::meet(sim).await?;
        let mut times = Vec::new();
        for number in 0..10 {
            pair.alice.suspend().await?;
            sim.sleep(ms(5_000)).await;
            let handle = pair.to_bob.send(message(number)).await?;
            let packets = pair.alice_phone.traffic().sent_packets;
            pair.alice.resume().await?;
            while pair.alice_phone.traffic().sent_packets == packets {
                sim.sleep(ms(1)).await;
            }
            let since = Instant::now();
            handle.acked().await?;
            times.push(since.elapsed());
            sim.sleep(ms(3_000)).await;
        }
        Ok(times)
    })?;
    let mut times = times;
    let count = times.len();
    // One round trip, and the millisecond of the disk.
    Ok(vec![rtts("reconnect with queued send, ticket: ack p50", at(&mut times, 50), 1.05, count)])
}

fn network_change(_: u64) -> Measured {
    let mut figures = Vec::new();
    for (what, dark, told, follow, extra) in [
        ("OS event", false, true, true, 50),
        ("OS event, path dark for 250 ms", true, true, true, 250),
        ("no event, socket goes on", false, false, true, 1_350),
        ("no event, socket dead", false, false, false, 1_350),
        ("OS event, socket dead", false, true, false, 50),
    ] {
        let times = in_worlds(1, &plain(RTT), async move |sim, _| {
            let pair = Pair::meet(sim).await?;
            pair.alice_phone.sockets_follow(follow);
            let mut times = Vec::new();
            for number in 0..20 {
                pair.alice_phone.change_network(plain(RTT));
                if dark {
                    pair.alice_phone.black_out(ms(250));
                }
                let since = Instant::now();
                if told {
                    pair.alice.network_changed(Phone::hint(NetworkKind::Cellular)).await?;
                }
                let up = pair.to_bob.send(message(2 * number)).await?;
                pair.to_alice.send(message(2 * number + 1)).await?;
                let acked = async {
                    up.acked().await?;
                    anyhow::Ok(since.elapsed())
                };
                let (acked, down) = tokio::join!(acked, pair.alice_inbox.wait(2 * number + 1, since));
                times.push((acked?, down?));
                sim.sleep(ms(10_000)).await;
            }
            Ok(times)
        })?;
        let (mut ups, mut downs): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        let (bar, count) = (f64::from(150 + extra), ups.len());
        figures.push(millis(
            &format!("network change, {what}: own send acked p50"),
            at(&mut ups, 50),
            bar,
            count,
        ));
        figures.push(millis(
            &format!("network change, {what}: other's read p50"),
            at(&mut downs, 50),
            bar,
            count,
        ));
    }
    Ok(figures)
}

fn nat_rebinding(_: u64) -> Measured {
    let times = in_worlds(1, &plain(RTT), async |sim, _| {
        let pair = Pair::meet(sim).await?;
        let before = pair.alice.traffic().connections;
        let mut times = Vec::new();
        for number in 0..20 {
            pair.alice_phone.rebind_nat();
            let since = Instant::now();
            pair.to_bob.send(message(number)).await?.acked().await?;
            times.push(since.elapsed());
            sim.sleep(ms(5_000)).await;
        }
        anyhow::ensure!(pair.alice.traffic().connections == before, "it connected again");
        Ok(times)
    })?;
    let mut times = times;
    let count = times.len();
    Ok(vec![rtts("NAT rebinding: send to ack p99 (1 without)", at(&mut times, 99), 2.05, count)])
}

fn blackout(_: u64) -> Measured {
    let mut figures = Vec::new();
    for seconds in [2, 10, 60] {
        for told in [true, false] {
            let times = in_worlds(1, &plain(RTT), async move |sim, mut rng| {
                let pair = Pair::meet(sim).await?;
                let mut times = Vec::new();
                for number in 0..12 {
                    let lasts = Duration::from_secs(seconds) + rng.duration(Duration::ZERO, ms(500));
                    pair.alice_phone.black_out(lasts);
                    let end = Instant::now() + lasts;
                    sim.sleep(rng.duration(ms(10), lasts / 2)).await;
                    let handle = pair.to_bob.send(message(number)).await?;
                    tokio::time::sleep_until(end).await;
                    if told {
                        pair.alice.network_changed(Phone::hint(NetworkKind::Cellular)).await?;
                    }
                    handle.acked().await?;
                    times.push(end.elapsed());
                    sim.sleep(ms(20_000)).await;
                }
                Ok(times)
            })?;
            let mut times = times;
            let (bar, what) = if told { (300.0, "with event") } else { (1_200.0, "no event") };
            let count = times.len();
            figures.push(millis(
                &format!("blackout {seconds} s, {what}: ack p50"),
                at(&mut times, 50),
                bar,
                count,
            ));
            figures.push(millis(
                &format!("blackout {seconds} s, {what}: ack worst"),
                at(&mut times, 100),
                bar,
                count,
            ));
        }
    }
    Ok(figures)
}

fn gateway_restart(worlds: u64) -> Measured {
    let times = in_worlds(worlds, &plain(RTT), async |sim, mut rng| {
        let pair = Pair::meet(sim).await?;
        let mut times = Vec::new();
        for number in 0..10 {
            sim.gateway().crash().await;
            sim.sleep(rng.duration(ms(100), ms(6_000))).await;
            sim.gateway().start().await?;
            let since = Instant::now();
            let handle = pair.to_bob.send(message(number)).await?;
            handle.acked().await?;
            let acked = since.elapsed();
            times.push((acked, pair.inbox.wait(number, since).await?));
            sim.sleep(ms(40_000)).await;
        }
        Ok(times)
    })?;
    // Who sends notices at once; who only listens is told by the next process.
    let (mut acked, mut read): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let count = acked.len();
    Ok(vec![
        millis("gateway killed, who sends: acked again p50", at(&mut acked, 50), 2_200.0, count),
        millis("gateway killed, who sends: acked again worst", at(&mut acked, 100), 2_200.0, count),
        millis("gateway killed, who only listens: read again p50", at(&mut read, 50), 2_200.0, count),
        millis("gateway killed, who only listens: read again worst", at(&mut read, 100), 2_200.0, count),
    ])
}

fn udp_blocked(_: u64) -> Measured {
    let mut times = in_worlds(1, &plain(RTT), async |sim, _| {
        let bob = sim.phone("bob").connect().await?;
        live(&bob).await?;
        let mut times = Vec::new();
        for number in 0..5 {
            let phone = sim.phone(&format!("alice-{number}"));
            // The gateway knows the device already, and the device the conversation: a new one waits a round trip for its epoch, and
            // another one for the number of a name it never had. Neither depends on the way.
            let client = phone.connect().await?;
            live(&client).await?;
            client.direct("bob").await?.resolved().await?;
            client.close().await?;
            drop(client);
            phone.block(true, false);
            let client = phone.connect().await?;
            let since = Instant::now();
            let handle = client.direct("bob").await?.send(message(number)).await?;
            let acked = tokio::time::timeout(Duration::from_secs(30), handle.acked()).await;
            acked.context("nothing gets through where UDP is blocked")??;
            let cold = since.elapsed();
            // QUIC is given its time before it counts as blocked.
            sim.sleep(ms(3_000)).await;
            client.close().await?;
            drop((handle, client));
            sim.sleep(ms(5_000)).await;
            let client = phone.connect().await?;
            let since = Instant::now();
            client.direct("bob").await?.send(message(number)).await?.acked().await?;
            times.push((cold, since.elapsed()));
            client.close().await?;
        }
        Ok(times)
    })?;
    times.sort_unstable();
    let (mut cold, mut known): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let count = cold.len();
    Ok(vec![
        millis("UDP blocked, first message, cold: ack p50", at(&mut cold, 50), 550.0, count),
        millis("UDP blocked, first message, remembered: ack p50", at(&mut known, 50), 310.0, count),
    ])
}

fn resume_of_many(_: u64) -> Measured {
    const ROOMS: u64 = 5_000;
    let bytes = in_worlds(1, &plain(RTT), async |sim, _| {
        let (alice_phone, bob_phone) = (sim.phone("alice"), sim.phone("bob"));
        let (alice, bob) = (alice_phone.connect().await?, bob_phone.connect().await?);
        live(&alice).await?;
        live(&bob).await?;
        let mut rooms = Vec::new();
        let mut making = Vec::new();
        for number in 0..ROOMS {
            let bob = bob.clone();
            making.push(tokio::spawn(async move {
                bob.create_group(&format!("room-{number}"), &["alice"]).await
            }));
            if making.len() >= 32 {
                for made in making.drain(..) {
                    rooms.push(made.await??);
                }
            }
        }
        for made in making {
            rooms.push(made.await??);
        }
        // Alice's phone takes it all in.
        sim.sleep(Duration::from_secs(60)).await;
        alice.suspend().await?;
        sim.sleep(Duration::from_secs(10)).await;
        for (number, room) in rooms.iter().step_by(2_000).take(3).enumerate() {
            room.send(message(number as u64)).await?.acked().await?;
        }
        let before = alice_phone.traffic();
        alice.resume().await?;
        live(&alice).await?;
        sim.sleep(Duration::from_secs(3)).await;
        let after = alice_phone.traffic();
        Ok(vec![after.sent_bytes + after.received_bytes - before.sent_bytes - before.received_bytes])
    })?;
    let bytes = bytes.first().copied().unwrap_or(u64::MAX);
    let got = bytes as f64 / 1_000.0;
    Ok(vec![Figure {
        name: "5 000 conversations, 3 changed: resume, handshake included".to_owned(),
        got,
        unit: "kB",
        bar: 3.0,
        samples: 1,
    }])
}

fn wire_bytes(_: u64) -> Measured {
    let all = in_worlds(1, &plain(RTT), async |sim, _| {
        let pair = Pair::meet(sim).await?;
        let mut figures = Vec::new();
        for (each, pause) in [(1u64, ms(3_000)), (10, ms(3_000))] {
            let rounds = 50;
            let (sender, reader) = (pair.alice_phone.traffic(), pair.bob_phone.traffic());
            for round in 0..rounds {
                for number in 0..each {
                    pair.to_bob.send(message(round * each + number)).await?;
                }
                sim.sleep(pause).await;
            }
            let count = (rounds * each) as f64;
            let (sent, read) = (pair.alice_phone.traffic(), pair.bob_phone.traffic());
            figures.push((
                each,
                (sent.sent_bytes - sender.sent_bytes) as f64 / count,
                (read.received_bytes - reader.received_bytes) as f64 / count,
            ));
        }
        Ok(figures)
    })?;
    let mut figures = Vec::new();
    for (each, up, down) in all {
        let bar = if each == 1 { 150.0 } else { 125.0 };
        for (what, got) in [("sender's uplink", up), ("reader's downlink", down)] {
            let name = format!("bytes per 100 B message, {each} at a time: {what}");
            figures.push(Figure { name, got, unit: "B", bar, samples: 50 });
        }
    }
    Ok(figures)
}

fn idle_packets(_: u64) -> Measured {
    let all = in_worlds(1, &plain(RTT), async |sim, _| {
        let pair = Pair::meet(sim).await?;
        // What it learns about the network it learns first.
        sim.sleep(Duration::from_secs(3_600)).await;
        let before = pair.alice_phone.traffic();
        sim.sleep(Duration::from_secs(3_600)).await;
        let after = pair.alice_phone.traffic();
        live(&pair.bob).await?;
        Ok(vec![after.sent_packets + after.received_packets - before.sent_packets - before.received_packets])
    })?;
    let got = all.first().copied().unwrap_or(u64::MAX) as f64;
    Ok(vec![Figure {
        name: "idle phone: packets per hour, both ways".to_owned(),
        got,
        unit: "",
        bar: 60.0,
        samples: 1,
    }])
}

/// Messages of 4 000 bytes in the history that is pulled, and how much they are in all.
const PULLED_BYTES: u64 = 50_000_000;

fn live_during_pull(_: u64) -> Measured {
    let mut slow = plain(RTT);
    for way in [&mut slow.up, &mut slow.down] {
        way.rate = Some(fulmar_sim::net::Rate::kbit(2_000, 64_000));
    }
    let all = in_worlds(1, &plain(RTT), async move |sim, mut rng| {
        let pair = Pair::meet(sim).await?;
        // What fills the history is random, so that nothing can be squeezed out of it.
        for number in 0..PULLED_BYTES / 16_000 {
            let mut payload = (3_000_000 + number).to_be_bytes().to_vec();
            payload.extend((0..2_000).flat_map(|_| rng.next_u64().to_be_bytes()));
            payload.truncate(16_000);
            let handle = pair.to_alice.send(payload).await?;
            if number % 32 == 31 {
                handle.acked().await?;
            }
        }
        sim.sleep(Duration::from_secs(20)).await;
        // Another device of alice's, whose database is empty, in a slow network.
        let tablet = sim.phone("alice");
        tablet.set_path(slow.clone());
        let client = tablet.connect().await?;
        live(&client).await?;
        let inbox = Inbox::of(&client);
        let began = Instant::now();
        let mut during = Vec::new();
        for number in 0..100 {
            let since = Instant::now();
            pair.to_alice.send(message(number)).await?;
            during.push(inbox.wait(number, since).await?);
            sim.sleep(ms(1_000)).await;
        }
        let pulled = tablet.traffic().received_bytes;
        let busy = began.elapsed();
        // Idle: when nothing has come for a while.
        let mut idle = Vec::new();
        let mut before = 0;
        while tablet.traffic().received_bytes > before + 20_000 {
            before = tablet.traffic().received_bytes;
            sim.sleep(Duration::from_secs(10)).await;
        }
        for number in 200..300 {
            let since = Instant::now();
            pair.to_alice.send(message(number)).await?;
            idle.push(inbox.wait(number, since).await?);
            sim.sleep(ms(1_000)).await;
        }
        let _ = busy;
        Ok(vec![(at(&mut during, 99), at(&mut idle, 99), pulled)])
    })?;
    let (during, idle, pulled) = all.first().copied().context("no figure")?;
    let bar = idle.as_secs_f64() * 1_000.0 + 100.0;
    let name = format!("live p99 during a pull ({:.1} MB came meanwhile)", pulled as f64 / 1e6);
    Ok(vec![millis(&name, during, bar, 100)])
}

/// What is pulled over a long road.
const LONG_ROAD_BYTES: u64 = 3_000_000;

/// A history over 2 Mbit/s: it takes as long as the road needs for its bytes, and a few round trips.
fn pull_over_long_roads(_: u64) -> Measured {
    let mut figures = Vec::new();
    for rtt in [ms(100), ms(300), ms(700)] {
        let mut slow = plain(rtt);
        for way in [&mut slow.up, &mut slow.down] {
            way.rate = Some(fulmar_sim::net::Rate::kbit(2_000, 64_000));
        }
        let all = in_worlds(1, &plain(RTT), async move |sim, mut rng| {
            let pair = Pair::meet(sim).await?;
            // A fifth more than is waited for: the last of it need not fill the road.
            for number in 0..LONG_ROAD_BYTES * 6 / 5 / 16_000 {
                let mut payload = (3_000_000 + number).to_be_bytes().to_vec();
                payload.extend((0..2_000).flat_map(|_| rng.next_u64().to_be_bytes()));
                payload.truncate(16_000);
                let handle = pair.to_alice.send(payload).await?;
                if number % 32 == 31 {
                    handle.acked().await?;
                }
            }
            sim.sleep(Duration::from_secs(20)).await;
            let tablet = sim.phone("alice");
            tablet.set_path(slow.clone());
            let client = tablet.connect().await?;
            live(&client).await?;
            let (began, before) = (Instant::now(), tablet.traffic().received_bytes);
            while tablet.traffic().received_bytes < before + LONG_ROAD_BYTES {
                anyhow::ensure!(began.elapsed() < Duration::from_secs(300), "the history does not come");
                sim.sleep(ms(20)).await;
            }
            Ok(vec![began.elapsed()])
        })?;
        let got = all.first().copied().context("no figure")?;
        let road = LONG_ROAD_BYTES as f64 * 8.0 / 2_000_000.0;
        let name = format!("pull of 3 MB over 2 Mbit/s, {} ms", rtt.as_millis());
        let bar = road * 1.1 + 12.0 * rtt.as_secs_f64();
        figures.push(Figure { name, got: got.as_secs_f64(), unit: "s", bar, samples: 1 });
    }
    Ok(figures)
}
