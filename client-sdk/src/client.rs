//! The client: what the app holds, and what it shares with the driver.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fulmar_protocol::{
    frame::OpenTarget,
    id::{ConversationId, DeviceUid, Pseq, Seq, ServiceId, UnixMillis, UserId},
    limit::{CALL_BODY_BYTES_MAX, NAME_BYTES_MAX},
    service::{
        self, ConversationPage, CreateGroup, DeviceEntry, Devices, GroupCreated, ListConversations, Method,
        Names, NamesFound,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};

use crate::{
    conversation::Conversation,
    db::{ConversationSummary, Db, Settled, WaitingSend},
    driver::{self, Call, Request},
    error::Error,
    event::{Attempt, ClientEvent, ConnectionState, OfflineReason, TransportKind},
    messages::{Events, Messages, States},
    options::Options,
    platform::{Platform, within},
    send::{Handles, OutboxEntry, Progress, SendHandle},
    transport::{self, meter::Carried},
};

/// How long a request waits for its answer, reconnects included.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests that may wait for the driver; an app that brings more waits.
const REQUESTS_MAX: usize = 64;

/// Events an app may lag behind.
const EVENTS_MAX: usize = 256;

/// New sends that are handed to the driver directly; more wait in the database.
const HANDED_MAX: usize = 64;

/// Sends [`Client::outbox`] lists at the most.
const OUTBOX_MAX: usize = 1_000;

/// Attempts to connect [`Client::attempts`] reports.
const ATTEMPTS_MAX: usize = 200;

/// Conversations [`Client::conversations`] asks the gateway for at the most.
const CONVERSATIONS_MAX: usize = 5_000;

/// A user's device: connects by itself, sends from its outbox, keeps what it receives. Cheap to clone; the connection
/// ends with the last clone (or with [`Client::close`]).
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    pub(crate) requests: mpsc::Sender<Request>,
}

/// What the app's handles share with the driver.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) db: Db,
    pub(crate) states: watch::Sender<ConnectionState>,
    pub(crate) closed: watch::Sender<bool>,
    pub(crate) events: broadcast::Sender<ClientEvent>,
    /// The newest arrival that is committed.
    pub(crate) arrivals: watch::Sender<u64>,
    /// Generation of the message stream that may read.
    pub(crate) readers: watch::Sender<u64>,
    /// Wakes the driver for what is in `fresh`.
    pub(crate) wake: Notify,
    fresh: Mutex<Fresh>,
    handles: Mutex<Handles>,
    told: Arc<Mutex<Vec<u64>>>,
    telling: Arc<AtomicBool>,
    taken: Arc<AtomicU64>,
    taking: Arc<AtomicBool>,
    traffic: Mutex<Meter>,
    attempts: Mutex<VecDeque<Attempt>>,
}

/// What the app did that the driver has not seen. Bounded by the conversations and the unsettled sends there are.
#[derive(Debug, Default)]
pub(crate) struct Fresh {
    /// New sends, handed over without another look into the database, in their order.
    pub(crate) handed: Vec<WaitingSend>,
    /// Conversations with more new sends.
    pub(crate) sends: BTreeSet<ConversationId>,
    /// Read marks.
    pub(crate) marks: BTreeMap<ConversationId, Seq>,
    /// Sends that were taken back.
    pub(crate) cancelled: BTreeSet<(ConversationId, Pseq)>,
    /// Sends wait for a name.
    pub(crate) unresolved: bool,
}

/// What a client's connections have cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections that were welcomed.
    pub connections: u64,
    /// Bytes sent: UDP payloads of everything, also of attempts to connect that failed; or what was carried by TLS or WebSocket.
    pub sent_bytes: u64,
    /// The same that was received.
    pub received_bytes: u64,
    /// The round-trip time measured last.
    pub rtt: Duration,
    /// Pieces of bodies that came and will never be shown: the rest was not sent, or its beginning was before what this
    /// device may see.
    pub stray_pieces: u64,
}

/// What [`Traffic`] is made from.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) connections: u64,
    /// Of byte streams that ended.
    pub(crate) past_sent_bytes: u64,
    pub(crate) past_received_bytes: u64,
    /// By QUIC, once the client runs.
    pub(crate) udp: Option<Arc<Carried>>,
    pub(crate) rtt: Duration,
    pub(crate) stray_pieces: u64,
    /// The connection that is up.
    pub(crate) link: Option<fulmar_transport::Connection>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way; a poisoned one is still consistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Meter {
    /// A connection, or an attempt at one, has ended.
    pub(crate) fn ended(&mut self, connection: &fulmar_transport::Connection) {
        if connection.kind() != fulmar_transport::Kind::Quic {
            let stats = connection.stats();
            self.past_sent_bytes += stats.bytes_out;
            self.past_received_bytes += stats.bytes_in;
        }
    }
}

impl Shared {
    fn new(db: Db, platform: Arc<dyn Platform>) -> Self {
        Self {
            platform,
            db,
            states: watch::Sender::new(ConnectionState::Offline {
                reason: OfflineReason::Starting,
                retry_in: Some(Duration::ZERO),
            }),
            closed: watch::Sender::new(false),
            events: broadcast::Sender::new(EVENTS_MAX),
            arrivals: watch::Sender::new(0),
            readers: watch::Sender::new(0),
            wake: Notify::new(),
            fresh: Mutex::default(),
            handles: Mutex::default(),
            told: Arc::default(),
            telling: Arc::default(),
            taken: Arc::default(),
            taking: Arc::default(),
            traffic: Mutex::default(),
            attempts: Mutex::default(),
        }
    }

    pub(crate) fn subscribe(&self, id: u64, now: Progress) -> watch::Receiver<Progress> {
        lock(&self.handles).subscribe(id, now)
    }

    pub(crate) fn handles(&self) -> MutexGuard<'_, Handles> {
        lock(&self.handles)
    }

    pub(crate) fn traffic(&self) -> MutexGuard<'_, Meter> {
        lock(&self.traffic)
    }

    /// Attempts to connect have ended.
    pub(crate) fn note_attempts(&self, ended: Vec<Attempt>) {
        if ended.is_empty() {
            return;
        }
        let at = UnixMillis::new(self.platform.unix_millis()).unwrap_or_default();
        let mut attempts = lock(&self.attempts);
        for attempt in ended {
            if attempts.len() >= ATTEMPTS_MAX {
                attempts.pop_front();
            }
            attempts.push_back(Attempt { at, ..attempt });
        }
    }

    /// A send was stored, and that is committed; called in the order of the commits.
    pub(crate) fn queued(&self, conversation: Option<ConversationId>, send: Option<WaitingSend>) {
        let mut fresh = lock(&self.fresh);
        match (conversation, send) {
            (Some(_), Some(send)) if fresh.handed.len() < HANDED_MAX => fresh.handed.push(send),
            (Some(conversation), _) => {
                fresh.sends.insert(conversation);
            }
            (None, _) => fresh.unresolved = true,
        }
        drop(fresh);
        self.wake.notify_one();
    }

    /// A read mark was stored.
    pub(crate) fn marked(&self, conversation: ConversationId, seq: Seq) {
        let mut fresh = lock(&self.fresh);
        let mark = fresh.marks.entry(conversation).or_insert(seq);
        *mark = (*mark).max(seq);
        drop(fresh);
        self.wake.notify_one();
    }

    /// Sends were taken back.
    pub(crate) fn cancelled(&self, sends: &[(ConversationId, Pseq)]) {
        lock(&self.fresh).cancelled.extend(sends);
        self.wake.notify_one();
    }

    pub(crate) fn fresh(&self) -> Fresh {
        std::mem::take(&mut *lock(&self.fresh))
    }

    /// Sends ended, and that is committed: resolves their handles. What nobody looks at is forgotten.
    pub(crate) fn settle(&self, settled: &[Settled]) {
        let mut handles = lock(&self.handles);
        let unseen: Vec<u64> =
            settled.iter().filter(|settled| !handles.settled(settled)).map(|settled| settled.id).collect();
        drop(handles);
        for id in unseen {
            self.told(id);
        }
    }

    /// The app knows how a send ended. Written with the next chance; if the app dies before, it is told again.
    pub(crate) fn told(&self, id: u64) {
        lock(&self.told).push(id);
        if self.telling.swap(true, Ordering::AcqRel) {
            return;
        }
        let (told, telling) = (Arc::clone(&self.told), Arc::clone(&self.telling));
        let queued = self.db.try_run(move |store| {
            telling.store(false, Ordering::Release);
            let ids = std::mem::take(&mut *lock(&told));
            store.told(&ids)
        });
        if !queued {
            self.telling.store(false, Ordering::Release);
        }
    }

    /// The app has taken every message up to `arrival`. One write at a time, with the newest value.
    pub(crate) fn take(&self, arrival: u64) {
        self.taken.fetch_max(arrival, Ordering::AcqRel);
        if self.taking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (taken, taking) = (Arc::clone(&self.taken), Arc::clone(&self.taking));
        let queued = self.db.try_run(move |store| {
            taking.store(false, Ordering::Release);
            store.take(taken.load(Ordering::Acquire))
        });
        if !queued {
            self.taking.store(false, Ordering::Release);
        }
    }

    /// Writes what [`Self::told`] and [`Self::take`] left to do.
    pub(crate) async fn flush(&self) -> Result<(), Error> {
        let ids = std::mem::take(&mut *lock(&self.told));
        let taken = self.taken.load(Ordering::Acquire);
        self.db
            .run(true, move |store| {
                store.told(&ids)?;
                store.take(taken)
            })
            .await
    }
}

impl Client {
    /// Opens the database and starts connecting in the background. Returns as soon as the client can be used, which is
    /// before it is connected: [`Client::state`] shows how that goes.
    ///
    /// # Errors
    /// When the database can't be opened, or the certificate to trust can't be read.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fulmar_client::{Client, Options, SendStatus, in_memory};
    ///
    /// // Nobody listens on this port: the message waits in the outbox.
    /// let client = Client::connect(Options::new(in_memory(), "127.0.0.1:9", "localhost", "a token")).await?;
    /// let handle = client.direct("bob").await?.send("are you there?").await?;
    /// assert_eq!(handle.status(), SendStatus::Queued);
    /// assert_eq!(client.outbox().await?.len(), 1);
    /// client.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(options: Options) -> Result<Self, Error> {
        let tls = transport::client_tls(options.trust.as_ref(), &options.platform)?;
        let db = Db::open(options.database.clone(), options.durability, options.platform.in_place()).await?;
        let shared = Arc::new(Shared::new(db, Arc::clone(&options.platform)));
        let now = shared.platform.unix_millis();
        let start = shared
            .db
            .run(false, move |store| {
                Ok(driver::Start {
                    identity: store.identity()?,
                    restore: store.restore()?,
                    arrival: store.last_arrival()?,
                    unacked: store.oldest_waiting(driver::Start::UNACKED_MAX, now)?,
                    waiting: store.waiting_conversations()?,
                    networks: store.networks()?.unwrap_or_default(),
                })
            })
            .await?;
        shared.arrivals.send_replace(start.arrival);
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        shared.platform.spawn(Box::pin(driver::run(Arc::clone(&shared), options, tls, start, inbox)));
        Ok(Self { shared, requests })
    }

    /// Where the connection stands, as it changes.
    #[must_use]
    pub fn state(&self) -> States {
        States::new(self.shared.states.subscribe())
    }

    /// The messages of all conversations, in order of arrival, each once per database. Own messages are among them
    /// ([`crate::Received::own`]). There is one reader: a newer stream ends the one before it.
    #[must_use]
    pub fn messages(&self) -> Messages {
        Messages::new(Arc::clone(&self.shared))
    }

    /// Typing, receipts and other things that pass by.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.shared))
    }

    /// The direct conversation with the user of this name; works offline. That there is no such user shows when a send
    /// is refused, or at [`Conversation::resolved`].
    ///
    /// # Errors
    /// [`Error::BadName`], or when the database fails.
    pub async fn direct(&self, user: &str) -> Result<Conversation, Error> {
        self.conversation_by_name(OpenTarget::Direct(checked(user)?)).await
    }

    /// The group of this name; works offline, like [`Client::direct`].
    ///
    /// # Errors
    /// [`Error::BadName`], or when the database fails.
    pub async fn group(&self, name: &str) -> Result<Conversation, Error> {
        self.conversation_by_name(OpenTarget::Group(checked(name)?)).await
    }

    /// The broadcast of this name, which everybody of the app reads; works offline, like [`Client::direct`]. Its messages come
    /// without asking for it. Only users whom the app's configuration names may send there, for others a send is refused with
    /// [`RefusalCode::NotAllowed`](fulmar_protocol::close::RefusalCode::NotAllowed).
    ///
    /// # Errors
    /// [`Error::BadName`], or when the database fails.
    pub async fn broadcast(&self, name: &str) -> Result<Conversation, Error> {
        self.conversation_by_name(OpenTarget::Broadcast(checked(name)?)).await
    }

    async fn conversation_by_name(&self, target: OpenTarget) -> Result<Conversation, Error> {
        let wanted = target.clone();
        let known = self.shared.db.run(false, move |store| store.lookup(&wanted)).await?;
        Ok(Conversation::new(self.clone(), target, known))
    }

    /// The conversation with this number, as messages name it.
    #[must_use]
    pub fn conversation(&self, number: ConversationId) -> Conversation {
        Conversation::new(self.clone(), OpenTarget::Number(number), Some(number))
    }

    /// Makes a group whose owner is this user. Repeating it finds the same group.
    ///
    /// # Errors
    /// [`Error::Refused`] (the name is taken, a user is unknown) or [`Error::TimedOut`].
    pub async fn create_group(&self, name: &str, members: &[&str]) -> Result<Conversation, Error> {
        let name = checked(name)?;
        let (first, rest) = members.split_at(members.len().min(service::PAGE_MAX / 2));
        let members = first.iter().map(|member| checked(member)).collect::<Result<_, _>>()?;
        let created: GroupCreated =
            self.builtin(Method::CreateGroup, &CreateGroup { name: name.clone(), members }).await?;
        let group = Conversation::new(self.clone(), OpenTarget::Group(name), Some(created.conversation));
        if !rest.is_empty() {
            group.add(rest).await?;
        }
        Ok(group)
    }

    /// The user's conversations with what is unread in them, the newest first. Asks the gateway when connected, else
    /// says what the database knows.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn conversations(&self) -> Result<Vec<ConversationSummary>, Error> {
        let online = matches!(
            *self.shared.states.borrow(),
            ConnectionState::Live | ConnectionState::Syncing | ConnectionState::Suspect
        );
        let mut unread = BTreeMap::new();
        if online {
            // An answer that does not come leaves what is known.
            match self.list_conversations().await {
                Ok(listed) => unread = listed,
                Err(error @ (Error::Database(_) | Error::Closed)) => return Err(error),
                Err(error) => tracing::debug!(%error, "the conversation list could not be refreshed"),
            }
        }
        let mut conversations = self.shared.db.run(false, |store| store.conversations()).await?;
        for conversation in &mut conversations {
            // The gateway counts what has not come in yet; what was read here since is known here only.
            if let Some((read, count)) = unread.get(&conversation.conversation)
                && *read >= conversation.read
            {
                conversation.unread = *count;
            }
        }
        Ok(conversations)
    }

    async fn list_conversations(&self) -> Result<BTreeMap<ConversationId, (Seq, u32)>, Error> {
        let mut unread = BTreeMap::new();
        let mut after = ConversationId::default();
        loop {
            let page: ConversationPage =
                self.builtin(Method::ListConversations, &ListConversations { after }).await?;
            let Some(last) = page.conversations.last() else { return Ok(unread) };
            after = last.conversation;
            unread.extend(page.conversations.iter().map(|e| (e.conversation, (e.read, e.unread))));
            let more = page.more && unread.len() < CONVERSATIONS_MAX;
            self.shared
                .db
                .run(false, move |store| page.conversations.iter().try_for_each(|e| store.list_entry(e)))
                .await?;
            if !more {
                return Ok(unread);
            }
        }
    }

    /// The user's devices.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn devices(&self) -> Result<Vec<DeviceEntry>, Error> {
        let devices: Devices = self.builtin(Method::MyDevices, &()).await?;
        Ok(devices.devices)
    }

    /// The name of a user this one has to do with; asks the gateway when it is not known yet. `None`: there is none.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn name_of(&self, user: UserId) -> Result<Option<String>, Error> {
        let known = self.shared.db.run(false, move |store| store.user_name(user)).await?;
        if known.is_some() {
            return Ok(known);
        }
        let found: NamesFound = self.builtin(Method::Names, &Names { users: vec![user] }).await?;
        let name = found.names.into_iter().find(|(number, _)| *number == user).map(|(_, name)| name);
        if let Some(name) = name.clone() {
            self.shared.db.run(false, move |store| store.name_user(user, &name)).await?;
        }
        Ok(name)
    }

    /// The own user's number; `None` until the first WELCOME of this database.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn user(&self) -> Result<Option<UserId>, Error> {
        self.shared.db.run(false, |store| Ok(store.identity()?.user)).await
    }

    /// What this database calls itself.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn device_uid(&self) -> Result<DeviceUid, Error> {
        self.shared.db.run(false, |store| store.uid()).await
    }

    /// Sends that are not settled, and those whose end the app was not told, oldest first, at most 1 000; also those
    /// of earlier runs.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn outbox(&self) -> Result<Vec<OutboxEntry>, Error> {
        let registry = Arc::clone(&self.shared);
        let entries = self
            .shared
            .db
            .run(false, move |store| {
                let unsettled = store.unsettled(OUTBOX_MAX)?;
                // On the database's thread, so that none can be settled between the look and the subscription.
                Ok(unsettled
                    .into_iter()
                    .map(|entry| {
                        let now = entry.outcome.map_or(Progress::QUEUED, Progress::of);
                        (registry.subscribe(entry.id, now), entry)
                    })
                    .collect::<Vec<_>>())
            })
            .await?;
        let entry = |(progress, entry): (_, crate::db::Unsettled)| {
            let number = match entry.target {
                OpenTarget::Number(number) => Some(number),
                _ => None,
            };
            OutboxEntry {
                handle: SendHandle::new(entry.id, progress, Arc::clone(&self.shared)),
                conversation: Conversation::new(self.clone(), entry.target, number),
                kind: entry.kind,
                payload: entry.payload,
                created: UnixMillis::new(entry.created).unwrap_or_default(),
            }
        };
        Ok(entries.into_iter().map(entry).collect())
    }

    /// Calls a service of the business. Repeated over reconnects until `timeout`, so it should be harmless to repeat.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::TimedOut`], [`Error::BodyTooLarge`].
    pub async fn call(
        &self,
        service: ServiceId,
        method: u32,
        body: bytes::Bytes,
        timeout: Duration,
    ) -> Result<bytes::Bytes, Error> {
        if body.len() > CALL_BODY_BYTES_MAX {
            return Err(Error::BodyTooLarge { bytes: body.len() });
        }
        self.request(timeout, |reply, expires| Request::Call(Call { service, method, body, expires, reply }))
            .await
    }

    pub(crate) async fn builtin<T: DeserializeOwned>(
        &self,
        method: Method,
        body: &(impl Serialize + Sync),
    ) -> Result<T, Error> {
        let body = service::encode(body).ok_or(Error::BadRequest("the request does not fit a frame"))?;
        let answer = self.call(service::BUILTIN, method as u32, body, REQUEST_TIMEOUT).await?;
        service::decode(&answer).ok_or(Error::BadAnswer)
    }

    pub(crate) async fn request<T>(
        &self,
        timeout: Duration,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>, Duration) -> Request,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let platform = &*self.shared.platform;
        let expires = platform.monotonic() + timeout;
        let asked = async {
            self.requests.send(request(reply, expires)).await.map_err(|_| Error::Closed)?;
            answer.await.map_err(|_| Error::Closed)?
        };
        within(platform, timeout, asked).await.ok_or(Error::TimedOut)?
    }

    /// The app goes to the background: the connection is closed and none is made until [`Client::resume`].
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn suspend(&self) -> Result<(), Error> {
        self.requests.send(Request::Suspend).await.map_err(|_| Error::Closed)
    }

    /// The app is back: connects at once.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn resume(&self) -> Result<(), Error> {
        self.requests.send(Request::Resume(None)).await.map_err(|_| Error::Closed)
    }

    /// A push of the vendor says that there is something new in a conversation: connects at once, and what is new there
    /// comes before everything else.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn wake(&self, conversation: ConversationId) -> Result<(), Error> {
        self.requests.send(Request::Resume(Some(conversation))).await.map_err(|_| Error::Closed)
    }

    /// The operating system says that the network changed, or is back: the connection moves to a new socket and proves
    /// itself at once; if it can't, another one is made beside it.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn network_changed(&self, network: fulmar_protocol::frame::NetworkHint) -> Result<(), Error> {
        self.network_changed_to(network, "").await
    }

    /// The same, with what the operating system calls the network: see [`Options::network_name`].
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn network_changed_to(
        &self,
        network: fulmar_protocol::frame::NetworkHint,
        name: &str,
    ) -> Result<(), Error> {
        let request = Request::Network(network, name.to_owned());
        self.requests.send(request).await.map_err(|_| Error::Closed)
    }

    /// The last attempts to connect, at most 200, oldest first: for a report to support.
    #[must_use]
    pub fn attempts(&self) -> Vec<Attempt> {
        lock(&self.shared.attempts).iter().cloned().collect()
    }

    /// By which way the client is connected; `None`: it is not. Everything works the same by each of them.
    #[must_use]
    pub fn transport(&self) -> Option<TransportKind> {
        let meter = self.shared.traffic();
        let kind = meter.link.as_ref()?.kind();
        Some(match kind {
            fulmar_transport::Kind::Quic => TransportKind::Quic,
            fulmar_transport::Kind::Tls => TransportKind::Tls,
            fulmar_transport::Kind::WebSocket => TransportKind::WebSocket,
        })
    }

    /// What the connections have cost so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let meter = self.shared.traffic();
        let stream = meter.link.as_ref().filter(|link| link.kind() != fulmar_transport::Kind::Quic);
        let now = stream.map(|link| link.stats());
        let udp = meter.udp.as_ref().map_or((0, 0), |udp| (udp.sent(), udp.received()));
        Traffic {
            connections: meter.connections,
            sent_bytes: meter.past_sent_bytes + udp.0 + now.map_or(0, |now| now.bytes_out),
            received_bytes: meter.past_received_bytes + udp.1 + now.map_or(0, |now| now.bytes_in),
            rtt: meter.rtt,
            stray_pieces: meter.stray_pieces,
        }
    }

    /// Ends the client, for all its clones: sends what can be sent at once, writes what is left to write, closes the
    /// connection. What is in the outbox stays there.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn close(&self) -> Result<(), Error> {
        let (reply, done) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            let _ = done.await;
        }
        self.shared.flush().await
    }
}

fn checked(name: &str) -> Result<String, Error> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(Error::BadName);
    }
    Ok(name.to_owned())
}
