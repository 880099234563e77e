//! Playing one scene: phones that chat in pairs behind a bad network, the script of what happens to that network, and
//! the judgement of what came through.
//!
//! - Phones and network are new for every scene: what one teaches the SDK does not help in the next.
//! - Every wait has an end. A scene that can't be played is an outcome with a problem, not the end of the run.
//! - A scene that is interrupted is judged by what it was: what had not arrived is not lost.

use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use fulmar_badnet::checker::{Rules, check};
use fulmar_badnet::dialogue;
use fulmar_badnet::fault::{Fault, Target};
use fulmar_badnet::history::{Conversation as Room, Event};
use fulmar_badnet::{Proxy, Rng, proxy};
use fulmar_client::{
    AttemptOutcome, Client, Conversation, Database, Durability, NetworkHint, NetworkKind, Options,
    TransportKind, Trust,
};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::board::{Board, Standing, client_of};
use super::live::{Live, Stage};
use super::outcome::{Mark, Outcome};
use super::scene::{Act, Ends, Scene};
use crate::cli::rehearsal::{GatewayProcess, again, number, tokens};

/// How long all phones of a scene may take until they are connected and have opened their conversations.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(45);

/// How long everything may take to arrive once nothing more is sent.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// After everything is there: what comes twice would come now.
const CALM: Duration = Duration::from_millis(400);

/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How often we look whether everything is there.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Every phone says something this often.
const PACE: Duration = Duration::from_secs(1);

/// Messages of a burst.
const BURST: u32 = 5;

/// Lines of explanation that are kept.
const PROBLEMS_MAX: usize = 40;

/// What every scene is played with.
pub(super) struct Stand<'a> {
    pub(super) gateway: &'a mut GatewayProcess,
    /// The gateway's data folder.
    pub(super) data: &'a FilePath,
    /// Where the phones keep their databases.
    pub(super) databases: &'a FilePath,
    pub(super) live: &'a Arc<Live>,
    /// Becomes true when the user wants an end.
    pub(super) stop: watch::Receiver<bool>,
    pub(super) phones: usize,
    pub(super) seed: u64,
}

/// A phone with the conversation with its partner.
struct Phone {
    client: Client,
    tasks: Vec<JoinHandle<()>>,
    room: Option<(Conversation, u64)>,
}

/// Waits until the user wants an end.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left who could want it.
        std::future::pending::<()>().await;
    }
}

/// Plays the scene, the `ordinal`-th of the run, for `length`.
pub(super) async fn play(
    stand: &mut Stand<'_>,
    ordinal: usize,
    scene: &'static Scene,
    length: Duration,
) -> Outcome {
    let mut outcome = Outcome::empty(scene, stand.phones);
    if let Err(error) = perform(stand, ordinal, scene, length, &mut outcome).await {
        outcome.problems.push(format!("{error:#}"));
    }
    stand
        .live
        .stage(ordinal, if outcome.interrupted { Stage::Interrupted } else { Stage::Done(outcome.passed()) });
    outcome
}

async fn perform(
    stand: &mut Stand<'_>,
    ordinal: usize,
    scene: &'static Scene,
    length: Duration,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    stand.gateway.still_runs()?;
    let seed = Rng::new(stand.seed).fork(number(ordinal)).next_u64();
    let schedules = schedules(seed, stand.phones, length);
    let board = Arc::new(Board::new(stand.phones, schedules.iter().map(Vec::len).sum()));
    let config = proxy::Config::towards(stand.gateway.address()).tcp(true).seed(seed).path(scene.path());
    let proxy = Arc::new(Proxy::start(config).context("the bad network can't be started")?);
    proxy.admit(scene.admits()).context("the bad network does not answer")?;
    stand.live.begin(ordinal, &board, &proxy);

    let mut phones = Vec::with_capacity(stand.phones);
    let mut stop = stand.stop.clone();
    let prepared = tokio::select! {
        prepared = prepare(stand, ordinal, scene, &board, &proxy, &mut phones) => Some(prepared),
        () = stopped(&mut stop) => None,
    };
    let played = match prepared {
        Some(Ok(())) => {
            let played =
                chat(stand, ordinal, scene, length, &board, &proxy, &phones, schedules, outcome).await;
            played.map(|converged| outcome.interrupted = !converged && *stop.borrow())
        }
        Some(Err(error)) => Err(error),
        None => {
            outcome.interrupted = true;
            Ok(())
        }
    };
    // Judged before anything is closed: what is seen while closing down is no part of the scene.
    judge(&board, outcome);
    for phone in &phones {
        outcome.connections += phone.client.traffic().connections;
        for attempt in phone.client.attempts() {
            *outcome.attempts.entry((way(attempt.transport), ended(&attempt.outcome))).or_default() += 1;
        }
    }
    outcome.network = proxy.totals();
    stand.live.finish(ordinal, outcome);
    let closing = phones.into_iter().map(|phone| async move {
        // What is left in its database is of no use to anybody.
        let _ = timeout(CLOSE_TIMEOUT, phone.client.close()).await;
        phone.tasks.iter().for_each(JoinHandle::abort);
    });
    // What the bad network was for is over.
    let _ = proxy.set_path(fulmar_badnet::Profile::Clean);
    let _ = proxy.admit(proxy::Admits::ALL);
    futures_util::future::join_all(closing).await;
    played
}

/// Starts the phones, waits until they are connected, and opens the conversation of each pair.
async fn prepare(
    stand: &Stand<'_>,
    ordinal: usize,
    scene: &'static Scene,
    board: &Arc<Board>,
    proxy: &Proxy,
    phones: &mut Vec<Phone>,
) -> anyhow::Result<()> {
    let names: Vec<String> =
        (1..=stand.phones).map(|phone| format!("{}-{}-{phone:02}", scene.name, ordinal + 1)).collect();
    for (number, (name, token)) in names.iter().zip(tokens(stand.data, &names)?).enumerate() {
        let database = Database::File(stand.databases.join(format!("{name}.db")));
        let options = Options::new(database, proxy.addr().to_string(), "localhost", token)
            .trust(Trust::CertificateFile(stand.data.join("tls/cert.pem")))
            .durability(Durability::AppKill)
            .network(NetworkHint { kind: scene.network, rtt_ms: 0 })
            .network_name(scene.name);
        phones.push(start(number, options, board).await.with_context(|| format!("{name} can't start"))?);
    }
    let until = Instant::now() + PREPARE_TIMEOUT;
    let connecting = async {
        for (number, phone) in phones.iter().enumerate() {
            ensure!(phone.client.state().live().await, "phone {} was closed", number + 1);
            let user = phone.client.user().await?;
            board.is_user(number, user.context("a phone is connected and has no number")?.get());
        }
        Ok(())
    };
    match tokio::time::timeout_at(until, connecting).await {
        Ok(connected) => connected?,
        Err(_) => {
            let states = phones.iter().map(|phone| phone.client.state().current());
            let missing: Vec<_> = states.filter(|state| Standing::of(state) != Standing::Live).collect();
            let first = missing.first().map_or_else(String::new, |state| format!("; the first is {state:?}"));
            bail!(
                "{} of {} phones were not connected after {} s{first}",
                missing.len(),
                phones.len(),
                PREPARE_TIMEOUT.as_secs(),
            )
        }
    }
    let opening = phones.iter().enumerate().map(|(number, phone)| {
        let partner = names.get(partner_of(number)).cloned();
        async move {
            let partner = partner.context("a phone has no partner")?;
            let conversation = phone.client.direct(&partner).await?;
            let at = again(|| conversation.resolved())
                .await
                .with_context(|| format!("the conversation with {partner} can't be opened"))?;
            anyhow::Ok((conversation, at.get()))
        }
    });
    let opened = tokio::time::timeout_at(until, futures_util::future::try_join_all(opening));
    let opened = opened.await.context("the conversations were not opened in time")??;
    for (number, (phone, room)) in phones.iter_mut().zip(opened).enumerate() {
        board.record(Event::Joined { client: client_of(number), conversation: Room(room.1), first: 1 });
        phone.room = Some(room);
    }
    Ok(())
}

/// 0 and 1 are a pair, 2 and 3 are the next one.
const fn partner_of(phone: usize) -> usize {
    phone ^ 1
}

async fn start(number: usize, options: Options, board: &Arc<Board>) -> anyhow::Result<Phone> {
    let started = Instant::now();
    let client = Client::connect(options).await?;
    let watching = {
        let (client, board) = (client.clone(), Arc::clone(board));
        tokio::spawn(async move {
            let mut states = client.state();
            let mut first = true;
            while let Some(state) = states.next().await {
                let standing = Standing::of(&state);
                board.stands(number, standing);
                if first && standing == Standing::Live {
                    first = false;
                    board.connected_after(started.elapsed());
                }
            }
        })
    };
    let reading = {
        let (mut messages, board) = (client.messages(), Arc::clone(board));
        tokio::spawn(async move {
            while let Some(record) = messages.next().await {
                board.received(number, &record);
            }
        })
    };
    Ok(Phone { client, tasks: vec![watching, reading], room: None })
}

/// Something to say, and when.
type Planned = (Duration, String, bool);

/// What each phone says: something about every second, and twice in the scene one of each pair several things at once.
fn schedules(seed: u64, phones: usize, length: Duration) -> Vec<Vec<Planned>> {
    let root = Rng::new(seed).fork(1);
    let count = u32::try_from(phones.max(1)).unwrap_or(u32::MAX);
    (0..phones)
        .map(|phone| {
            let mut rng = root.fork(number(phone));
            let offset = PACE / count * u32::try_from(phone).unwrap_or(0);
            let mut planned = Vec::new();
            let mut at = offset;
            while at < length {
                planned.push((at + rng.duration(Duration::ZERO, PACE / 10), false));
                at += PACE;
            }
            // One burst each, in the first half by one of a pair, in the second by the other.
            let quarter = length / 4;
            let burst = if phone.is_multiple_of(2) { quarter } else { quarter * 3 };
            let burst = burst + rng.duration(Duration::ZERO, quarter / 2);
            planned.extend((0..BURST).map(|_| (burst, true)));
            planned.retain(|(at, _)| *at < length);
            planned.sort_by_key(|(at, _)| *at);
            let texts = texts(rng.next_u64(), planned.len());
            planned.into_iter().zip(texts).map(|((at, burst), text)| (at, text, burst)).collect()
        })
        .collect()
}

fn texts(seed: u64, count: usize) -> impl Iterator<Item = String> {
    // A dialogue has two lines at least nearly always; what is missing is said once more.
    let drawn = dialogue::generate(seed, count.div_ceil(2).clamp(1, 200));
    let lines: Vec<String> =
        drawn.into_iter().flat_map(|dialogue| dialogue.lines).map(|line| line.text).collect();
    lines.into_iter().cycle().take(count)
}

/// Lets them talk for `length` while the script is played, then waits until everything is where it belongs. `false`: it
/// did not get that far.
#[expect(clippy::too_many_arguments, reason = "all that a scene is made of, handed on once")]
async fn chat(
    stand: &mut Stand<'_>,
    ordinal: usize,
    scene: &'static Scene,
    length: Duration,
    board: &Arc<Board>,
    proxy: &Proxy,
    phones: &[Phone],
    schedules: Vec<Vec<Planned>>,
    outcome: &mut Outcome,
) -> anyhow::Result<bool> {
    let bytes = || {
        let traffic = phones.iter().map(|phone| phone.client.traffic());
        traffic.fold((0, 0), |sum, one| (sum.0 + one.sent_bytes, sum.1 + one.received_bytes))
    };
    let network = || {
        let totals = proxy.totals();
        totals.wire_bytes() + totals.tcp.up.bytes + totals.tcp.down.bytes
    };
    let (before, network_before) = (bytes(), network());
    stand.live.stage(ordinal, Stage::Playing(length));
    let started = board.begins();
    let mut talking = JoinSet::new();
    for (speaker, (phone, schedule)) in phones.iter().zip(schedules).enumerate() {
        let Some(room) = phone.room.clone() else { continue };
        talking.spawn(talk(speaker, room, schedule, started, Arc::clone(board)));
    }
    let mut stop = stand.stop.clone();
    let ended = tokio::select! {
        happened = follow_script(scene, length, started, board, proxy, phones) => happened.map(|()| true),
        () = stopped(&mut stop) => Ok(false),
    };
    let mut converged = ended?;
    if converged {
        stand.live.stage(ordinal, Stage::Settling);
        converged = tokio::select! {
            settled = settle(stand.gateway, board, outcome) => settled?,
            () = stopped(&mut stop) => false,
        };
    }
    if converged {
        sleep(CALM).await;
    }
    outcome.played = started.elapsed();
    let after = bytes();
    outcome.sent_bytes = after.0.saturating_sub(before.0);
    outcome.received_bytes = after.1.saturating_sub(before.1);
    outcome.network_bytes = network().saturating_sub(network_before);
    Ok(converged)
}

/// Says everything when it is due; ends when all of it was acked or has failed.
async fn talk(
    speaker: usize,
    (conversation, at): (Conversation, u64),
    schedule: Vec<Planned>,
    started: Instant,
    board: Arc<Board>,
) {
    let mut acks = JoinSet::new();
    for (due, text, burst) in schedule {
        sleep_until(started + due).await;
        let (number, payload) = board.sending(speaker, partner_of(speaker), at, &text, burst);
        match conversation.send(payload).await {
            Ok(handle) => {
                let board = Arc::clone(&board);
                acks.spawn(async move {
                    match handle.acked().await {
                        Ok(seq) => board.acked(number, at, seq.get()),
                        Err(error) => board.failed(number, &error.to_string()),
                    }
                });
            }
            Err(error) => board.failed(number, &format!("could not be sent: {error}")),
        }
        while acks.try_join_next().is_some() {}
    }
    while acks.join_next().await.is_some() {}
}

/// Carries out the steps and returns when the time is over.
async fn follow_script(
    scene: &'static Scene,
    length: Duration,
    started: Instant,
    board: &Board,
    proxy: &Proxy,
    phones: &[Phone],
) -> anyhow::Result<()> {
    let silent = "the bad network does not answer";
    for (at, act) in scene.steps(length) {
        sleep_until(started + at).await;
        let from = started.elapsed();
        let mark = |label: String, shakes| board.mark(Mark { from, to: started.elapsed(), label, shakes });
        match act {
            Act::Air(air) => {
                proxy.set_path(scene.meets(air)).context(silent)?;
                mark(air.label().to_owned(), false);
            }
            Act::Rebind => {
                proxy.apply(Target::All, Fault::Rebind).context(silent)?;
                mark("new address, untold".to_owned(), true);
            }
            Act::Dark { ms, ends } => {
                proxy.admit(proxy::Admits::NONE).context(silent)?;
                board.darkens();
                sleep_until(started + at + Duration::from_millis(ms)).await;
                if let Ends::Moved(air) = ends {
                    proxy.set_path(scene.meets(air)).context(silent)?;
                    proxy.apply(Target::All, Fault::Rebind).context(silent)?;
                }
                proxy.admit(scene.admits()).context(silent)?;
                mark(label(ms, ends), true);
                match ends {
                    Ends::Untold => {}
                    Ends::Told => tell(phones, scene.network, scene.name).await?,
                    Ends::Moved(air) => tell(phones, NetworkKind::Cellular, air.label()).await?,
                }
            }
        }
    }
    sleep_until(started + length).await;
    Ok(())
}

fn label(ms: u64, ends: Ends) -> String {
    let seconds = if ms.is_multiple_of(1_000) {
        format!("{}", ms / 1_000)
    } else {
        format!("{}.{}", ms / 1_000, ms % 1_000 / 100)
    };
    match ends {
        Ends::Untold => format!("dark {seconds} s"),
        Ends::Told => format!("dark {seconds} s, end told"),
        Ends::Moved(air) => format!("dark {seconds} s, then {}, told", air.label()),
    }
}

/// The operating system tells every phone.
async fn tell(phones: &[Phone], kind: NetworkKind, name: &str) -> anyhow::Result<()> {
    let hint = NetworkHint { kind, rtt_ms: 0 };
    let told = phones.iter().map(|phone| phone.client.network_changed_to(hint, name));
    futures_util::future::try_join_all(told).await.context("a phone can't be told of its network")?;
    Ok(())
}

/// Waits until everything is where it belongs; `false`: it never was, and the outcome says what is missing.
async fn settle(gateway: &mut GatewayProcess, board: &Board, outcome: &mut Outcome) -> anyhow::Result<bool> {
    let until = Instant::now() + SETTLE_TIMEOUT;
    loop {
        gateway.still_runs()?;
        let missing = board.missing();
        if missing == [0; 4] {
            return Ok(true);
        }
        if Instant::now() >= until {
            let [acks, deliveries, echoes, phones] = missing;
            outcome.problems.push(format!(
                "{} s after the last message: {acks} messages not acked, {deliveries} not delivered, {echoes} not back \
                 with their senders, {phones} phones not up to date",
                SETTLE_TIMEOUT.as_secs()
            ));
            return Ok(false);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Holds what was seen against the promises.
fn judge(board: &Board, outcome: &mut Outcome) {
    let seen = board.seen();
    // What had not arrived when a scene was cut short is not lost; that it did not arrive in time is said already.
    let converged = !outcome.interrupted && outcome.problems.is_empty() && !seen.messages.is_empty();
    let rules = Rules { converged, echoes: true, ..Rules::default() };
    let report = check(&seen.history, &rules);
    outcome.problems.extend(seen.troubles.iter().cloned());
    if !report.holds() {
        outcome.problems.extend(report.explain(&seen.history).lines().map(str::to_owned));
    }
    if outcome.problems.len() > PROBLEMS_MAX {
        let more = outcome.problems.len() - PROBLEMS_MAX;
        outcome.problems.truncate(PROBLEMS_MAX);
        outcome.problems.push(format!("and {more} lines more"));
    }
    outcome.duplicates = report.counters.duplicates;
    outcome.out_of_order = report.counters.out_of_order;
    outcome.lost = report.counters.lost;
    outcome.messages.clone_from(&seen.messages);
    outcome.marks.clone_from(&seen.marks);
    outcome.connects.clone_from(&seen.connects);
}

const fn way(transport: TransportKind) -> &'static str {
    match transport {
        TransportKind::Quic => "QUIC",
        TransportKind::Tls => "TLS",
        TransportKind::WebSocket => "WebSocket",
        _ => "other",
    }
}

const fn ended(outcome: &AttemptOutcome) -> &'static str {
    match outcome {
        AttemptOutcome::Won => "won",
        AttemptOutcome::Overtaken => "overtaken",
        AttemptOutcome::NoAnswer => "no answer",
        AttemptOutcome::Failed(_) => "failed",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::Air;
    use super::*;

    #[test]
    fn everybody_talks_once_a_second_and_bursts_once() {
        let length = Duration::from_secs(16);
        let all = schedules(5, 4, length);
        assert_eq!(all, schedules(5, 4, length));
        assert_ne!(all, schedules(6, 4, length));
        for schedule in &all {
            let bursts = schedule.iter().filter(|(.., burst)| *burst).count();
            assert_eq!((schedule.len() - bursts, bursts), (16, 5));
            assert!(schedule.windows(2).all(|pair| pair[0].0 <= pair[1].0));
            assert!(schedule.iter().all(|(at, text, _)| *at < length && !text.is_empty()));
        }
        assert_eq!([0, 1, 2, 3].map(partner_of), [1, 0, 3, 2]);
    }

    #[test]
    fn marks_say_how_long_it_was_dark_and_who_told() {
        for (ms, ends, want) in [
            (8_000, Ends::Untold, "dark 8 s"),
            (1_500, Ends::Told, "dark 1.5 s, end told"),
            (1_000, Ends::Moved(Air::Mobile), "dark 1 s, then mobile network, told"),
        ] {
            assert_eq!(label(ms, ends), want);
        }
    }
}
