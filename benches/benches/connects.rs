//! What a connect costs the server, beside a bare quinn server with the same TLS and transport settings that answers one byte:
//!
//! - **full**: a TLS handshake with certificate and signature. To the gateway with a token by a new user (a commit or two, durable
//!   before its WELCOME), and once more by a device that comes back with its resume ticket and writes nothing.
//! - **TLS ticket**: a session is taken up, nothing is sent early. To the gateway with the resume ticket.
//! - **0-RTT**: the same, and HELLO with the resume ticket (to the floor: its byte) leaves in the first flight.
//!
//! Every phone has TLS sessions of its own, so many connect at a time, and who has its WELCOME leaves. Floor and gateway take turns. A
//! connect includes what the phone's leaving costs.
//!
//! Not here: storms and what they do to others (`fulmar-load --storm`), what was missed meanwhile (`fulmar-peers --work D`).

use std::{
    collections::VecDeque,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fulmar_benches::{
    bare,
    command::Flags,
    meter::Samples,
    phone::{Away, Phone, Road, Tokens},
    process::{self, Server},
    report::Report,
};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rustls::client::Resumption;

/// The `fulmar` binary's, for the floor as well.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Connects under way at the same time.
const AT_ONCE: usize = 32;

/// What the last connections of a part leave to be done is waited for.
const SETTLE: Duration = Duration::from_millis(200);

/// TLS sessions a phone keeps.
const SESSIONS: usize = 4;

fn main() -> ExitCode {
    if let Some(code) = process::play() {
        return code;
    }
    let flags = Flags::read();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("connects: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(Box::pin(measure(&flags))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("connects: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// CPU of the server and elapsed time, microseconds per connect; a sample per round.
#[derive(Default)]
struct Cost {
    cpu: Samples,
    time: Samples,
}

/// A server, and how it is reached.
struct Side {
    server: Server,
    endpoint: quinn::Endpoint,
    tls: rustls::ClientConfig,
}

impl Side {
    fn new(server: Server, folder: &std::path::Path) -> anyhow::Result<Self> {
        let mut tls = bare::client_tls(&folder.join("tls/cert.pem"))?;
        tls.alpn_protocols = vec![fulmar_protocol::version::ALPN.to_vec()];
        tls.enable_early_data = true;
        let endpoint = bare::client_endpoint(folder)?;
        Ok(Self { server, endpoint, tls })
    }

    /// The settings of one phone, which has no TLS session yet.
    fn phone(&self) -> anyhow::Result<quinn::ClientConfig> {
        let mut tls = self.tls.clone();
        tls.resumption = Resumption::in_memory_sessions(SESSIONS);
        bare::client_config(tls)
    }

    fn road(&self, config: &quinn::ClientConfig, early: bool) -> Road<'_> {
        let config = Some(config.clone());
        Road { endpoint: &self.endpoint, server: self.server.address(), config, early }
    }

    /// Does the work for all of them, so many at a time, and takes down what each cost the server.
    async fn all<I, T, F: Future<Output = anyhow::Result<T>>>(
        &self,
        cost: &mut Cost,
        items: impl IntoIterator<Item = I>,
        mut work: impl FnMut(I) -> F,
    ) -> anyhow::Result<Vec<T>> {
        let mut waiting: VecDeque<I> = items.into_iter().collect();
        let count = waiting.len() as f64;
        let mut running = FuturesUnordered::new();
        let mut done = Vec::with_capacity(waiting.len());
        let (cpu, began) = (self.server.cpu()?, Instant::now());
        loop {
            while running.len() < AT_ONCE
                && let Some(item) = waiting.pop_front()
            {
                running.push(work(item));
            }
            match running.next().await {
                Some(result) => done.push(result?),
                None => break,
            }
        }
        let took = began.elapsed();
        tokio::time::sleep(SETTLE).await;
        cost.cpu.add((self.server.cpu()? - cpu).as_secs_f64() * 1e6 / count);
        cost.time.add(took.as_secs_f64() * 1e6 / count);
        Ok(done)
    }
}

/// A phone between two connects to the gateway.
struct Known {
    away: Away,
    config: quinn::ClientConfig,
}

async fn again(side: &Side, known: Known, early: bool) -> anyhow::Result<Known> {
    let Known { away, config } = known;
    let phone = away.reconnect_by(side.road(&config, early)).await.map_err(|(_, error)| error)?;
    Ok(Known { away: phone.leave(), config })
}

async fn measure(flags: &Flags) -> anyhow::Result<()> {
    let rounds = flags.pick(7, 2);
    let count = flags.pick(2_000, 300);
    let folder = flags.fresh_folder()?;
    let data = folder.path().join("fulmar");
    let gateway = Side::new(Server::gateway(&data)?, &data)?;
    let tokens = Tokens::of(&data)?;
    let bare_folder = folder.path().join("bare");
    let floor = Side::new(Server::bare(&bare_folder)?, &bare_folder)?;

    let [mut bare_full, mut bare_ticket, mut bare_early] = [(); 3].map(|()| Cost::default());
    let [mut new, mut back, mut ticket, mut early] = [(); 4].map(|()| Cost::default());
    let mut number = 0u128;
    for _ in 0..rounds {
        let configs = (0..count).map(|_| floor.phone()).collect::<anyhow::Result<Vec<_>>>()?;
        let configs = floor.all(&mut bare_full, configs, |config| shake_hands(&floor, config, false)).await?;
        let phones = (0..count).map(|_| {
            number += 1;
            Ok((number, tokens.mint(&format!("phone-{number}"))?, gateway.phone()?))
        });
        let phones = phones.collect::<anyhow::Result<Vec<_>>>()?;
        let phones = gateway.all(&mut new, phones, async |(number, token, config)| {
            let phone = Phone::connect_by(gateway.road(&config, false), token, number).await?;
            Ok(Known { away: phone.leave(), config })
        });
        let phones = phones.await?;
        let configs =
            floor.all(&mut bare_ticket, configs, |config| shake_hands(&floor, config, false)).await?;
        let phones = gateway.all(&mut ticket, phones, |known| again(&gateway, known, false)).await?;
        floor.all(&mut bare_early, configs, |config| shake_hands(&floor, config, true)).await?;
        let phones = gateway.all(&mut early, phones, |known| again(&gateway, known, true)).await?;
        // TLS knows nothing of them any more.
        let phones =
            phones.into_iter().map(|Known { away, .. }| Ok(Known { away, config: gateway.phone()? }));
        let phones = phones.collect::<anyhow::Result<Vec<_>>>()?;
        gateway.all(&mut back, phones, |known| again(&gateway, known, false)).await?;
    }

    let mut report = Report::new("connects", flags.quick);
    for (what, cost, floor) in [
        ("new user, full handshake", &new, &bare_full),
        ("comes back, full handshake", &back, &bare_full),
        ("comes back, TLS ticket", &ticket, &bare_ticket),
        ("comes back, 0-RTT", &early, &bare_early),
    ] {
        let (ours, bare) = (cost.cpu.median(), floor.cpu.median());
        report.beside(format!("{what}: CPU of the gateway"), "µs", ours, ("bare", bare));
        report.bar("≤ 1.5 × bare", ours <= 1.5 * bare);
    }
    for (what, cost) in [
        ("bare, full handshake", &bare_full),
        ("bare, TLS ticket", &bare_ticket),
        ("bare, 0-RTT", &bare_early),
        ("new user, full handshake", &new),
        ("comes back, full handshake", &back),
        ("comes back, TLS ticket", &ticket),
        ("comes back, 0-RTT", &early),
    ] {
        report.record(format!("{what}: both ends together"), "per s", 1e6 / cost.time.median());
    }
    report.note(format!(
        "{count} connects a part and round, {AT_ONCE} at a time, medians of {rounds} rounds, floor and gateway in turns; all \
         clients in one thread of one process"
    ));
    report.note("CPU of the server's process, user and kernel, until the phone has left");
    report.finish(flags.json.as_deref())?;
    Ok(())
}

/// Connects to the floor, exchanges a byte and leaves, as a phone does after its WELCOME.
async fn shake_hands(
    floor: &Side,
    config: quinn::ClientConfig,
    early: bool,
) -> anyhow::Result<quinn::ClientConfig> {
    let (connection, completed) = floor.road(&config, early).open().await?;
    let (mut there, mut back) = connection.open_bi().await?;
    there.write_all(b"e!").await?;
    let mut answer = [0];
    back.read_exact(&mut answer).await.context("the echo")?;
    anyhow::ensure!(answer == *b"!", "the echo is another");
    if let Some(completed) = completed {
        anyhow::ensure!(completed.await, "early data was not taken");
    }
    connection.close(0u8.into(), b"");
    Ok(config)
}
