//! What each frame sets in motion. Frames of a connection come here one after the other.

use std::{
    collections::{BTreeMap, HashMap},
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{
        self, AuthProof, Bytes8, Frame, Hello, Limits, Mark, Open, OpenTarget, Opened, Receipt, Receipts,
        Resumption, Welcome,
    },
    id::{ConversationId, Producer, Pseq, RequestId, Seq, SessionId, UnixMillis},
    limit::{DATAGRAM_BYTES_MAX, ENTRIES_PER_FRAME_MAX, PULLS_INFLIGHT_MAX},
    session::{digest::CursorDigest, gateway::Output},
    version::{self, Features},
};
use tracing::{Instrument as _, Span, debug, debug_span, warn};

use super::{
    driver::{Connection, End, Peer, describe},
    lateness,
    turns::Offered,
};
use crate::{
    conversation::{
        Command, ConversationClass, DirectRequest, Found, KnownCursors, LoggedIn, LoginRequest, Refusal,
        route::Named,
        shard::{Handed, ShardHandle, carry_link},
        state::direct_peer,
    },
    fanout::owed::Owed,
    ground::{blocking, now as monotonic_now, unix_now},
    identity::ticket::Ticket,
    receipt::{
        ReadError, catchup,
        resume::{self, Looked},
    },
    record, service,
};

/// Records a device may be behind in one conversation and still be served by the gateway's own doing; further back
/// it pulls, at its own pace.
pub(super) const BACKLOG_RECORDS_MAX: u64 = 1_000;

/// Events of one connection that are passed on per second, and at once after a pause.
const EVENTS_PER_SECOND: f64 = 10.0;
pub(super) const EVENTS_BURST: f64 = 30.0;

/// Cursors the client still sends after its WELCOME.
#[derive(Debug, Default)]
pub(super) struct CursorSync {
    waiting: Option<HashMap<ConversationId, Seq>>,
}

/// Cursors of one device that are taken in at a resume; what is beyond starts at its oldest record.
const CURSORS_MAX: usize = 1 << 17;

/// What is still to be waited for.
pub(super) type Later<'a> = Pin<Box<dyn Future<Output = Result<(), End>> + Send + 'a>>;

/// Somebody whose proof is good.
struct Proven {
    app: fulmar_protocol::id::AppId,
    name: Arc<str>,
    ends: UnixMillis,
    /// A user that does not exist yet may come into being.
    open: bool,
}

impl Connection {
    /// Carries out one output. What can't be done at once is handed back and is to be waited for before anything else is carried out.
    ///
    /// It is boxed, and this is no `async fn`, because each of a connection's readers has room for it: what is frequent does not wait,
    /// and what waits is rare.
    pub(super) fn dispatch(self: &Arc<Self>, output: Output) -> Result<Option<Later<'_>>, End> {
        match output {
            Output::Transmit(frame) => self.tell(|session| session.transmit(frame))?,
            Output::Datagram(frame) => self.answer_copy(&frame),
            Output::Send(send) => {
                let peer = self.peer()?;
                let (conversation, pseq) = (send.conversation, send.pseq);
                debug_span!("send", conversation = conversation.get())
                    .in_scope(|| debug!(%pseq, bytes = send.payload.len(), "received"));
                let offered = Offered {
                    app: peer.app,
                    connection: peer.owed.connection,
                    lane: (conversation, peer.producer),
                    pseq,
                    bytes: send.payload.len(),
                };
                if let Some(refusal) = lateness::refuses(offered, self.transport.quic().is_some()) {
                    self.refuse_send(conversation, pseq, refusal)?;
                    return Ok(None);
                }
                let session = Arc::clone(&peer.owed);
                let command = Command::Send { session, app: peer.app, producer: peer.producer, send };
                let sent = self.context.conversation(conversation).map(|shard| shard.hand(command));
                match sent {
                    Ok(Handed::Over) => {}
                    Ok(Handed::Waiting(waiting)) => {
                        return Ok(Some(Box::pin(async move {
                            let sent = waiting.await;
                            sent.or_else(|refusal| self.refuse_send(conversation, pseq, refusal))
                        })));
                    }
                    Ok(Handed::Refused(refusal)) | Err(refusal) => {
                        self.refuse_send(conversation, pseq, refusal)?;
                    }
                }
            }
            Output::Ack(ack) => return self.acked(ack.entries),
            Output::Flush => self.peer()?.owed.look(),
            Output::Close { code, reason } => return Err(End::Close(code, reason)),
            rare => return Ok(Some(Box::pin(self.dispatch_rare(rare)))),
        }
        Ok(None)
    }

    fn refuse_send(&self, conversation: ConversationId, pseq: Pseq, refusal: Refusal) -> Result<(), End> {
        let refused = frame::SendRefused {
            conversation,
            pseq,
            code: refusal.code,
            expected: pseq,
            retry_after_ms: refusal.retry_after_ms,
        };
        self.tell(|session| session.refused(refused))
    }

    async fn dispatch_rare(self: &Arc<Self>, output: Output) -> Result<(), End> {
        match output {
            Output::Authenticate(hello) => self.authenticate(*hello).await,
            Output::Reauthenticate(auth) => self.reauthenticate(&auth.token),
            Output::Mark(Mark { conversation, read }) => {
                let peer = self.peer()?;
                let command = Command::Mark { app: peer.app, user: peer.producer.user, conversation, read };
                if let Ok(shard) = self.context.conversation(conversation) {
                    // A mark that is refused because the shard is gone is sent again on the next connection.
                    let _ = shard.send(command).await;
                }
                Ok(())
            }
            Output::Cursors(cursors) => self.cursors(cursors).await,
            Output::Open(open) => self.open(open).await,
            Output::Pull(pull) => {
                let mut pulls = self.pulls.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if pulls.len() >= PULLS_INFLIGHT_MAX {
                    drop(pulls);
                    self.context.metrics.full("pulls");
                    let error = error_frame(pull.id, RefusalCode::Busy.into());
                    return self.tell(|session| session.transmit(Frame::Error(error)));
                }
                pulls.push_back(pull);
                drop(pulls);
                self.pulls_wake.notify_one();
                Ok(())
            }
            Output::Call(call) => {
                let peer = self.peer()?;
                let caller =
                    service::Caller { app: peer.app, name: Arc::clone(&peer.name), producer: peer.producer };
                let reply = service::call(&self.context, &caller, call).instrument(self.span()).await;
                self.tell(|session| session.transmit(Frame::Reply(reply)))
            }
            Output::Event(mut event) => {
                let peer = self.peer()?;
                event.sender = peer.producer.user;
                if !self.events_allowed() {
                    self.context.metrics.events_dropped.inc();
                    return Ok(());
                }
                if let Ok(shard) = self.context.conversation(event.conversation)
                    && !shard.offer(Command::Event { app: peer.app, event })
                {
                    self.context.metrics.events_dropped.inc();
                }
                Ok(())
            }
            Output::Transmit(_)
            | Output::Datagram(_)
            | Output::Send(_)
            | Output::Ack(_)
            | Output::Flush
            | Output::Close { .. } => Ok(()),
        }
    }

    /// The answer to a SEND that came in a datagram leaves in one too.
    pub(super) fn answer_copy(&self, frame: &Frame) {
        self.context.metrics.hedged("ack");
        self.send_copy(frame.to_bytes());
    }

    /// Sends a copy of a frame in a datagram. What does not fit the path stays with its stream.
    pub(super) fn send_copy(&self, frame: Bytes) {
        if frame.len() <= DATAGRAM_BYTES_MAX.min(self.transport.max_datagram_size().unwrap_or(0)) {
            self.context.metrics.bytes_out(frame.len() as u64);
            // Full or gone: lost, as datagrams may be.
            let _ = self.transport.send_datagram(frame);
        }
    }

    /// Whether one more event may pass now: a client that sends more only harms its own events.
    fn events_allowed(&self) -> bool {
        let mut bucket = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = self.now();
        let refill = now.saturating_sub(bucket.1).as_secs_f64() * EVENTS_PER_SECOND;
        *bucket = ((bucket.0 + refill).min(EVENTS_BURST), now);
        let allowed = bucket.0 >= 1.0;
        if allowed {
            bucket.0 -= 1.0;
        }
        allowed
    }

    async fn authenticate(self: &Arc<Self>, hello: Hello) -> Result<(), End> {
        match self.let_in(&hello).await {
            Ok((proven, login)) => self.welcome(&hello, proven, login).await,
            Err((refusal, text)) => {
                self.context.metrics.auth_refused(refusal.code.name());
                if let Some(suppressed) = self.context.complaints.due(refusal.code.name(), monotonic_now()) {
                    self.said(|| warn!(reason = text, suppressed, "a client was not let in"));
                }
                let error = frame::Error { text, ..error_frame(RequestId::ZERO, refusal) };
                let close = match refusal.code {
                    RefusalCode::TokenExpired => CloseCode::AuthExpired,
                    RefusalCode::KickedOut => CloseCode::Kicked,
                    RefusalCode::Draining => CloseCode::Draining,
                    RefusalCode::Busy | RefusalCode::StorageUnavailable | RefusalCode::StorageFull => {
                        CloseCode::Overloaded
                    }
                    _ => CloseCode::AuthFailed,
                };
                let now = self.now();
                self.session().reject(error, close, now);
                Ok(())
            }
        }
    }

    async fn let_in(&self, hello: &Hello) -> Result<(Proven, LoggedIn), (Refusal, String)> {
        let refuse = |code: RefusalCode| (Refusal::new(code), code.to_string());
        if self.context.drain.is_draining() {
            return Err(refuse(RefusalCode::Draining));
        }
        let (proven, ticket) = self.prove(&hello.auth)?;
        let shard = self.context.named(proven.app, Named::User, &proven.name).map_err(|r| refuse(r.code))?;
        if !proven.open {
            let (app, name) = (proven.app, proven.name.to_string());
            let known = shard.ask(|answer| Command::User { app, name, create: false, answer }).await;
            known.map_err(|refusal| {
                (refusal, "the user is not known and this app does not take new ones".to_owned())
            })?;
        }
        let request = LoginRequest {
            app: proven.app,
            name: proven.name.to_string(),
            uid: hello.device,
            class: hello.class,
            epoch: hello.epoch,
            changed: hello.changed.clone(),
        };
        let login = shard.ask(|answer| Command::Login(request, answer)).await;
        let login = login.map_err(|refusal| (refusal, refusal.code.to_string()))?;
        if let Some(ticket) = ticket {
            let same =
                ticket.user == login.user && ticket.device == login.device && ticket.class == hello.class;
            if !same {
                return Err((
                    Refusal::new(RefusalCode::BadTicket),
                    "the ticket is of another device".to_owned(),
                ));
            }
            if ticket.class_epoch < login.class_epoch {
                return Err(refuse(RefusalCode::KickedOut));
            }
        }
        Ok((proven, login))
    }

    fn prove(&self, proof: &AuthProof) -> Result<(Proven, Option<Ticket>), (Refusal, String)> {
        let now = unix_now();
        match proof {
            AuthProof::Token(token) => match self.context.verifier.verify(token, now) {
                Ok(identity) => {
                    let proven = Proven {
                        app: identity.app,
                        name: identity.user_name,
                        ends: identity.expires_at,
                        open: identity.open_users,
                    };
                    Ok((proven, None))
                }
                Err(refusal) => Err((Refusal::new(refusal.code()), refusal.to_string())),
            },
            AuthProof::Ticket(sealed) => {
                let bad = |text: String| (Refusal::new(RefusalCode::BadTicket), text);
                let ticket =
                    self.context.tickets.open(&sealed.0, now).map_err(|refusal| bad(refusal.to_string()))?;
                if self.context.verifier.app_name(ticket.app).is_none() {
                    return Err((Refusal::new(RefusalCode::WrongApp), RefusalCode::WrongApp.to_string()));
                }
                let reader = &self
                    .context
                    .user(ticket.user)
                    .map_err(|_| bad("the ticket is of another data folder".to_owned()))?
                    .reader;
                match reader.user(ticket.user) {
                    Ok(Some(user)) if user.app == ticket.app => {
                        let proven = Proven {
                            app: ticket.app,
                            name: user.name.into(),
                            ends: ticket.expires,
                            open: true,
                        };
                        Ok((proven, Some(ticket)))
                    }
                    Ok(_) => Err(bad("the ticket's user is not known here".to_owned())),
                    Err(error) => Err((Refusal::new(RefusalCode::StorageUnavailable), error.to_string())),
                }
            }
        }
    }

    async fn welcome(self: &Arc<Self>, hello: &Hello, proven: Proven, login: LoggedIn) -> Result<(), End> {
        let context = &self.context;
        let LoggedIn { user, device, epoch, class_epoch, fresh, new_user, digest } = login;
        let mut features = Features(hello.features).and(Features::OURS);
        if self.transport.quic().is_none() {
            // On a byte stream nothing is lost alone, and a copy would come after what it is a copy of.
            features = features.without(Features::HEDGE);
        }
        let owed = Owed::new(user, device, context.number(), BACKLOG_RECORDS_MAX)
            .of_app(proven.app)
            .acks_are_echoes(features.has(Features::ACKS_ARE_ECHOES));
        let owed = Arc::new(owed);
        Span::current().record("user", user.get());
        // Present from here on: what is committed from now on is owed, whatever the resume finds.
        // All shards are asked at once: one after the other, each would be woken and waited for by itself.
        let arrivals = context
            .shards
            .iter()
            .map(|shard| shard.tell(|answer| Command::Arrive(Arc::clone(&owed), answer)));
        let arrived = futures_util::future::try_join_all(arrivals).await;
        let arrived = arrived.map_err(|refusal| End::Close(CloseCode::Draining, refusal.code.to_string()))?;
        // What one of them knows nothing of has to be looked for everywhere.
        let lacks: Option<Vec<Vec<ConversationId>>> = arrived.into_iter().collect();
        let lacks = lacks.map(|lacks| lacks.concat());
        let peer = Peer {
            app: proven.app,
            name: proven.name,
            producer: Producer { user, device, epoch },
            features,
            lanes: context.config.transport.lanes,
            owed,
        };
        debug!(%user, %device, fresh, "{}", describe(hello));
        if self.peer.set(peer).is_err() {
            return Err(End::Close(CloseCode::Internal, "welcomed twice".to_owned()));
        }
        context.metrics.sessions.inc();
        if matches!(hello.auth, AuthProof::Ticket(_)) {
            context.metrics.sessions_resumed.inc();
        }
        let now = unix_now();
        self.token_ends(proven.ends);
        let changed: HashMap<ConversationId, Seq> = hello.changed.iter().copied().collect();
        let mut cursors = None;
        let digest = match digest {
            Some(digest) => digest,
            None => {
                let mut known = if fresh { HashMap::new() } else { self.all_cursors().await? };
                known.extend(&changed);
                let digest = CursorDigest::of(known.iter().map(|(conversation, seq)| (*conversation, *seq)));
                cursors = Some(known);
                digest
            }
        };
        let resumption = if digest.0 == hello.cursor_digest {
            Resumption::Resumed
        } else if fresh && hello.cursor_digest == 0 {
            Resumption::Fresh
        } else {
            Resumption::NeedCursors
        };
        let session =
            SessionId::new(context.number() & fulmar_protocol::limit::VARINT_MAX).unwrap_or_default();
        let lifetime = context.config.auth.ticket_lifetime_s.saturating_mul(1_000);
        let expires = UnixMillis::new(now.get().saturating_add(lifetime)).unwrap_or(now).min(proven.ends);
        let ticket = context.tickets.seal(&Ticket {
            app: proven.app,
            user,
            device,
            class: hello.class,
            class_epoch,
            session,
            issued: now,
            expires,
        });
        let keepalive = &context.config.transport;
        let welcome = Welcome {
            minor: version::minor_of(hello.minor),
            features: features.0,
            session,
            ticket: Bytes8(ticket.to_vec()),
            user,
            device,
            epoch,
            class_epoch,
            server_time: now,
            lanes: context.config.transport.lanes,
            limits: Limits::default(),
            keepalive_ms: (
                keepalive.keepalive_min_s.saturating_mul(1_000),
                keepalive.keepalive_max_s.saturating_mul(1_000),
            ),
            resumption,
            addresses: context.config.listen.public_addresses.clone(),
            folder: Some(context.folder),
        };
        let at = self.now();
        self.session().welcome(welcome, at);
        self.control_wake.notify_one();
        if !hello.changed.is_empty() {
            self.keep_cursors(hello.changed.clone()).await;
        }
        match resumption {
            Resumption::NeedCursors => {
                self.cursors.lock().unwrap_or_else(std::sync::PoisonError::into_inner).waiting =
                    Some(HashMap::new());
                Ok(())
            }
            Resumption::Resumed | Resumption::Fresh => match lacks.filter(|_| !fresh) {
                Some(lacks) => self.resume_among(lacks, changed).await,
                None => {
                    let cursors = match cursors {
                        Some(cursors) => cursors,
                        None => {
                            let mut cursors = self.all_cursors().await?;
                            cursors.extend(changed);
                            cursors
                        }
                    };
                    // Heads of broadcasts may be on disk alone: they are not read on a core's thread.
                    let broadcasts = context.broadcasts.of(proven.app);
                    if new_user && broadcasts.is_empty() {
                        self.resume_new(&cursors)
                    } else {
                        self.resume(cursors).await
                    }
                }
            },
        }
    }

    /// The same as [`Self::resume`] for a user that has just come into being: there is next to nothing to be read, and it is where
    /// the user was written a moment ago. So no other thread is asked and waited for.
    fn resume_new(&self, cursors: &HashMap<ConversationId, Seq>) -> Result<(), End> {
        let user = self.peer()?.producer.user;
        let found = match self.context.user(user) {
            Ok(shard) => {
                let shard_of =
                    |conversation| Some(self.context.conversation(conversation).ok()?.reader.clone());
                resume::missed(&shard.reader, shard_of, user, &[], cursors)
            }
            Err(_) => Ok(Looked::default()),
        };
        self.owe("full", found)
    }

    /// All that is known of the device's receive cursors; their digest is kept from then on.
    async fn all_cursors(&self) -> Result<HashMap<ConversationId, Seq>, End> {
        let failed = |text: String| End::Close(CloseCode::Internal, format!("resume failed: {text}"));
        let Producer { user, device, .. } = self.peer()?.producer;
        let shard = self.context.user(user).map_err(|refusal| failed(refusal.code.to_string()))?;
        // What is on its way to disk first: what has arrived there meanwhile is read then.
        let known = shard.ask(|answer| Command::KnownCursors { user, device, of: None, answer }).await;
        let KnownCursors { cursors, moves } = known.map_err(|refusal| failed(refusal.code.to_string()))?;
        let reader = shard.reader.clone();
        let on_disk = blocking(move || resume::cursors_on_disk(&reader, user, device)).await;
        let mut all = match on_disk {
            Ok(Ok(all)) => all,
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(error) => return Err(failed(error.to_string())),
        };
        for (conversation, seq) in cursors {
            let known = all.entry(conversation).or_default();
            *known = (*known).max(seq);
        }
        let digest = CursorDigest::of(all.iter().map(|(conversation, seq)| (*conversation, *seq)));
        // A shard that is gone needs no digest.
        let _ = shard.send(Command::KeepDigest { user, device, digest, moves }).await;
        Ok(all)
    }

    /// Owes the device what it missed, which is in these conversations and those whose cursors have changed, and lets the
    /// writers start.
    async fn resume_among(
        self: &Arc<Self>,
        lacks: Vec<ConversationId>,
        changed: HashMap<ConversationId, Seq>,
    ) -> Result<(), End> {
        let failed = |text: String| End::Close(CloseCode::Internal, format!("resume failed: {text}"));
        let peer = self.peer()?;
        let (app, Producer { user, device, .. }) = (peer.app, peer.producer);
        let mut among = lacks;
        among.extend(changed.keys());
        among.sort_unstable();
        among.dedup();
        if among.is_empty() {
            return self.owe("kept", Ok(Looked::default()));
        }
        let shard = self.context.user(user).map_err(|refusal| failed(refusal.code.to_string()))?;
        let of = Some(among.clone());
        let known = shard.ask(|answer| Command::KnownCursors { user, device, of, answer }).await;
        let known = known.map_err(|refusal| failed(refusal.code.to_string()))?;
        let mut cursors: HashMap<ConversationId, Seq> = known.cursors.into_iter().collect();
        // The device's word counts.
        cursors.extend(changed);
        let context = Arc::clone(&self.context);
        let found = blocking(move || {
            let shard_of = |conversation| Some(context.conversation(conversation).ok()?.reader.clone());
            resume::missed_among(among, shard_of, user, context.broadcasts.of(app), &cursors)
        });
        self.owe("kept", found.await.map_err(|error| failed(error.to_string()))?)
    }

    /// Owes the device what it missed in any conversation of its user, and lets the writers start.
    async fn resume(self: &Arc<Self>, cursors: HashMap<ConversationId, Seq>) -> Result<(), End> {
        let peer = self.peer()?;
        let (app, user) = (peer.app, peer.producer.user);
        let context = Arc::clone(&self.context);
        // After a restart everybody comes at once: only so many are looked after at a time.
        let _turn = self.context.looks.acquire().await;
        let found = blocking(move || {
            let Ok(shard) = context.user(user) else { return Ok(Looked::default()) };
            let shard_of = |conversation| Some(context.conversation(conversation).ok()?.reader.clone());
            resume::missed(&shard.reader, shard_of, user, context.broadcasts.of(app), &cursors)
        });
        let found = found.await;
        self.owe(
            "full",
            found.map_err(|error| End::Close(CloseCode::Internal, format!("resume failed: {error}")))?,
        )
    }

    fn owe(&self, how: &'static str, found: Result<Looked, ReadError>) -> Result<(), End> {
        let Looked { missed, heads } =
            found.map_err(|error| End::Close(CloseCode::Internal, format!("resume failed: {error}")))?;
        self.context.metrics.looked(how, heads);
        debug!(conversations = missed.len(), heads, how, "resume");
        resume::owe(&self.peer()?.owed, &missed);
        // A device may send its cursors twice.
        let _ = self.ready.set(());
        Ok(())
    }

    async fn cursors(self: &Arc<Self>, cursors: frame::Cursors) -> Result<(), End> {
        let complete = {
            let mut sync = self.cursors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(waiting) = sync.waiting.as_mut() else {
                // Not asked for: nothing depends on it.
                return Ok(());
            };
            for (conversation, seq) in cursors.entries {
                if waiting.len() < CURSORS_MAX {
                    waiting.insert(conversation, seq);
                }
            }
            if cursors.last { sync.waiting.take() } else { None }
        };
        if let Some(cursors) = complete {
            let entries: Vec<_> = cursors.iter().map(|(conversation, seq)| (*conversation, *seq)).collect();
            for entries in entries.chunks(ENTRIES_PER_FRAME_MAX) {
                self.keep_cursors(entries.to_vec()).await;
            }
            self.resume(cursors).await?;
        }
        Ok(())
    }

    async fn keep_cursors(&self, entries: Vec<(ConversationId, Seq)>) {
        if let Handed::Waiting(waiting) = self.hand_cursors(entries, ShardHandle::hand) {
            // As for acks.
            let _ = waiting.await;
        }
    }

    fn hand_cursors(
        &self,
        entries: Vec<(ConversationId, Seq)>,
        hand: impl FnOnce(&ShardHandle, Command) -> Handed,
    ) -> Handed {
        let Ok(peer) = self.peer() else { return Handed::Over };
        let Producer { user, device, .. } = peer.producer;
        match self.context.user(user) {
            Ok(shard) => hand(shard, Command::Cursors { user, device, entries }),
            Err(refusal) => Handed::Refused(refusal),
        }
    }

    fn acked(&self, entries: Vec<(ConversationId, Seq)>) -> Result<Option<Later<'_>>, End> {
        self.context.metrics.cursors_moved.inc_by(entries.len() as u64);
        let now = self.now();
        self.copies().acked(&entries, now);
        let peer = self.peer()?;
        peer.owed.acked(&entries);
        let user = peer.producer.user;
        // In the order of their numbers: a simulated world repeats itself.
        let mut by_shard: BTreeMap<usize, Vec<(ConversationId, Seq)>> = BTreeMap::new();
        for (conversation, seq) in &entries {
            if let Some(shard) = self.context.route.conversation(*conversation) {
                by_shard.entry(shard).or_default().push((*conversation, *seq));
            }
        }
        for (shard, entries) in by_shard {
            if let Some(shard) = self.context.shards.get(shard) {
                // Receipts are news: a busy shard may miss some, the next ack says it all.
                drop(shard.hand_unhurried(Command::Received { user, entries }));
            }
        }
        Ok(match self.hand_cursors(entries, ShardHandle::hand_unhurried) {
            // The device's own cursors are the truth: one that is not kept is asked for at the next resume.
            Handed::Over | Handed::Refused(_) => None,
            Handed::Waiting(waiting) => Some(Box::pin(async move {
                let _ = waiting.await;
                Ok(())
            })),
        })
    }

    fn reauthenticate(&self, token: &str) -> Result<(), End> {
        let peer = self.peer()?;
        let verified = self.context.verifier.verify(token, unix_now());
        match verified {
            Ok(identity) if identity.app == peer.app && identity.user_name == peer.name => {
                self.token_ends(identity.expires_at);
                Ok(())
            }
            Ok(_) => {
                let text = "the token is of another user".to_owned();
                let error =
                    frame::Error { text, ..error_frame(RequestId::ZERO, RefusalCode::BadToken.into()) };
                let now = self.now();
                self.tell(|session| session.reject(error, CloseCode::AuthFailed, now))
            }
            Err(refusal) => {
                self.context.metrics.auth_refused(refusal.label());
                let text = refusal.to_string();
                let error = frame::Error { text, ..error_frame(RequestId::ZERO, refusal.code().into()) };
                let now = self.now();
                self.tell(|session| session.reject(error, CloseCode::AuthFailed, now))
            }
        }
    }

    async fn open(&self, open: Open) -> Result<(), End> {
        let id = open.id;
        match self.find(open).await {
            Ok((opened, receipts)) => self.tell(|session| {
                session.transmit(Frame::Opened(opened));
                for receipts in Receipts::split(&receipts) {
                    session.transmit(Frame::Receipts(receipts));
                }
            }),
            Err(refusal) => self.tell(|session| session.transmit(Frame::Error(error_frame(id, refusal)))),
        }
    }

    async fn find(&self, open: Open) -> Result<(Opened, Vec<Receipt>), Refusal> {
        let gone = |_| Refusal::new(RefusalCode::Draining);
        let peer = self.peer().map_err(gone)?;
        let (app, me) = (peer.app, peer.producer.user);
        let conversation = match open.target {
            OpenTarget::Number(conversation) => conversation,
            OpenTarget::Group(name) => {
                service::check_name(&name)?;
                let shard = self.context.named(app, Named::Group, &name)?;
                shard.ask(|answer| Command::GroupByName { app, name, answer }).await?
            }
            OpenTarget::Broadcast(name) => {
                service::check_name(&name)?;
                self.context.broadcast(app, &name)?
            }
            OpenTarget::Direct(name) => {
                service::check_name(&name)?;
                let with = service::user(&self.context, app, &name).await?;
                let request = DirectRequest { app, user: (me, peer.name.to_string()), peer: (with, name) };
                let placed = crate::conversation::state::direct_name(me, with);
                let shard = self.context.named(app, Named::Direct, &placed)?;
                let (conversation, links) = shard.ask(|answer| Command::Direct(request, answer)).await?;
                for link in links {
                    // What can't follow now follows by the repair at the next start.
                    let _ = carry_link(&self.context.shards, self.context.route, link).await;
                }
                conversation
            }
        };
        let shard = self.context.conversation(conversation)?;
        let producer = peer.producer;
        let found = shard.ask(|answer| Command::Find { app, conversation, producer, answer }).await?;
        if open.on_screen {
            peer.owed.prefer(conversation);
        }
        let Found { meta, head, member, read, last_pseq, progress, .. } = found;
        let with = direct_peer(&meta.name, me).filter(|_| meta.class == ConversationClass::Direct);
        let name = match with {
            Some(with) => service::name_of(&self.context, app, with).unwrap_or_default(),
            None => meta.name.clone(),
        };
        let opened = Opened {
            id: open.id,
            conversation,
            class: record::class(meta.class),
            name,
            peer: with.unwrap_or_default(),
            head: head.seq,
            count: head.count,
            low: catchup::low(&head, &member),
            joined: member.joined,
            read,
            last_pseq,
        };
        let receipts = progress
            .into_iter()
            .filter(|(user, _)| *user != me)
            .map(|(user, progress)| Receipt { conversation, user, recv: progress.recv, read: progress.read })
            .collect();
        Ok((opened, receipts))
    }
}

/// A refusal as the client is told it.
pub(super) fn error_frame(refers: RequestId, refusal: Refusal) -> frame::Error {
    frame::Error {
        code: refusal.code,
        refers,
        retry: refusal.code.retry(),
        retry_after_ms: refusal.retry_after_ms,
        text: refusal.code.text().to_owned(),
    }
}
