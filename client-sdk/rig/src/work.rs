//! The app that is killed: it sends to its conversations, takes some of it back, receives, and writes down everything
//! it was told before it lets the SDK forget it.
//!
//! - What is about to be sent is written down before [`Conversation::send`], what became of it before the handle is
//!   dropped, and what was received before the next message is asked for: nothing can be known to the SDK as told that
//!   the app has not written down.
//! - What an earlier run left in the outbox is followed on.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use fulmar_badnet::{
    Rng,
    history::{Client as Who, Digest, Tag},
};
use fulmar_client::{
    Client, ClientEvent, ConnectionState, Conversation, Options, Received, RecordKind, SendHandle,
    SendOptions, SendStatus, Trust,
};
use tokio::sync::Semaphore;

use crate::log::{End, Entry, Log};

/// Messages without an end after which the app waits before it sends more.
const UNSETTLED_MAX: usize = 100;

/// Tasks that send; a conversation belongs to one of them, so that the order of its messages is known.
const SENDERS: usize = 3;

/// An app that nobody ends does so itself.
const LIFE_MAX: Duration = Duration::from_secs(120);

/// What the app is started with.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Work {
    /// The app's database
    #[arg(long)]
    pub(crate) database: PathBuf,
    /// Its log
    #[arg(long)]
    pub(crate) log: PathBuf,
    /// Where the gateway is
    #[arg(long)]
    pub(crate) address: String,
    /// Its certificate
    #[arg(long)]
    pub(crate) certificate: PathBuf,
    /// Who the user is
    #[arg(long)]
    pub(crate) token: String,
    /// The app's number in the history
    #[arg(long)]
    pub(crate) client: u32,
    /// Where its chance comes from
    #[arg(long)]
    pub(crate) seed: u64,
    /// A conversation to send to, `d:USER` or `g:GROUP`; the order must not change from run to run
    #[arg(long = "to")]
    pub(crate) to: Vec<String>,
    /// Send nothing, say when the outbox is empty, and end in order when standard input does
    #[arg(long)]
    pub(crate) drain: bool,
}

/// Runs the app until it is killed.
///
/// # Errors
/// When it could not work, or the client ended.
pub(crate) fn run(ask: Work) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            result = live(ask) => result,
            () = tokio::time::sleep(LIFE_MAX) => anyhow::bail!("nobody ended the app"),
        }
    })
}

/// What all tasks of the app share.
struct App {
    log: Log,
    client: Client,
    number: u32,
    counter: AtomicU64,
    room: Arc<Semaphore>,
}

async fn live(ask: Work) -> anyhow::Result<()> {
    let (log, lines) = Log::open(&ask.log)?;
    log.note(Entry::Begun);
    let counters = lines.iter().filter_map(|(_, entry)| match entry {
        Entry::Intent { counter, .. } => Some(*counter),
        _ => None,
    });
    let counter = AtomicU64::new(counters.max().map_or(1, |last| last + 1));
    let options = Options::new(ask.database.as_path(), ask.address.clone(), "localhost", ask.token.clone());
    let client = Client::connect(options.trust(Trust::CertificateFile(ask.certificate.clone()))).await?;
    let room = Arc::new(Semaphore::new(UNSETTLED_MAX));
    let app = Arc::new(App { log, client, number: ask.client, counter, room });
    // Before anything of this run is queued: what is listed here is of earlier ones.
    for entry in app.client.outbox().await? {
        if let Some((tag, _)) = Tag::read(&entry.payload).filter(|(tag, _)| tag.client == Who(ask.client)) {
            app.log.note(Entry::Listed { counter: tag.counter, id: entry.handle.id() });
        }
        tokio::spawn(follow(Arc::clone(&app), entry.handle, entry.conversation));
    }
    tokio::spawn(receive(Arc::clone(&app)));
    tokio::spawn(notice_gaps(Arc::clone(&app)));
    if ask.drain {
        tokio::spawn(say_when_empty(Arc::clone(&app)));
    } else {
        let mut conversations = Vec::new();
        for to in &ask.to {
            conversations.push(match to.split_once(':').context("a conversation is d:USER or g:GROUP")? {
                ("d", user) => app.client.direct(user).await?,
                (_, group) => app.client.group(group).await?,
            });
        }
        for sender in 0..SENDERS {
            let own = conversations.iter().cloned().enumerate().skip(sender).step_by(SENDERS).collect();
            let rng = Rng::new(ask.seed).fork(sender as u64);
            tokio::spawn(send(Arc::clone(&app), own, rng));
        }
    }
    let watched = watch(&app);
    if !ask.drain {
        return watched.await;
    }
    let (ended, asked_to_end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = ended.send(());
    });
    tokio::select! {
        result = watched => result,
        _ = asked_to_end => Ok(app.client.close().await?),
    }
}

/// Says when the client is live; an end of its own is an error.
async fn watch(app: &App) -> anyhow::Result<()> {
    let mut states = app.client.state();
    let mut user = None;
    while let Some(state) = states.next().await {
        match state {
            ConnectionState::Live => {
                if user.is_none() {
                    user = app.client.user().await?;
                    app.log.note(Entry::User(user.context("a client that is live has a user")?.get()));
                }
                app.log.note(Entry::Live);
            }
            ConnectionState::Closed { reason } => anyhow::bail!("the client ended: {reason:?}"),
            _ => {}
        }
    }
    anyhow::bail!("the client ended without saying why")
}

async fn send(app: Arc<App>, conversations: Vec<(usize, Conversation)>, mut rng: Rng) {
    if conversations.is_empty() {
        return;
    }
    loop {
        tokio::time::sleep(Duration::from_micros(rng.below(12_000))).await;
        let Ok(place) = Arc::clone(&app.room).acquire_owned().await else { return };
        let at = usize::try_from(rng.below(conversations.len() as u64)).unwrap_or(0);
        let Some((to, conversation)) = conversations.get(at) else { continue };
        let counter = app.counter.fetch_add(1, Ordering::Relaxed);
        // Most are short; some are of several pieces.
        let bytes = match rng.below(100) {
            0..3 => 16_000 + rng.below(30_000),
            _ => rng.below(200),
        };
        let body: Vec<u8> = (0..bytes).map(|_| b'a' + u8::try_from(rng.below(26)).unwrap_or(0)).collect();
        let payload = Tag { client: Who(app.number), counter }.stamp(&body);
        let ttl = (rng.below(100) < 8).then(|| Duration::from_secs(1));
        let cancel = (rng.below(100) < 8).then(|| Duration::from_micros(rng.below(30_000)));
        app.log.note(Entry::Intent { counter, to: *to, digest: Digest::of(&payload) });
        let options = SendOptions { ttl, ..SendOptions::default() };
        match conversation.send_with(payload, options).await {
            Ok(handle) => {
                app.log.note(Entry::Kept { counter, id: handle.id() });
                let (app, conversation) = (Arc::clone(&app), conversation.clone());
                tokio::spawn(async move {
                    let cancelling = async {
                        let Some(after) = cancel else { return };
                        tokio::time::sleep(after).await;
                        app.log.note(Entry::Cancel { id: handle.id() });
                        if let Err(error) = handle.cancel().await {
                            eprintln!("a message could not be cancelled: {error}");
                        }
                    };
                    tokio::join!(cancelling, settled(&app, &handle, &conversation));
                    drop((handle, place));
                });
            }
            Err(error) => {
                eprintln!("a message could not be queued: {error}");
                app.log.note(Entry::NotKept { counter });
            }
        }
    }
}

/// Follows a message of an earlier run.
async fn follow(app: Arc<App>, handle: SendHandle, conversation: Conversation) {
    settled(&app, &handle, &conversation).await;
    drop(handle);
}

/// Waits for the end of a message and writes it down. Looking at the steps does not count as having been told; that is
/// what dropping the handle does.
async fn settled(app: &App, handle: &SendHandle, conversation: &Conversation) {
    let mut steps = handle.watch();
    while let Some(status) = steps.next().await {
        let end = match status {
            SendStatus::Acked(seq) => End::Acked(seq.get()),
            // The step before was skipped; where it is follows from what the others got.
            SendStatus::Delivered | SendStatus::Read => End::Acked(0),
            SendStatus::Refused(code) => End::Refused(code.code()),
            SendStatus::Expired => End::Expired,
            _ => continue,
        };
        let conversation = conversation.number().map_or(0, |number| number.get());
        app.log.note(Entry::Ended { id: handle.id(), conversation, end });
        return;
    }
    // The client is closed.
    std::future::pending().await
}

async fn receive(app: Arc<App>) {
    let mut messages = app.client.messages();
    while let Some(Received { conversation, seq, sender, kind, payload, arrival, .. }) = messages.next().await
    {
        let (conversation, seq, sender) = (conversation.get(), seq.get(), sender.get());
        app.log.note(match Tag::read(&payload) {
            Some((tag, _)) if kind == RecordKind::Message => {
                Entry::Got { arrival, conversation, seq, sender, tag, digest: Digest::of(&payload) }
            }
            _ => Entry::Notice { arrival, conversation, seq },
        });
    }
}

async fn notice_gaps(app: Arc<App>) {
    let mut events = app.client.events();
    while let Some(event) = events.next().await {
        if let ClientEvent::Gap { conversation, from, to } = event {
            app.log.note(Entry::Gap { conversation: conversation.get(), from: from.get(), to: to.get() });
        }
    }
}

async fn say_when_empty(app: Arc<App>) {
    loop {
        match app.client.outbox().await {
            Ok(entries) if entries.is_empty() => return app.log.note(Entry::Empty),
            // Those that ended are told by the tasks that follow them.
            Ok(entries) => entries.into_iter().for_each(|entry| std::mem::forget(entry.handle)),
            Err(error) => return eprintln!("the outbox can't be read: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
