//! Who says what to whom: the input laid out over phones and conversations, before anything runs.
//!
//! - Every line of the input (up to the limit that was asked for) is said exactly once, by one phone, in one
//!   conversation; its number here is its place in the input.
//! - A *lane* is a pair of phones in a conversation that play dialogues one after the other. A speaker says a line
//!   only after the lines before it that the other one said have arrived, so a lane's order is known beforehand.
//! - Direct conversations have one lane, groups have several, and members who only listen.
//! - Equal input, phones and seed give an equal plan.
//!
//! Not here: clients, time.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use fulmar_badnet::Rng;
use fulmar_badnet::dialogue::{self, Dialogue, Speaker};

/// Members of a group, where there are that many phones.
const GROUP_MEMBERS: usize = 8;

/// One group per so many phones.
const PHONES_PER_GROUP: usize = 16;

/// Everything that will be said.
#[derive(Debug)]
pub(super) struct Plan {
    /// Names of the phones' users.
    pub(super) phones: Vec<String>,
    /// Where they talk.
    pub(super) rooms: Vec<Room>,
    /// What they say; a line's number is its index.
    pub(super) lines: Vec<PlannedLine>,
}

/// A conversation.
#[derive(Debug)]
pub(super) struct Room {
    /// Name of the group; `None` for a direct conversation.
    pub(super) group: Option<String>,
    /// Phones; the first makes a group.
    pub(super) members: Vec<usize>,
    /// Numbers of lines that are said one after the other.
    pub(super) lanes: Vec<Vec<usize>>,
}

/// One line.
#[derive(Debug)]
pub(super) struct PlannedLine {
    /// Where it is said.
    pub(super) room: usize,
    /// The phone that says it.
    pub(super) speaker: usize,
    /// The phone that answers.
    pub(super) partner: usize,
    /// What.
    pub(super) text: String,
}

impl PlannedLine {
    /// The bytes that are sent: the line's number, a tab (no text has one), the text.
    pub(super) fn payload(&self, number: usize) -> String {
        format!("{number}\t{}", self.text)
    }
}

/// The number and the text of a payload; `None` when it is none of ours.
pub(super) fn read_payload(payload: &[u8]) -> Option<(usize, &[u8])> {
    let tab = payload.iter().position(|byte| *byte == b'\t')?;
    let (number, text) = payload.split_at_checked(tab)?;
    let digits = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
    let number = if digits { std::str::from_utf8(number).ok()?.parse().ok()? } else { return None };
    Some((number, text.get(1..)?))
}

impl Plan {
    /// Lays out at most `lines_max` lines of `dialogues` over `phones` phones (at least two).
    pub(super) fn new(dialogues: Vec<Dialogue>, lines_max: usize, phones: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed).fork(1);
        let names = (1..=phones).map(|n| format!("phone-{n:03}")).collect();
        let mut rooms = lay_out_rooms(phones, &mut rng);
        // Whoever has said least gets the next dialogue.
        let mut idle = BinaryHeap::new();
        for (room, laid) in rooms.iter().enumerate() {
            idle.extend((0..laid.lanes.len()).map(|lane| Reverse((0usize, room, lane))));
        }
        let mut lines = Vec::new();
        for dialogue in dialogues {
            let left = lines_max.saturating_sub(lines.len());
            let Some(Reverse((said, room, lane))) = idle.pop() else { break };
            let Some(laid) = rooms.get_mut(room) else { break };
            let pair = (laid.members.get(2 * lane).copied(), laid.members.get(2 * lane + 1).copied());
            let ((Some(a), Some(b)), Some(numbers)) = (pair, laid.lanes.get_mut(lane)) else { break };
            let (a, b) = if rng.below(2) == 0 { (a, b) } else { (b, a) };
            let count = dialogue.lines.len().min(left);
            for line in dialogue.lines.into_iter().take(left) {
                let (speaker, partner) = match line.speaker {
                    Speaker::A => (a, b),
                    Speaker::B => (b, a),
                };
                numbers.push(lines.len());
                lines.push(PlannedLine { room, speaker, partner, text: line.text });
            }
            idle.push(Reverse((said + count, room, lane)));
            if lines.len() >= lines_max {
                break;
            }
        }
        for room in &mut rooms {
            room.lanes.retain(|lane| !lane.is_empty());
        }
        Self { phones: names, rooms, lines }
    }

    /// Lines that are drawn when there is no input: dialogues that have at least `lines` lines together.
    pub(super) fn drawn(seed: u64, lines: usize) -> Vec<Dialogue> {
        let mut count = lines.div_ceil(2).max(1);
        // Nearly all dialogues have two lines or more; the loop ends because each has one.
        loop {
            let drawn = dialogue::generate(seed, count);
            if drawn.iter().map(|dialogue| dialogue.lines.len()).sum::<usize>() >= lines || count >= lines {
                return drawn;
            }
            count = count.saturating_mul(2).min(lines);
        }
    }

    /// The phones whose apps must be handed a line: all members, the speaker's echo included.
    pub(super) fn listeners(&self, line: usize) -> impl Iterator<Item = usize> + '_ {
        let room = self.lines.get(line).and_then(|planned| self.rooms.get(planned.room));
        room.map(|room| room.members.as_slice()).unwrap_or_default().iter().copied()
    }

    /// The phones a line must be delivered to: all members but the speaker.
    pub(super) fn recipients(&self, line: usize) -> impl Iterator<Item = usize> + '_ {
        let speaker = self.lines.get(line).map(|planned| planned.speaker);
        self.listeners(line).filter(move |member| speaker != Some(*member))
    }

    /// Deliveries there must be in the end.
    pub(super) fn deliveries(&self) -> usize {
        (0..self.lines.len()).map(|line| self.recipients(line).count()).sum()
    }

    /// A line as a person finds it again: number, who, where.
    pub(super) fn describe(&self, line: usize) -> String {
        let Some(planned) = self.lines.get(line) else {
            return format!("line {line}, which is not in the input");
        };
        let (speaker, partner) = (self.phone(planned.speaker), self.phone(planned.partner));
        match self.rooms.get(planned.room).and_then(|room| room.group.as_deref()) {
            Some(group) => format!("line {} of {speaker} in {group}", line + 1),
            None => format!("line {} of {speaker} to {partner}", line + 1),
        }
    }

    /// The name of a phone.
    pub(super) fn phone(&self, phone: usize) -> &str {
        self.phones.get(phone).map_or("?", String::as_str)
    }
}

/// Each phone talks with two others (a ring in random order), and groups are drawn besides.
fn lay_out_rooms(phones: usize, rng: &mut Rng) -> Vec<Room> {
    let mut order: Vec<usize> = (0..phones).collect();
    rng.shuffle(&mut order);
    let mut pairs = BTreeSet::new();
    let mut rooms = Vec::new();
    let next = order.iter().skip(1).chain(order.first());
    for (one, other) in order.iter().zip(next) {
        if one != other && pairs.insert((one.min(other), one.max(other))) {
            rooms.push(Room { group: None, members: vec![*one, *other], lanes: vec![Vec::new()] });
        }
    }
    let groups = if phones < 3 { 0 } else { phones.div_ceil(PHONES_PER_GROUP) };
    for group in 0..groups {
        rng.shuffle(&mut order);
        let members: Vec<usize> = order.iter().copied().take(GROUP_MEMBERS).collect();
        // Half of the members talk, in pairs; at least one pair.
        let lanes = vec![Vec::new(); (members.len() / 4).max(1)];
        rooms.push(Room { group: Some(format!("group-{:02}", group + 1)), members, lanes });
    }
    rooms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_said_once_where_both_speakers_are() {
        for (phones, lines_max) in [(2, 10), (3, 50), (12, 200), (50, 1_000), (200, usize::MAX)] {
            let dialogues = dialogue::generate(5, 400);
            let texts: Vec<String> =
                dialogues.iter().flat_map(|d| d.lines.iter().map(|line| line.text.clone())).collect();
            let plan = Plan::new(dialogues, lines_max, phones, 7);
            assert_eq!(plan.phones.len(), phones);
            assert_eq!(plan.lines.len(), texts.len().min(lines_max));
            let mut said: Vec<usize> =
                plan.rooms.iter().flat_map(|room| room.lanes.iter().flatten().copied()).collect();
            said.sort_unstable();
            assert_eq!(said, (0..plan.lines.len()).collect::<Vec<_>>(), "each in one lane");
            for (number, (line, text)) in plan.lines.iter().zip(&texts).enumerate() {
                assert_eq!(line.text, *text);
                let members = &plan.rooms[line.room].members;
                assert!(members.contains(&line.speaker) && members.contains(&line.partner));
                assert_ne!(line.speaker, line.partner);
                assert_eq!(plan.recipients(number).count(), members.len() - 1);
                let payload = line.payload(number);
                assert_eq!(read_payload(payload.as_bytes()), Some((number, text.as_bytes())));
            }
            let rooms_of = |phone| plan.rooms.iter().filter(|room| room.members.contains(&phone)).count();
            assert!((0..phones).all(|phone| rooms_of(phone) > 0));
            assert_eq!(plan.rooms.iter().any(|room| room.group.is_some()), phones >= 3);
        }
    }

    #[test]
    fn lanes_keep_the_order_of_the_input_and_share_the_work() {
        let plan = Plan::new(Plan::drawn(1, 3_000), 3_000, 40, 1);
        assert_eq!(plan.lines.len(), 3_000);
        let lanes: Vec<_> = plan.rooms.iter().flat_map(|room| &room.lanes).collect();
        assert!(lanes.iter().all(|lane| lane.is_sorted()));
        let (least, most) = (lanes.iter().map(|l| l.len()).min(), lanes.iter().map(|l| l.len()).max());
        assert!(most.unwrap() - least.unwrap() <= 64, "{least:?} {most:?}");
        let again = Plan::new(Plan::drawn(1, 3_000), 3_000, 40, 1);
        assert_eq!(format!("{plan:?}"), format!("{again:?}"));
    }

    #[test]
    fn foreign_payloads_are_none_of_ours() {
        for payload in [
            &b""[..],
            b"hi",
            b"\thi",
            b"1",
            b"x1\thi",
            b"-1\thi",
            b"99999999999999999999999\thi",
            b"\xff\thi",
        ] {
            assert_eq!(read_payload(payload), None, "{payload:?}");
        }
        assert_eq!(read_payload(b"0\t"), Some((0, &b""[..])));
    }
}
