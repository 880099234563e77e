//! One phone to another through the whole gateway, idle: from `send` to the durable ack, and to the delivery; beside a
//! bare quinn round trip and a bare commit, which nothing that is durable and acked over QUIC can do without.
//!
//! Each sample is taken in turns with its floors, so that what else the machine does hits all of them.

use std::{
    fs::File,
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_benches::{
    bare,
    command::Flags,
    meter::Samples,
    payload::Payloads,
    phone::{Phone, Seen, Tokens},
    process::{self, Server},
    report::Report,
};

/// Between two samples: the system is idle when a message comes.
const PAUSE: Duration = Duration::from_millis(2);

/// Samples before those that count.
const WARMING: u64 = 100;

const ANSWER: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    if let Some(code) = process::play() {
        return code;
    }
    let flags = Flags::read();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("end_to_end: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(Box::pin(measure(&flags))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("end_to_end: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(flags: &Flags) -> anyhow::Result<()> {
    let count = flags.pick(5_000, 300);
    let folder = flags.fresh_folder()?;
    let mut payloads = Payloads::new(flags.seed);

    let data = folder.path().join("fulmar");
    let gateway = Server::gateway(&data)?;
    let tokens = Tokens::of(&data)?;
    let endpoints = [bare::client_endpoint(&data)?, bare::client_endpoint(&data)?];
    let [one, other] = &endpoints;
    let mut alice = Phone::connect(one, gateway.address(), tokens.mint("alice")?, 1).await?;
    let mut bob = Phone::connect(other, gateway.address(), tokens.mint("bob")?, 2).await?;
    let conversation = alice.open_direct("bob").await?;

    let bare_folder = folder.path().join("bare");
    let echo = Server::bare(&bare_folder)?;
    let endpoint = bare::client_endpoint(&bare_folder)?;
    let connection = endpoint.connect(echo.address(), "localhost")?.await?;
    let (mut there, mut back) = connection.open_bi().await?;
    there.write_all(b"e").await?;
    let mut log = File::create(folder.path().join("log"))?;

    let [mut round_trip, mut commit, mut floor, mut acked, mut delivered] =
        [(); 5].map(|()| Samples::default());
    let cpu = gateway.cpu()?;
    for number in 0..WARMING + count {
        let body = payloads.message();

        tokio::time::sleep(PAUSE).await;
        let at = Instant::now();
        let mut answer = vec![0; body.len()];
        there.write_all(&body).await?;
        back.read_exact(&mut answer).await?;
        let tripped = at.elapsed();
        anyhow::ensure!(answer == body, "the echo is another");

        tokio::time::sleep(PAUSE).await;
        let at = Instant::now();
        log.write_all(&body)?;
        log.sync_data()?;
        let committed = at.elapsed();

        // Acks and receipts of the message before are none of this one's business.
        settle(&mut alice, &mut bob).await?;
        let at = Instant::now();
        anyhow::ensure!(alice.send(conversation, body.clone())?, "no room");
        let both = tokio::time::timeout(ANSWER, watch(&mut alice, &mut bob, &body, at));
        let (ack, delivery) = both.await.context("no answer")??;

        if number >= WARMING {
            round_trip.add_us(tripped);
            commit.add_us(committed);
            floor.add_us(tripped + committed);
            acked.add_us(ack);
            delivered.add_us(delivery);
        }
    }
    let cpu = (gateway.cpu()? - cpu).as_secs_f64() * 1e6 / (WARMING + count) as f64;

    let idle = gateway.cpu()?;
    let seconds = flags.pick(10, 2);
    let quiet = async {
        loop {
            settle(&mut alice, &mut bob).await?;
        }
    };
    tokio::time::timeout(Duration::from_secs(seconds), quiet).await.unwrap_or_else(|_| anyhow::Ok(()))?;
    let idle = (gateway.cpu()? - idle).as_secs_f64() * 1e3 / seconds as f64;

    let mut report = Report::new("end_to_end", flags.quick);
    for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
        report.record(format!("bare round trip: {name}"), "µs", round_trip.quantile(share));
        report.record(format!("bare commit: {name}"), "µs", commit.quantile(share));
    }
    for (what, samples) in [("durable ack", &acked), ("delivered", &delivered)] {
        for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            let (value, floor) = (samples.quantile(share), floor.quantile(share));
            report.beside(format!("send → {what}: {name}"), "µs", value, ("round trip + commit", floor));
            if share == 0.5 {
                report.bar(
                    "≤ p50 of round trip + p50 of commit + 50 µs",
                    value <= round_trip.median() + commit.median() + 50.0,
                );
            } else if share == 0.99 {
                report.bar("≤ 3 × p50", value <= 3.0 * samples.median());
            }
        }
    }
    report.record("CPU of the gateway, pauses included", "µs/message", cpu);
    report.record("CPU of the gateway when nothing happens", "ms/s", idle);
    report.note(format!(
        "{count} messages with lengths as people write, one at a time, {PAUSE:?} between; floor and gateway in turns; both \
         phones in one thread"
    ));
    report.note("every message is its own commit: one fdatasync per message");
    report.finish(flags.json.as_deref())?;
    Ok(())
}

/// Takes what comes for a while.
async fn settle(alice: &mut Phone, bob: &mut Phone) -> anyhow::Result<()> {
    let quiet = async {
        loop {
            tokio::select! {
                seen = alice.next() => seen?,
                seen = bob.next() => seen?,
            };
        }
    };
    tokio::time::timeout(PAUSE, quiet).await.unwrap_or(Ok(()))
}

/// When the ack and the delivery of `body` came, counted from `at`.
async fn watch(
    alice: &mut Phone,
    bob: &mut Phone,
    body: &Bytes,
    at: Instant,
) -> anyhow::Result<(Duration, Duration)> {
    let (mut ack, mut delivery) = (None, None);
    loop {
        if let (Some(ack), Some(delivery)) = (ack, delivery) {
            return Ok((ack, delivery));
        }
        tokio::select! {
            seen = alice.next() => if let Seen::Acked(..) = seen? {
                ack = Some(at.elapsed());
            },
            seen = bob.next() => if let Seen::Delivered(record) = seen? && record.payload == body {
                delivery = Some(at.elapsed());
            },
        }
    }
}
