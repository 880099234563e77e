//! The one who is not killed: makes the groups, sends into every conversation, and writes down what it gets.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use fulmar_badnet::{
    Rng,
    history::{Client as Who, Digest, Tag},
};
use fulmar_client::{
    Client, ClientEvent, ConnectionState, Conversation, Options, RecordKind, SendError, SendHandle, Trust,
    in_memory,
};

use crate::{
    gateway::Gateway,
    log::{End, Entry, Line, now},
};

/// The peer's user name.
pub(crate) const NAME: &str = "peer";

/// The peer's number in the history.
pub(crate) const NUMBER: Who = Who(0);

/// Handles the peer waits for before it sends more.
const UNSETTLED_MAX: usize = 64;

/// A client in this process, straight to the gateway.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    client: Client,
    lines: Arc<Mutex<Vec<Line>>>,
    conversations: Arc<Mutex<Vec<Conversation>>>,
    sending: Arc<AtomicBool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peer {
    /// Connects, and waits until that is done.
    ///
    /// # Errors
    /// When it can't.
    pub(crate) async fn start(gateway: &Gateway) -> anyhow::Result<Self> {
        let options =
            Options::new(in_memory(), gateway.address.to_string(), "localhost", gateway.token(NAME)?);
        let client = Client::connect(options.trust(Trust::CertificateFile(gateway.certificate()))).await?;
        let peer = Self {
            client,
            lines: Arc::default(),
            conversations: Arc::default(),
            sending: Arc::new(AtomicBool::new(true)),
        };
        let mut states = peer.client.state();
        while let Some(state) = states.next().await {
            if state == ConnectionState::Live {
                break;
            }
        }
        let user = peer.client.user().await?.context("a client that is live has a user")?;
        peer.note(Entry::User(user.get()));
        peer.note(Entry::Live);
        tokio::spawn(peer.clone().receive());
        tokio::spawn(peer.clone().notice_gaps());
        Ok(peer)
    }

    /// What it wrote down.
    pub(crate) fn lines(&self) -> Vec<Line> {
        lock(&self.lines).clone()
    }

    /// The direct conversation with a user; the peer sends to it from now on.
    ///
    /// # Errors
    /// When there is no such user, or no connection.
    pub(crate) async fn direct(&self, user: &str) -> anyhow::Result<u64> {
        let conversation = self.client.direct(user).await?;
        let number = conversation.resolved().await?.get();
        lock(&self.conversations).push(conversation);
        Ok(number)
    }

    /// Makes a group; the peer sends to it from now on.
    ///
    /// # Errors
    /// When the gateway refuses, or there is no connection.
    pub(crate) async fn group(&self, name: &str, members: &[&str]) -> anyhow::Result<u64> {
        let conversation = self.client.create_group(name, members).await?;
        let number = conversation.resolved().await?.get();
        lock(&self.conversations).push(conversation);
        Ok(number)
    }

    /// Sends until [`Self::stop`], then until everything has its end.
    pub(crate) async fn send(self, mut rng: Rng) {
        let mut counter = 0;
        let mut handles: Vec<(SendHandle, u64)> = Vec::new();
        while self.sending.load(Ordering::Relaxed) || !handles.is_empty() {
            tokio::time::sleep(Duration::from_millis(2 + rng.below(20))).await;
            let mut waiting = Vec::new();
            for (handle, conversation) in handles {
                if !handle.status().is_settled() {
                    waiting.push((handle, conversation));
                    continue;
                }
                let end = match handle.acked().await {
                    Ok(seq) => End::Acked(seq.get()),
                    Err(SendError::Refused(code)) => End::Refused(code.code()),
                    Err(_) => End::Expired,
                };
                self.note(Entry::Ended { id: handle.id(), conversation, end });
            }
            handles = waiting;
            if handles.len() >= UNSETTLED_MAX || !self.sending.load(Ordering::Relaxed) {
                continue;
            }
            let (to, conversation) = {
                let conversations = lock(&self.conversations);
                let at = usize::try_from(rng.below(conversations.len() as u64)).unwrap_or(0);
                let Some(conversation) = conversations.get(at) else { continue };
                (at, conversation.clone())
            };
            counter += 1;
            let payload = Tag { client: NUMBER, counter }.stamp(b"from the peer");
            self.note(Entry::Intent { counter, to, digest: Digest::of(&payload) });
            match conversation.send(payload).await {
                Ok(handle) => {
                    self.note(Entry::Kept { counter, id: handle.id() });
                    handles.push((handle, conversation.number().map_or(0, |number| number.get())));
                }
                Err(_) => self.note(Entry::NotKept { counter }),
            }
        }
    }

    /// No more messages.
    pub(crate) fn stop(&self) {
        self.sending.store(false, Ordering::Relaxed);
    }

    fn note(&self, entry: Entry) {
        let mut lines = lock(&self.lines);
        lines.push((now(), entry));
    }

    async fn receive(self) {
        let mut messages = self.client.messages();
        while let Some(message) = messages.next().await {
            let (arrival, conversation) = (message.arrival, message.conversation.get());
            let (seq, sender) = (message.seq.get(), message.sender.get());
            self.note(match Tag::read(&message.payload) {
                Some((tag, _)) if message.kind == RecordKind::Message => {
                    let digest = Digest::of(&message.payload);
                    Entry::Got { arrival, conversation, seq, sender, tag, digest }
                }
                _ => Entry::Notice { arrival, conversation, seq },
            });
        }
    }

    async fn notice_gaps(self) {
        let mut events = self.client.events();
        while let Some(event) = events.next().await {
            if let ClientEvent::Gap { conversation, from, to } = event {
                let (conversation, from, to) = (conversation.get(), from.get(), to.get());
                self.note(Entry::Gap { conversation, from, to });
            }
        }
    }
}
