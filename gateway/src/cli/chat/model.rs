//! What there is to show: conversations, their messages, marks, who types, how the connection is.
//!
//! - A message stands once in its conversation, at its position; what is under way stands below, in the order of
//!   sending, until its own echo comes.
//! - Text of others is shown without control characters: it can't move the cursor or change colours.
//!
//! Not here: drawing (`screen`, `lines`), the client (`core`).

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use fulmar_client::{
    ConnectionState, ConversationClass, ConversationId, OfflineReason, Received, RecordKind, SendStatus, Seq,
    UserId,
};

/// How long a typing notice is shown.
const TYPING: Duration = Duration::from_secs(5);

/// Notices that are kept in a conversation.
const NOTICES_MAX: usize = 200;

/// Everything on the screen.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// The user's own name.
    pub(super) me: String,
    /// Where the connection stands.
    pub(super) connection: Option<ConnectionState>,
    /// In the order in which they are shown: the newest first.
    pub(super) rooms: Vec<Room>,
    /// Index of the open one.
    pub(super) open: Option<usize>,
    /// Names by number.
    names: HashMap<UserId, String>,
    /// Lines of the program itself while no conversation is open.
    pub(super) notices: Vec<String>,
}

/// A conversation.
#[derive(Debug)]
pub(super) struct Room {
    /// Its number, once it is known.
    pub(super) number: Option<ConversationId>,
    /// The other user, or the group; empty while it is not known.
    pub(super) name: String,
    /// What kind it is.
    pub(super) class: ConversationClass,
    /// Messages not seen yet.
    pub(super) unread: u32,
    /// By position.
    pub(super) entries: BTreeMap<Seq, Entry>,
    /// Own messages under way, in order.
    pub(super) pending: Vec<Pending>,
    /// How far the others have received and read.
    receipts: HashMap<UserId, (Seq, Seq)>,
    /// Who types, and until when that is shown.
    typing: HashMap<UserId, Duration>,
    /// Lines of the program itself, each below the position it came after.
    pub(super) notices: Vec<(Option<Seq>, String)>,
    /// When something last happened here, in milliseconds since 1970.
    pub(super) time: u64,
    /// There is nothing older in the database.
    pub(super) at_start: bool,
}

/// A message or a happening.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Who; `None` for what the conversation itself says.
    pub(super) sender: Option<UserId>,
    /// By this user.
    pub(super) own: bool,
    /// Milliseconds since 1970.
    pub(super) time: u64,
    /// What.
    pub(super) text: String,
    /// It was changed after it was sent.
    pub(super) edited: bool,
    /// Reactions, in order.
    pub(super) reactions: Vec<(UserId, String)>,
    /// The conversation was made; nobody has to be told that two people can talk.
    pub(super) created: bool,
}

/// An own message without its echo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    /// The send's name in the database.
    pub(super) id: u64,
    /// What.
    pub(super) text: String,
    /// How far it is.
    pub(super) status: SendStatus,
}

/// How far an own message has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// On disk here.
    Queued,
    /// It left.
    Sent,
    /// On the gateway's disk.
    Acked,
    /// Somebody has it.
    Delivered,
    /// Somebody has read it.
    Read,
    /// It will never arrive.
    Failed,
}

impl Mark {
    /// A few characters.
    pub(super) const fn sign(self) -> &'static str {
        match self {
            Self::Queued => "…",
            Self::Sent => "›",
            Self::Acked => "✓",
            Self::Delivered | Self::Read => "✓✓",
            Self::Failed => "✗",
        }
    }

    /// A word.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Sent => "sent",
            Self::Acked => "stored",
            Self::Delivered => "delivered",
            Self::Read => "read",
            Self::Failed => "not sent",
        }
    }
}

/// Of a message that is under way.
pub(super) const fn mark_of(status: SendStatus) -> Mark {
    match status {
        SendStatus::Queued => Mark::Queued,
        SendStatus::Sent => Mark::Sent,
        SendStatus::Acked(_) => Mark::Acked,
        SendStatus::Delivered => Mark::Delivered,
        SendStatus::Read => Mark::Read,
        _ => Mark::Failed,
    }
}

impl Room {
    /// One of which only the name is known.
    pub(super) fn named(name: &str, class: ConversationClass) -> Self {
        Self {
            number: None,
            name: name.to_owned(),
            class,
            unread: 0,
            entries: BTreeMap::new(),
            pending: Vec::new(),
            receipts: HashMap::new(),
            typing: HashMap::new(),
            notices: Vec::new(),
            time: 0,
            at_start: false,
        }
    }

    /// One of which only the number is known.
    pub(super) fn numbered(number: ConversationId) -> Self {
        Self { number: Some(number), ..Self::named("", ConversationClass::Group) }
    }

    /// What it is called on the screen.
    pub(super) fn title(&self) -> String {
        match (self.name.as_str(), self.number, self.class) {
            ("", Some(number), _) => format!("conversation {}", number.get()),
            ("", None, _) => "?".to_owned(),
            (name, _, ConversationClass::Direct) => printable(name),
            (name, _, ConversationClass::Group) => format!("#{}", printable(name)),
            (name, _, ConversationClass::Broadcast) => format!("!{}", printable(name)),
        }
    }

    /// The newest position that is here.
    pub(super) fn newest(&self) -> Option<Seq> {
        self.entries.keys().next_back().copied()
    }

    /// The oldest position that is here.
    pub(super) fn oldest(&self) -> Option<Seq> {
        self.entries.keys().next().copied()
    }

    /// How far an own message at this position has come.
    pub(super) fn mark(&self, seq: Seq) -> Mark {
        let (recv, read) = self
            .receipts
            .values()
            .fold((Seq::ZERO, Seq::ZERO), |(recv, read), (r, d)| (recv.max(*r), read.max(*d)));
        if seq <= read {
            Mark::Read
        } else if seq <= recv {
            Mark::Delivered
        } else {
            Mark::Acked
        }
    }

    /// A member's receipt; it never goes back.
    pub(super) fn receipt(&mut self, user: UserId, recv: Seq, read: Seq) {
        let (r, d) = self.receipts.entry(user).or_default();
        *r = (*r).max(recv).max(read);
        *d = (*d).max(read);
    }

    /// A line of the program itself, below what is there now.
    pub(super) fn notice(&mut self, text: impl Into<String>) {
        self.notices.push((self.newest(), text.into()));
        if self.notices.len() > NOTICES_MAX {
            self.notices.remove(0);
        }
    }

    fn add(&mut self, message: &Received, names: &HashMap<UserId, String>) -> bool {
        let known = self.entries.contains_key(&message.seq);
        let roster = || {
            let names: Vec<String> = message.roster().iter().map(|(_, name)| printable(name)).collect();
            if names.is_empty() { "somebody".to_owned() } else { names.join(", ") }
        };
        let who = || name_in(names, message.sender);
        let (sender, text) = match message.kind {
            RecordKind::Message => (Some(message.sender), printable(&message.text())),
            RecordKind::Created => (None, format!("{} made this group with {}", who(), roster())),
            RecordKind::Joined => (None, format!("{} added {}", who(), roster())),
            RecordKind::Left => match message.roster().as_slice() {
                [(user, _)] if *user == message.sender => (None, format!("{} left", who())),
                _ => (None, format!("{} removed {}", who(), roster())),
            },
            RecordKind::Notice => (None, printable(&message.text())),
            kind @ (RecordKind::Edit | RecordKind::Recall | RecordKind::Reaction) => {
                self.refer(kind, message);
                return false;
            }
        };
        let entry = Entry {
            sender,
            own: message.own,
            time: message.time.get(),
            text,
            edited: false,
            reactions: Vec::new(),
            created: message.kind == RecordKind::Created,
        };
        if !known {
            if message.this_device
                && let Some(at) = self.pending.iter().position(|pending| match pending.status {
                    SendStatus::Acked(seq) => seq == message.seq,
                    _ => pending.text == entry.text,
                })
            {
                self.pending.remove(at);
            }
            self.time = self.time.max(entry.time);
            // Who has sent something types no more.
            self.typing.remove(&message.sender);
            self.entries.insert(message.seq, entry);
        }
        !known
    }

    fn refer(&mut self, kind: RecordKind, message: &Received) {
        let Some(entry) = message.reference.and_then(|seq| self.entries.get_mut(&seq)) else { return };
        let by_author = entry.sender == Some(message.sender);
        match kind {
            RecordKind::Edit if by_author => {
                entry.text = printable(&message.text());
                entry.edited = true;
            }
            RecordKind::Recall if by_author => "(taken back)".clone_into(&mut entry.text),
            RecordKind::Reaction => {
                entry.reactions.retain(|(user, _)| *user != message.sender);
                let text = printable(&message.text());
                if !text.is_empty() {
                    entry.reactions.push((message.sender, text));
                }
            }
            _ => {}
        }
    }

    /// Names of those who type at `now`.
    fn typists(&self, now: Duration, names: &HashMap<UserId, String>) -> Vec<String> {
        let mut typists: Vec<String> = self
            .typing
            .iter()
            .filter(|(_, until)| **until > now)
            .map(|(user, _)| name_in(names, *user))
            .collect();
        typists.sort();
        typists
    }
}

impl Model {
    /// Of the user `me`.
    pub(super) fn new(me: &str) -> Self {
        Self { me: me.to_owned(), ..Self::default() }
    }

    /// The open conversation.
    pub(super) fn room(&self) -> Option<&Room> {
        self.rooms.get(self.open?)
    }

    /// The open conversation.
    pub(super) fn room_mut(&mut self) -> Option<&mut Room> {
        self.rooms.get_mut(self.open?)
    }

    /// The index of the conversation with this number; it is made when there is none.
    pub(super) fn at(&mut self, number: ConversationId) -> usize {
        match self.rooms.iter().position(|room| room.number == Some(number)) {
            Some(at) => at,
            None => {
                self.rooms.push(Room::numbered(number));
                self.rooms.len() - 1
            }
        }
    }

    /// The index of the conversation with this name; it is made when there is none.
    pub(super) fn named(&mut self, name: &str, class: ConversationClass) -> usize {
        match self.rooms.iter().position(|room| room.name == name && room.class == class) {
            Some(at) => at,
            None => {
                self.rooms.push(Room::named(name, class));
                self.rooms.len() - 1
            }
        }
    }

    /// The number of a named conversation is known now. What was two is one from now on.
    pub(super) fn resolved(&mut self, name: &str, class: ConversationClass, number: ConversationId) {
        let open = self.room().map(|room| (room.number, room.name.clone(), room.class));
        let named = self
            .rooms
            .iter()
            .position(|room| room.name == name && room.class == class && room.number.is_none());
        let numbered = self.rooms.iter().position(|room| room.number == Some(number));
        match (named, numbered) {
            (Some(named), Some(numbered)) => {
                let old = self.rooms.remove(named);
                let numbered = if numbered > named { numbered - 1 } else { numbered };
                if let Some(room) = self.rooms.get_mut(numbered) {
                    room.name = old.name;
                    room.class = old.class;
                    room.pending.splice(0..0, old.pending);
                    room.notices.splice(0..0, old.notices);
                }
                self.open = match open {
                    None => None,
                    Some((None, open_name, open_class)) if open_name == name && open_class == class => {
                        Some(numbered)
                    }
                    Some((open_number, open_name, open_class)) => self.rooms.iter().position(|room| {
                        room.number == open_number && room.name == open_name && room.class == open_class
                            || open_number.is_some() && room.number == open_number
                    }),
                };
            }
            (Some(named), None) => {
                if let Some(room) = self.rooms.get_mut(named) {
                    room.number = Some(number);
                }
            }
            (None, Some(numbered)) => {
                if let Some(room) = self.rooms.get_mut(numbered) {
                    name.clone_into(&mut room.name);
                    room.class = class;
                }
            }
            (None, None) => {}
        }
    }

    /// Takes a message in; `true` when it is new. Unread counts grow by others' messages in conversations that are not
    /// open.
    pub(super) fn take(&mut self, message: &Received) -> bool {
        if let Some(name) = &message.sender_name {
            self.names.insert(message.sender, name.clone());
        }
        for (user, name) in message.roster() {
            self.names.insert(user, name);
        }
        let at = self.at(message.conversation);
        let open = self.open == Some(at);
        let Some(room) = self.rooms.get_mut(at) else { return false };
        let new = room.add(message, &self.names);
        if new && !open && !message.own && !message.silent && message.kind == RecordKind::Message {
            room.unread = room.unread.saturating_add(1);
        }
        new
    }

    /// A user's name.
    pub(super) fn name(&mut self, user: UserId, name: &str) {
        self.names.insert(user, name.to_owned());
    }

    /// Whether the user's name is known.
    pub(super) fn knows(&self, user: UserId) -> bool {
        self.names.contains_key(&user)
    }

    /// A user's name, or its number.
    pub(super) fn name_of(&self, user: UserId) -> String {
        name_in(&self.names, user)
    }

    /// Somebody types at the time `now`.
    pub(super) fn typing(&mut self, conversation: ConversationId, user: UserId, now: Duration) {
        let at = self.at(conversation);
        if let Some(room) = self.rooms.get_mut(at) {
            room.typing.insert(user, now + TYPING);
        }
    }

    /// `bob is typing`, or nothing.
    pub(super) fn typing_line(&self, now: Duration) -> Option<String> {
        let typists = self.room()?.typists(now, &self.names);
        match typists.as_slice() {
            [] => None,
            [one] => Some(format!("{one} is typing")),
            [one, other] => Some(format!("{one} and {other} are typing")),
            [one, rest @ ..] => Some(format!("{one} and {} others are typing", rest.len())),
        }
    }

    /// How far an own message is.
    pub(super) fn status(&mut self, id: u64, status: SendStatus) {
        for room in &mut self.rooms {
            let Some(at) = room.pending.iter().position(|pending| pending.id == id) else { continue };
            // Its echo may have come first.
            let echoed = matches!(status, SendStatus::Acked(seq) if room.entries.contains_key(&seq));
            if echoed {
                room.pending.remove(at);
            } else if let Some(pending) = room.pending.get_mut(at) {
                pending.status = status;
            }
        }
    }

    /// A line of the program itself, where the user looks.
    pub(super) fn notice(&mut self, text: impl Into<String>) {
        match self.room_mut() {
            Some(room) => room.notice(text),
            None => {
                self.notices.push(text.into());
                if self.notices.len() > NOTICES_MAX {
                    self.notices.remove(0);
                }
            }
        }
    }

    /// Brings the newest conversations to the top; the open one stays open.
    pub(super) fn sort(&mut self) {
        let open =
            self.open.and_then(|open| self.rooms.get(open)).map(|room| (room.number, room.name.clone()));
        self.rooms.sort_by_key(|room| std::cmp::Reverse(room.time));
        self.open =
            open.and_then(|open| self.rooms.iter().position(|room| (room.number, room.name.clone()) == open));
    }

    /// Messages not seen, over all conversations.
    pub(super) fn unread(&self) -> u32 {
        self.rooms.iter().fold(0, |sum, room| sum.saturating_add(room.unread))
    }

    /// How the connection is, for people; `true` when it is good.
    pub(super) fn connection_line(&self) -> (bool, String) {
        match &self.connection {
            None | Some(ConnectionState::Connecting) => (false, "connecting".to_owned()),
            Some(ConnectionState::Syncing) => (false, "catching up".to_owned()),
            Some(ConnectionState::Live) => (true, "online".to_owned()),
            Some(ConnectionState::Suspect) => (false, "the network is slow".to_owned()),
            Some(ConnectionState::Draining) => (false, "the gateway is leaving, changing over".to_owned()),
            Some(ConnectionState::Offline { reason, retry_in }) => {
                let why = match reason {
                    OfflineReason::Starting => return (false, "connecting".to_owned()),
                    OfflineReason::Unreachable(_) => "can't reach the gateway".to_owned(),
                    OfflineReason::Lost(_) => "connection lost".to_owned(),
                    OfflineReason::Refused(code) => format!("refused: {code}"),
                    OfflineReason::NoToken(text) => format!("no token: {}", printable(text)),
                    OfflineReason::Suspended => "suspended".to_owned(),
                    _ => "offline".to_owned(),
                };
                match retry_in {
                    Some(wait) if wait.as_secs() > 0 => {
                        (false, format!("{why}, again in {} s", wait.as_secs()))
                    }
                    _ => (false, format!("{why}, trying again")),
                }
            }
            Some(ConnectionState::Closed { reason }) => (false, format!("closed: {reason:?}")),
            Some(_) => (false, "offline".to_owned()),
        }
    }
}

fn name_in(names: &HashMap<UserId, String>, user: UserId) -> String {
    names.get(&user).map_or_else(|| format!("user {}", user.get()), |name| printable(name))
}

/// Text without control characters; line breaks and tabs become blanks.
pub(super) fn printable(text: &str) -> String {
    let mark =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars()
        .filter(|c| !mark(*c))
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_client::UnixMillis;

    use super::*;

    fn conversation(number: u64) -> ConversationId {
        ConversationId::new(number).unwrap()
    }

    fn seq(number: u64) -> Seq {
        Seq::new(number).unwrap()
    }

    fn user(number: u64) -> UserId {
        UserId::new(number).unwrap()
    }

    fn message(room: u64, position: u64, sender: u64, text: &str) -> Received {
        Received {
            conversation: conversation(room),
            seq: seq(position),
            sender: user(sender),
            sender_name: Some(format!("user-{sender}")),
            time: UnixMillis::new(position * 1_000).unwrap(),
            kind: RecordKind::Message,
            reference: None,
            payload: Bytes::copy_from_slice(text.as_bytes()),
            own: sender == 1,
            this_device: sender == 1,
            silent: false,
            truncated: false,
            arrival: position,
        }
    }

    #[test]
    fn a_message_stands_once_at_its_position() {
        let mut model = Model::new("user-1");
        assert!(model.take(&message(7, 2, 2, "second")));
        assert!(model.take(&message(7, 1, 2, "first")));
        assert!(!model.take(&message(7, 2, 2, "second")), "history and stream may bring the same");
        let texts: Vec<_> = model.rooms[0].entries.values().map(|entry| entry.text.as_str()).collect();
        assert_eq!(texts, ["first", "second"]);
        assert_eq!(model.rooms[0].unread, 2);
        model.open = Some(0);
        model.take(&message(7, 3, 2, "third"));
        model.take(&message(7, 4, 1, "own"));
        assert_eq!((model.rooms[0].unread, model.unread()), (2, 2));
        assert_eq!(model.name_of(user(2)), "user-2");
    }

    #[test]
    fn what_is_under_way_becomes_its_echo_whatever_comes_first() {
        for ack_first in [true, false] {
            let mut model = Model::new("user-1");
            let at = model.at(conversation(7));
            for id in [1, 2] {
                let pending = Pending { id, text: "same".to_owned(), status: SendStatus::Queued };
                model.rooms[at].pending.push(pending);
            }
            if ack_first {
                model.status(1, SendStatus::Acked(seq(1)));
                assert_eq!(model.rooms[at].pending.len(), 2, "still without its echo");
            }
            model.take(&message(7, 1, 1, "same"));
            if !ack_first {
                model.status(1, SendStatus::Acked(seq(1)));
            }
            let left: Vec<_> = model.rooms[at].pending.iter().map(|pending| pending.id).collect();
            assert_eq!(left, [2], "ack first: {ack_first}");
            assert_eq!(model.rooms[at].entries.len(), 1);
        }
    }

    #[test]
    fn marks_follow_receipts_and_never_go_back() {
        let mut room = Room::named("bob", ConversationClass::Direct);
        assert_eq!(room.mark(seq(5)), Mark::Acked);
        room.receipt(user(2), seq(5), seq(3));
        assert_eq!(
            (room.mark(seq(3)), room.mark(seq(5)), room.mark(seq(6))),
            (Mark::Read, Mark::Delivered, Mark::Acked)
        );
        room.receipt(user(2), seq(1), seq(1));
        assert_eq!((room.mark(seq(3)), room.mark(seq(5))), (Mark::Read, Mark::Delivered));
    }

    #[test]
    fn a_name_that_turns_out_to_be_a_known_number_is_one_conversation() {
        let mut model = Model::new("user-1");
        let other = model.named("carol", ConversationClass::Direct);
        let bob = model.named("bob", ConversationClass::Direct);
        model.open = Some(bob);
        model.rooms[bob].pending.push(Pending { id: 9, text: "hi".to_owned(), status: SendStatus::Queued });
        model.take(&message(7, 1, 2, "hello"));
        assert_eq!(model.rooms.len(), 3);
        model.resolved("bob", ConversationClass::Direct, conversation(7));
        assert_eq!(model.rooms.len(), 2);
        let room = model.room().unwrap();
        assert_eq!(
            (room.name.as_str(), room.number, room.pending.len(), room.entries.len()),
            ("bob", Some(conversation(7)), 1, 1)
        );
        model.resolved("carol", ConversationClass::Direct, conversation(8));
        assert_eq!(model.rooms[other].number, Some(conversation(8)));
        assert_eq!(model.room().unwrap().name, "bob", "the open one stays open");
        model.sort();
        assert_eq!(model.room().unwrap().name, "bob");
    }

    #[test]
    fn typing_ends_by_itself_and_with_the_message() {
        let mut model = Model::new("user-1");
        model.open = Some(model.at(conversation(7)));
        model.name(user(2), "bob");
        let now = Duration::from_secs(10);
        model.typing(conversation(7), user(2), now);
        assert_eq!(model.typing_line(now).as_deref(), Some("bob is typing"));
        assert_eq!(model.typing_line(now + TYPING), None);
        model.typing(conversation(7), user(2), now);
        model.take(&message(7, 1, 2, "done"));
        assert_eq!(model.typing_line(now), None);
    }

    #[test]
    fn edits_recalls_and_reactions_change_what_they_refer_to() {
        let mut model = Model::new("user-1");
        model.take(&message(7, 1, 2, "helo"));
        let refer = |position, sender, kind, text| Received {
            kind,
            reference: Some(seq(1)),
            ..message(7, position, sender, text)
        };
        model.take(&refer(2, 3, RecordKind::Edit, "not mine"));
        assert_eq!(model.rooms[0].entries[&seq(1)].text, "helo");
        model.take(&refer(3, 2, RecordKind::Edit, "hello"));
        model.take(&refer(4, 3, RecordKind::Reaction, "+"));
        let entry = &model.rooms[0].entries[&seq(1)];
        assert_eq!((entry.text.as_str(), entry.edited, entry.reactions.len()), ("hello", true, 1));
        model.take(&refer(5, 2, RecordKind::Recall, ""));
        assert_eq!(model.rooms[0].entries[&seq(1)].text, "(taken back)");
        assert_eq!(model.rooms[0].entries.len(), 1);
    }

    #[test]
    fn text_of_others_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc\td\u{202e}e\u{7}"), "a [31mb c de");
    }
}
