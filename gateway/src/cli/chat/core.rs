//! The chat between the client and whatever shows it: takes what comes in into the model, carries commands out.
//!
//! - [`Core::next`] waits for one thing that happened and takes it in at once, so that dropping its future loses nothing.
//! - Whatever has to wait for an answer waits in a task of its own and comes back as a [`Note`]; typing never waits.
//!
//! Not here: drawing, keys.

use std::collections::HashMap;
use std::time::Duration;

use fulmar_client::{
    Client, ClientEvent, ConnectionState, Conversation, ConversationClass, ConversationId,
    ConversationSummary, Error, EventKind, Events, Messages, Receipt, Received, RecordKind, SendStatus, Seq,
    States, UserId,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::command::{Command, HELP};
use super::model::{Model, Pending};

/// Messages loaded at once from the database.
const PAGE: usize = 100;

/// Notes that may wait; a task that brings one more waits.
const NOTES_MAX: usize = 64;

/// Pause before a name is asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// A typing notice is sent at most this often.
const TYPING_EVERY: Duration = Duration::from_secs(3);

/// How long leaving may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a task found out.
#[derive(Debug)]
enum Note {
    Listed(Vec<ConversationSummary>),
    Resolved { name: String, class: ConversationClass, number: ConversationId },
    History { number: ConversationId, messages: Vec<Received>, asked: usize },
    Receipts(ConversationId, Vec<Receipt>),
    Status(u64, SendStatus),
    Me(UserId),
    Name(UserId, String),
    Waiting { number: ConversationId, pending: Pending },
    Left(ConversationId),
    Say(String),
}

/// What has changed, for those who show it line by line.
#[derive(Debug)]
pub(super) enum Change {
    /// A message that was not here before.
    Message(Box<Received>),
    /// The connection.
    Connection,
    /// Something the program says.
    Said(String),
    /// Anything else.
    Other,
    /// The client is closed, or its database failed.
    Closed,
}

/// A chat that runs.
#[derive(Debug)]
pub(super) struct Core {
    /// What there is to show.
    pub(super) model: Model,
    client: Client,
    messages: Messages,
    states: States,
    events: Events,
    notes: mpsc::Receiver<Note>,
    note: mpsc::Sender<Note>,
    tasks: JoinSet<()>,
    /// The user's own number, once it is known.
    user: Option<UserId>,
    /// The list is being asked for.
    listing: bool,
    started: Instant,
    typed: Option<Instant>,
    /// How far the user's read marks were sent.
    read: HashMap<ConversationId, Seq>,
}

impl Core {
    /// Around a client of the user `me`.
    pub(super) fn new(client: Client, me: &str) -> Self {
        let (note, notes) = mpsc::channel(NOTES_MAX);
        let mut core = Self {
            model: Model::new(me),
            messages: client.messages(),
            states: client.state(),
            events: client.events(),
            client,
            notes,
            note,
            tasks: JoinSet::new(),
            user: None,
            listing: false,
            started: Instant::now(),
            typed: None,
            read: HashMap::new(),
        };
        core.list();
        core.outbox();
        core
    }

    /// Time for typing notices.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits for the next thing that happens and takes it in.
    pub(super) async fn next(&mut self) -> Change {
        tokio::select! {
            state = self.states.next() => match state {
                Some(state) => self.connection(state),
                None => Change::Closed,
            },
            message = self.messages.next() => match message {
                Some(message) => self.message(message),
                None => Change::Closed,
            },
            event = self.events.next() => match event {
                Some(event) => self.event(event),
                None => Change::Closed,
            },
            note = self.notes.recv() => match note {
                Some(note) => self.take(note),
                None => Change::Closed,
            },
            Some(_) = self.tasks.join_next() => Change::Other,
        }
    }

    fn connection(&mut self, state: ConnectionState) -> Change {
        let live = state == ConnectionState::Live;
        self.model.connection = Some(state);
        if live {
            self.list();
        }
        Change::Connection
    }

    fn message(&mut self, message: Received) -> Change {
        let known = self
            .model
            .rooms
            .iter()
            .any(|room| room.number == Some(message.conversation) && !room.name.is_empty());
        if !known {
            self.list();
        }
        let new = self.model.take(&message);
        self.model.sort();
        self.mark_read();
        if new { Change::Message(Box::new(message)) } else { Change::Other }
    }

    fn event(&mut self, event: ClientEvent) -> Change {
        match event {
            ClientEvent::Ephemeral { conversation, kind: EventKind::Typing, sender, .. } => {
                let now = self.now();
                self.model.typing(conversation, sender, now);
                if !self.model.knows(sender) {
                    self.ask_name(sender);
                }
            }
            ClientEvent::Receipt { conversation, user, recv, read } => {
                let at = self.model.at(conversation);
                if let Some(room) = self.model.rooms.get_mut(at) {
                    if Some(user) == self.user {
                        // Another device of the same user has read it.
                        if room.newest().is_some_and(|newest| read >= newest) {
                            room.unread = 0;
                        }
                    } else {
                        room.receipt(user, recv, read);
                    }
                }
            }
            ClientEvent::Conversation { .. } => self.list(),
            ClientEvent::Name { user, name } => self.model.name(user, &name),
            ClientEvent::Gap { from, to, .. } => {
                return self.say(format!(
                    "messages {} to {} are gone from the gateway",
                    from.get(),
                    to.get()
                ));
            }
            _ => {}
        }
        Change::Other
    }

    fn take(&mut self, note: Note) -> Change {
        match note {
            Note::Listed(listed) => {
                self.listing = false;
                for summary in listed {
                    self.listed(&summary);
                }
                self.model.sort();
            }
            Note::Resolved { name, class, number } => {
                self.model.resolved(&name, class, number);
                self.load(number, None);
                if self.model.room().is_some_and(|room| room.number == Some(number)) {
                    self.show(number);
                }
            }
            Note::History { number, messages, asked } => {
                let at = self.model.at(number);
                let unread = self.model.rooms.get(at).map(|room| room.unread);
                let count = messages.len();
                for message in &messages {
                    self.model.take(message);
                }
                if let Some(room) = self.model.rooms.get_mut(at) {
                    room.at_start = count < asked;
                    // What was on disk before is not news.
                    room.unread = unread.unwrap_or(0);
                }
                self.mark_read();
            }
            Note::Receipts(number, receipts) => {
                let at = self.model.at(number);
                if let Some(room) = self.model.rooms.get_mut(at) {
                    for receipt in receipts.iter().filter(|receipt| Some(receipt.user) != self.user) {
                        room.receipt(receipt.user, receipt.recv, receipt.read);
                    }
                }
            }
            Note::Status(id, status) => {
                self.model.status(id, status);
                if let SendStatus::Refused(code) = status {
                    return self.say(format!("not sent: {code}"));
                }
            }
            Note::Me(user) => self.user = Some(user),
            Note::Name(user, name) => self.model.name(user, &name),
            Note::Waiting { number, pending } => {
                let at = self.model.at(number);
                if let Some(room) = self.model.rooms.get_mut(at) {
                    room.pending.push(pending);
                }
            }
            Note::Left(number) => {
                let open = self.model.room().is_some_and(|room| room.number == Some(number));
                self.model.rooms.retain(|room| room.number != Some(number));
                self.model.open = None;
                if open {
                    return self.say("you left the group".to_owned());
                }
            }
            Note::Say(text) => return self.say(text),
        }
        Change::Other
    }

    fn say(&mut self, text: String) -> Change {
        self.model.notice(text.clone());
        Change::Said(text)
    }

    fn listed(&mut self, summary: &ConversationSummary) {
        let name = summary.name.clone();
        if !name.is_empty() {
            // A conversation that was opened by its name before its number was known is the same one.
            self.model.resolved(&name, summary.class, summary.conversation);
        }
        let at = self.model.at(summary.conversation);
        let open = self.model.open == Some(at);
        if let Some(room) = self.model.rooms.get_mut(at) {
            room.name = name;
            room.class = summary.class;
            room.unread = if open { 0 } else { summary.unread };
            room.time = room.time.max(summary.time.get());
        }
        let read = self.read.entry(summary.conversation).or_default();
        *read = (*read).max(summary.read);
    }

    /// Carries a command out; `false` ends the chat.
    ///
    /// # Errors
    /// The client's database failed, or the client is closed.
    pub(super) async fn execute(&mut self, command: Command) -> Result<bool, Error> {
        match command {
            Command::Quit => return Ok(false),
            Command::Help => HELP.iter().for_each(|line| self.model.notice(*line)),
            Command::Say(text) => self.send(text).await?,
            Command::With(name) if name == self.model.me => self.model.notice("that is you"),
            Command::With(name) => self.open(&name, ConversationClass::Direct).await?,
            Command::Group(name) => {
                self.open(name.trim_start_matches('#'), ConversationClass::Group).await?;
            }
            Command::Broadcast(name) => {
                self.open(name.trim_start_matches('!'), ConversationClass::Broadcast).await?;
            }
            Command::List => self.list_aloud(),
            Command::Older => self.older(),
            Command::New(name, members) => self.create(name.trim_start_matches('#').to_owned(), members),
            Command::Who => self.who(),
            Command::Add(names) => self.change(names, true),
            Command::Remove(names) => self.change(names, false),
            Command::Leave => self.leave(),
        }
        Ok(true)
    }

    /// Opens the conversation with this user, group or broadcast.
    ///
    /// # Errors
    /// The name can't be one, or the database failed.
    pub(super) async fn open(&mut self, name: &str, class: ConversationClass) -> Result<(), Error> {
        let conversation = match self.called(name, class).await {
            Ok(conversation) => conversation,
            Err(error @ Error::BadName) => {
                self.model.notice(error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let at = self.model.named(name, class);
        match self.model.rooms.get(at).and_then(|room| room.number) {
            Some(_) => self.go_to(at),
            None => {
                self.model.open = Some(at);
                self.resolve(name.to_owned(), class, conversation);
            }
        }
        Ok(())
    }

    async fn called(&self, name: &str, class: ConversationClass) -> Result<Conversation, Error> {
        match class {
            ConversationClass::Direct => self.client.direct(name).await,
            ConversationClass::Group => self.client.group(name).await,
            ConversationClass::Broadcast => self.client.broadcast(name).await,
        }
    }

    /// Opens the conversation at this place of the list.
    pub(super) fn go_to(&mut self, at: usize) {
        let Some(room) = self.model.rooms.get_mut(at) else { return };
        room.unread = 0;
        let (number, empty) = (room.number, room.entries.is_empty() || !room.at_start);
        self.model.open = Some(at);
        if let Some(number) = number {
            self.show(number);
            if empty {
                self.load(number, None);
            }
        }
        self.mark_read();
    }

    /// Opens the next (or the previous) conversation of the list.
    pub(super) fn step(&mut self, forward: bool) {
        let count = self.model.rooms.len();
        if count == 0 {
            return;
        }
        let at = match (self.model.open, forward) {
            (None, _) => 0,
            (Some(at), true) => (at + 1) % count,
            (Some(at), false) => (at + count - 1) % count,
        };
        self.go_to(at);
    }

    /// Loads older messages of the open conversation.
    pub(super) fn older(&mut self) {
        let Some(room) = self.model.room() else { return };
        if room.at_start {
            self.model.notice("that is the beginning");
            return;
        }
        if let (Some(number), before) = (room.number, room.oldest()) {
            self.load(number, before);
        }
    }

    /// The user is typing into the open conversation.
    pub(super) fn typing(&mut self) {
        let due = self.typed.is_none_or(|typed| typed.elapsed() >= TYPING_EVERY);
        let Some(number) = self.model.room().and_then(|room| room.number).filter(|_| due) else { return };
        self.typed = Some(Instant::now());
        let conversation = self.client.conversation(number);
        self.tasks.spawn(async move {
            // Typing passes by; whoever does not hear of it misses nothing.
            let _ = conversation.typing().await;
        });
    }

    /// Own messages that are not stored yet.
    pub(super) fn under_way(&self) -> usize {
        let open = |pending: &&Pending| !pending.status.is_settled();
        self.model.rooms.iter().map(|room| room.pending.iter().filter(open).count()).sum()
    }

    /// Ends the client; what is not sent stays in its database.
    pub(super) async fn close(mut self) -> Result<(), Error> {
        self.messages.done();
        self.tasks.abort_all();
        match timeout(CLOSE_TIMEOUT, self.client.close()).await {
            Ok(closed) => closed,
            Err(_) => Err(Error::TimedOut),
        }
    }

    async fn send(&mut self, text: String) -> Result<(), Error> {
        let Some(room) = self.model.room() else {
            self.model.notice("to whom? /with NAME or /group NAME opens a conversation");
            return Ok(());
        };
        let (number, name, class) = (room.number, room.name.clone(), room.class);
        let conversation = match number {
            Some(number) => self.client.conversation(number),
            None => self.called(&name, class).await?,
        };
        let handle = match conversation.send(text.clone()).await {
            Ok(handle) => handle,
            Err(error @ Error::BodyTooLarge { .. }) => {
                self.model.notice(error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.typed = None;
        if let Some(room) = self.model.room_mut() {
            room.pending.push(Pending { id: handle.id(), text, status: handle.status() });
        }
        let note = self.note.clone();
        self.tasks.spawn(async move {
            let mut steps = handle.watch();
            while let Some(status) = steps.next().await {
                if note.send(Note::Status(handle.id(), status)).await.is_err() || status.is_settled() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Messages of an earlier run that are still on their way.
    fn outbox(&mut self) {
        let (client, note) = (self.client.clone(), self.note.clone());
        self.tasks.spawn(async move {
            let Ok(entries) = client.outbox().await else { return };
            let mut waiting = 0;
            for entry in entries.into_iter().filter(|entry| !entry.handle.status().is_settled()) {
                waiting += 1;
                let Some(number) = entry.conversation.number() else { continue };
                if entry.kind != RecordKind::Message {
                    continue;
                }
                let text = String::from_utf8_lossy(&entry.payload).into_owned();
                let pending = Pending { id: entry.handle.id(), text, status: entry.handle.status() };
                let _ = note.send(Note::Waiting { number, pending }).await;
                let note = note.clone();
                tokio::spawn(async move {
                    let end = entry.handle.acked().await;
                    let status = end.map_or(SendStatus::Expired, SendStatus::Acked);
                    let _ = note.send(Note::Status(entry.handle.id(), status)).await;
                });
            }
            if waiting > 0 {
                let text = format!("{waiting} messages of the last time are on their way");
                let _ = note.send(Note::Say(text)).await;
            }
        });
    }

    fn resolve(&mut self, name: String, class: ConversationClass, conversation: Conversation) {
        let note = self.note.clone();
        self.tasks.spawn(async move {
            loop {
                match conversation.resolved().await {
                    Ok(number) => {
                        let _ = note.send(Note::Resolved { name, class, number }).await;
                        return;
                    }
                    Err(Error::TimedOut | Error::TooMany) => sleep(ASK_AGAIN).await,
                    Err(error) => {
                        let _ = note.send(Note::Say(format!("{name}: {error}"))).await;
                        return;
                    }
                }
            }
        });
    }

    /// The conversation is on the screen: its messages come first.
    fn show(&mut self, number: ConversationId) {
        let conversation = self.client.conversation(number);
        self.tasks.spawn(async move {
            // Only a wish: without it the messages come all the same.
            let _ = conversation.on_screen().await;
        });
    }

    fn load(&mut self, number: ConversationId, before: Option<Seq>) {
        let (conversation, note) = (self.client.conversation(number), self.note.clone());
        self.tasks.spawn(async move {
            if let Ok(messages) = conversation.history(before, PAGE).await {
                let _ = note.send(Note::History { number, messages, asked: PAGE }).await;
            }
            if let Ok(receipts) = conversation.receipts().await {
                let _ = note.send(Note::Receipts(number, receipts)).await;
            }
        });
    }

    fn list(&mut self) {
        if std::mem::replace(&mut self.listing, true) {
            return;
        }
        let (client, note) = (self.client.clone(), self.note.clone());
        self.tasks.spawn(async move {
            if let Ok(Some(user)) = client.user().await {
                let _ = note.send(Note::Me(user)).await;
            }
            let listed = client.conversations().await.unwrap_or_default();
            let _ = note.send(Note::Listed(listed)).await;
        });
    }

    fn list_aloud(&mut self) {
        let lines: Vec<String> = self
            .model
            .rooms
            .iter()
            .map(|room| match room.unread {
                0 => room.title(),
                unread => format!("{} ({unread} unread)", room.title()),
            })
            .collect();
        if lines.is_empty() {
            self.model.notice("no conversation yet: /with NAME begins one");
        }
        lines.into_iter().for_each(|line| self.model.notice(line));
    }

    fn ask_name(&mut self, user: UserId) {
        if self.tasks.len() >= NOTES_MAX {
            return;
        }
        let (client, note) = (self.client.clone(), self.note.clone());
        self.tasks.spawn(async move {
            if let Ok(Some(name)) = client.name_of(user).await {
                let _ = note.send(Note::Name(user, name)).await;
            }
        });
    }

    fn create(&mut self, name: String, members: Vec<String>) {
        let at = self.model.named(&name, ConversationClass::Group);
        self.model.open = Some(at);
        let (client, note) = (self.client.clone(), self.note.clone());
        self.tasks.spawn(async move {
            let members: Vec<&str> = members.iter().map(String::as_str).collect();
            let answer = match client.create_group(&name, &members).await {
                Ok(group) => match group.number() {
                    Some(number) => Note::Resolved { name, class: ConversationClass::Group, number },
                    None => Note::Say(format!("#{name} was made")),
                },
                Err(error) => Note::Say(format!("#{name} can't be made: {error}")),
            };
            let _ = note.send(answer).await;
        });
    }

    fn group(&mut self) -> Option<ConversationId> {
        let number = self
            .model
            .room()
            .filter(|room| room.class == ConversationClass::Group)
            .and_then(|room| room.number);
        if number.is_none() {
            self.model.notice("no group is open: /group NAME");
        }
        number
    }

    fn change(&mut self, names: Vec<String>, add: bool) {
        let Some(number) = self.group() else { return };
        let (conversation, note) = (self.client.conversation(number), self.note.clone());
        self.tasks.spawn(async move {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let changed =
                if add { conversation.add(&names).await } else { conversation.remove(&names).await };
            let text = match changed {
                // The record of it comes like any message.
                Ok(changed) if changed.changed > 0 => return,
                Ok(_) if add => "they are in the group already".to_owned(),
                Ok(_) => "they are not in the group".to_owned(),
                Err(error) => format!("the members could not be changed: {error}"),
            };
            let _ = note.send(Note::Say(text)).await;
        });
    }

    fn leave(&mut self) {
        let Some(number) = self.group() else { return };
        let (conversation, note, me) =
            (self.client.conversation(number), self.note.clone(), self.model.me.clone());
        self.tasks.spawn(async move {
            let answer = match conversation.remove(&[&me]).await {
                Ok(_) => Note::Left(number),
                Err(error) => Note::Say(format!("could not leave: {error}")),
            };
            let _ = note.send(answer).await;
        });
    }

    fn who(&mut self) {
        let Some(number) = self.model.room().and_then(|room| room.number) else {
            let wait = "no conversation is open, or the gateway was not reached yet";
            self.model.notice(wait);
            return;
        };
        let (conversation, note) = (self.client.conversation(number), self.note.clone());
        self.tasks.spawn(async move {
            let text = match conversation.members().await {
                Ok(members) => {
                    let member = |member: &fulmar_client::MemberEntry| {
                        let there = if member.online { "online" } else { "away" };
                        format!("{} ({there})", super::model::printable(&member.name))
                    };
                    format!("here: {}", members.iter().map(member).collect::<Vec<_>>().join(", "))
                }
                Err(error) => format!("the members could not be listed: {error}"),
            };
            let _ = note.send(Note::Say(text)).await;
        });
    }

    /// What is on the screen is read.
    fn mark_read(&mut self) {
        let Some(room) = self.model.room() else { return };
        let (Some(number), Some(newest)) = (room.number, room.newest()) else { return };
        let read = self.read.entry(number).or_default();
        if newest <= *read {
            return;
        }
        *read = newest;
        let conversation = self.client.conversation(number);
        self.tasks.spawn(async move {
            // Told again with the next message.
            let _ = conversation.mark_read(newest).await;
        });
    }
}
