//! The work: who is in which conversation, who sends, how much. Pure: the same flags and seed give the same plan.
//!
//! - Phones are numbered from 0; a phone's user is `load-N`. Members beyond them (`absent-N`) never connect.
//! - Phone `n` belongs to thread `n % threads`.
//! - Slow phones never send, and nobody waits for them as recipients.
//!
//! Not here: when a message is due (`schedule`).

use std::path::Path;

use anyhow::{Context as _, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use fulmar_benches::payload::Payloads;

/// Bytes every message begins with: the run, its number, when it was due, and who sent it.
pub(crate) const STAMP_BYTES: usize = 28;

/// The longest payload of a SEND.
pub(crate) const PAYLOAD_BYTES_MAX: usize = fulmar_protocol::limit::SEND_PAYLOAD_BYTES_MAX;

/// Who talks with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Phones that are online.
    pub(crate) phones: u32,
    /// Groups; 0: phones talk in pairs.
    pub(crate) groups: u32,
    /// Without groups: so many pairs talk, and the other phones are silent; `None`: all talk.
    pub(crate) pairs: Option<u32>,
    /// Members of a group that are online.
    pub(crate) group_size: u32,
    /// Members of a group besides, who never are.
    pub(crate) absent: u32,
    /// Senders in each group; the first of its members.
    pub(crate) senders: u32,
    /// Of a hundred phones, how many read slowly.
    pub(crate) slow_percent: u32,
    /// Of a hundred phones, how many have their conversations open.
    pub(crate) open_percent: u32,
    /// Apps, to which phones belong in equal parts, in the order of their numbers.
    pub(crate) apps: u32,
}

/// A conversation of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Talk {
    /// Its members among the phones; the first one makes it.
    pub(crate) members: Vec<u32>,
    /// Who sends, of the members.
    pub(crate) senders: Vec<u32>,
    /// Members that are to be reached by a message, the sender being one of them or not.
    pub(crate) readers: u32,
    /// Members that are never online.
    pub(crate) absent: u32,
    /// It is the broadcast that all phones of the first app read.
    pub(crate) broadcast: bool,
}

/// What the broadcast is called.
pub(crate) const BROADCAST: &str = "load";

impl Talk {
    /// Members besides the one who makes it.
    pub(crate) fn others(&self) -> u64 {
        (self.members.len() as u64).saturating_sub(1) + u64::from(self.absent)
    }

    /// Members that read slowly.
    pub(crate) fn slow_readers(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX).saturating_sub(self.readers)
    }

    /// How many phones a message of `sender` should reach.
    pub(crate) fn recipients(&self, sender: u32, shape: &Shape) -> u32 {
        let itself = self.members.contains(&sender) && !shape.is_slow(sender);
        self.readers.saturating_sub(u32::from(itself))
    }
}

impl Shape {
    /// Whether a phone reads slowly. They are spread over all groups: the last of each hundred in the order of numbers.
    pub(crate) const fn is_slow(&self, phone: u32) -> bool {
        // 37 and 100 have no common divisor: each hundred phones in a row have as many.
        (phone.wrapping_mul(37)) % 100 >= 100 - self.slow_percent
    }

    /// Whether a phone has its conversations open; spread like slow ones, by another factor.
    pub(crate) const fn is_looking(&self, phone: u32) -> bool {
        (phone.wrapping_mul(43)) % 100 < self.open_percent
    }

    /// Which app a phone belongs to.
    pub(crate) fn app(&self, phone: u32) -> usize {
        let app = u64::from(phone) * u64::from(self.apps) / u64::from(self.phones.max(1));
        usize::try_from(app).unwrap_or(0)
    }

    /// All conversations.
    ///
    /// # Errors
    /// What was asked for does not fit together.
    pub(crate) fn talks(&self) -> anyhow::Result<Vec<Talk>> {
        ensure!(self.phones > 0, "there must be a phone");
        ensure!(self.slow_percent < 100, "somebody must read");
        if self.groups == 0 {
            let pairs = self.pairs.unwrap_or(u32::MAX).min(self.phones / 2);
            return Ok((0..pairs)
                .map(|pair| {
                    let members = vec![2 * pair, 2 * pair + 1];
                    self.talk(members.clone(), members)
                })
                .filter(|talk| !talk.senders.is_empty() && self.is_of_one_app(talk))
                .collect());
        }
        ensure!(
            self.group_size >= 1 && self.group_size <= self.phones,
            "a group of {} online members needs as many phones (--phones {})",
            self.group_size,
            self.phones
        );
        ensure!(self.senders >= 1, "somebody must send (--senders)");
        let mut talks = Vec::new();
        for group in 0..u64::from(self.groups) {
            let first = group * u64::from(self.group_size) % u64::from(self.phones);
            let members: Vec<u32> = (0..u64::from(self.group_size))
                .filter_map(|n| u32::try_from((first + n) % u64::from(self.phones)).ok())
                .collect();
            let quick = members.iter().copied().filter(|phone| !self.is_slow(*phone));
            let senders = quick.take(self.senders as usize).collect();
            talks.push(self.talk(members, senders));
        }
        ensure!(
            talks.iter().all(|talk| self.is_of_one_app(talk)),
            "a group would have members of two apps: --phones must be a multiple of --group-size times the apps"
        );
        ensure!(talks.iter().all(|talk| !talk.senders.is_empty()), "a group has slow readers only");
        Ok(talks)
    }

    /// What all phones of the first app read and its first one writes, at a rate of its own: nobody is among its senders.
    pub(crate) fn broadcast(&self) -> Talk {
        let members = (0..self.phones).filter(|phone| self.app(*phone) == 0).collect();
        Talk { broadcast: true, absent: 0, ..self.talk(members, Vec::new()) }
    }

    fn is_of_one_app(&self, talk: &Talk) -> bool {
        let mut apps = talk.members.iter().map(|phone| self.app(*phone));
        let first = apps.next();
        apps.all(|app| Some(app) == first)
    }

    fn talk(&self, members: Vec<u32>, mut senders: Vec<u32>) -> Talk {
        senders.retain(|phone| !self.is_slow(*phone));
        let readers = members.iter().filter(|phone| !self.is_slow(**phone)).count();
        let readers = u32::try_from(readers).unwrap_or(u32::MAX);
        Talk { readers, members, senders, absent: self.absent, broadcast: false }
    }
}

/// The name of an app.
pub(crate) fn app_name(app: usize) -> String {
    match app {
        0 => fulmar_gateway::config::DEMO_APP.to_owned(),
        other => format!("load-app-{other}"),
    }
}

/// The name of a phone's user.
pub(crate) fn user(phone: u32) -> String {
    format!("load-{phone}")
}

/// The name of a member that is never online.
pub(crate) fn absent_user(number: u32) -> String {
    format!("absent-{number}")
}

/// How long bodies are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Lengths {
    /// All the same.
    Same(usize),
    /// As people write.
    Chat,
    /// One after the other, and again from the first.
    Listed(Vec<usize>),
}

impl Lengths {
    /// `chat`, a number of bytes, or a file with a number on each line.
    ///
    /// # Errors
    /// It is none of these, or a number is out of range.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let fits = |bytes: usize| {
            let range = STAMP_BYTES..=PAYLOAD_BYTES_MAX;
            ensure!(
                range.contains(&bytes),
                "a payload has {STAMP_BYTES} to {PAYLOAD_BYTES_MAX} bytes, not {bytes}"
            );
            Ok(bytes)
        };
        if text == "chat" {
            return Ok(Self::Chat);
        }
        if let Ok(bytes) = text.parse() {
            return Ok(Self::Same(fits(bytes)?));
        }
        let listed = std::fs::read_to_string(Path::new(text)).with_context(|| {
            format!("{text:?} is neither `chat`, nor a number of bytes, nor a file that can be read")
        })?;
        let mut lengths = Vec::new();
        for (number, line) in (1..).zip(listed.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bytes = line.parse().with_context(|| format!("{text}:{number}: {line:?} is no number"))?;
            lengths.push(fits(bytes).with_context(|| format!("{text}:{number}"))?);
        }
        ensure!(!lengths.is_empty(), "{text} has no lengths");
        Ok(Self::Listed(lengths))
    }
}

/// Where bodies come from.
#[derive(Debug)]
pub(crate) struct Bodies {
    lengths: Lengths,
    source: Payloads,
    /// Text that bodies are cut from: making it anew for each would be the generator's work, not the gateway's.
    text: Bytes,
    next: usize,
}

/// What a message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Of which run it is.
    pub(crate) run: u64,
    /// Its number in the run.
    pub(crate) number: u64,
    /// When it was due: nanoseconds after the run's beginning.
    pub(crate) due: u64,
    /// The phone that sent it.
    pub(crate) sender: u32,
}

impl Stamp {
    /// Read off a payload; `None`: it is not of this program.
    pub(crate) fn of(payload: &[u8]) -> Option<Self> {
        let (run, rest) = payload.split_first_chunk::<8>()?;
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let (due, rest) = rest.split_first_chunk::<8>()?;
        let sender = rest.first_chunk::<4>()?;
        Some(Self {
            run: u64::from_be_bytes(*run),
            number: u64::from_be_bytes(*number),
            due: u64::from_be_bytes(*due),
            sender: u32::from_be_bytes(*sender),
        })
    }
}

impl Bodies {
    /// The same seed gives the same bodies.
    pub(crate) fn new(lengths: Lengths, seed: u64) -> Self {
        let mut source = Payloads::new(seed);
        let text = source.body(PAYLOAD_BYTES_MAX);
        Self { lengths, source, text, next: 0 }
    }

    /// The next message. One that people would write shorter is as long as its stamp.
    pub(crate) fn message(&mut self, stamp: Stamp) -> Bytes {
        let length = match &self.lengths {
            Lengths::Same(bytes) => *bytes,
            Lengths::Chat => self.source.length(),
            Lengths::Listed(all) => {
                let length = all.get(self.next % all.len().max(1)).copied();
                self.next = self.next.wrapping_add(1);
                length.unwrap_or(STAMP_BYTES)
            }
        };
        let length = length.clamp(STAMP_BYTES, PAYLOAD_BYTES_MAX);
        let mut body = BytesMut::with_capacity(length);
        body.put_u64(stamp.run);
        body.put_u64(stamp.number);
        body.put_u64(stamp.due);
        body.put_u32(stamp.sender);
        body.extend_from_slice(self.text.get(STAMP_BYTES..length).unwrap_or_default());
        body.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        phones: 10,
        groups: 3,
        pairs: None,
        group_size: 4,
        absent: 7,
        senders: 2,
        slow_percent: 0,
        open_percent: 0,
        apps: 1,
    };

    #[test]
    fn groups_go_round_the_phones() {
        let talks = SHAPE.talks().unwrap();
        let members: Vec<_> = talks.iter().map(|talk| talk.members.clone()).collect();
        assert_eq!(members, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9, 0, 1]]);
        assert_eq!(talks[2].senders, [8, 9]);
        assert_eq!((talks[0].recipients(0, &SHAPE), talks[0].recipients(9, &SHAPE)), (3, 4));
    }

    #[test]
    fn pairs_send_to_each_other() {
        let few = Shape { groups: 0, phones: 50, pairs: Some(3), ..SHAPE }.talks().unwrap();
        assert_eq!(few.iter().map(|talk| talk.members.clone()).collect::<Vec<_>>(), [[0, 1], [2, 3], [4, 5]]);
        let talks = Shape { groups: 0, phones: 5, ..SHAPE }.talks().unwrap();
        assert_eq!(talks.len(), 2, "the fifth phone has nobody");
        assert_eq!((talks[1].members.clone(), talks[1].senders.clone()), (vec![2, 3], vec![2, 3]));
    }

    #[test]
    fn apps_have_phones_of_their_own() {
        let shape = Shape { phones: 8, groups: 4, group_size: 2, apps: 2, ..SHAPE };
        assert_eq!((0..8).map(|phone| shape.app(phone)).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(shape.talks().unwrap().len(), 4);
        assert!(Shape { group_size: 3, ..shape }.talks().is_err(), "3, 4 and 5 are of two apps");
    }

    #[test]
    fn slow_readers_are_as_many_as_asked_for_and_neither_send_nor_count() {
        let shape = Shape { phones: 1_000, groups: 1, group_size: 1_000, slow_percent: 30, ..SHAPE };
        assert_eq!((0..1_000).filter(|phone| shape.is_slow(*phone)).count(), 300);
        assert_eq!((0..100).filter(|phone| shape.is_slow(*phone)).count(), 30, "in every hundred");
        let talks = shape.talks().unwrap();
        assert_eq!(talks[0].readers, 700);
        assert!(talks[0].senders.iter().all(|phone| !shape.is_slow(*phone)));
        assert_eq!(talks[0].recipients(talks[0].senders[0], &shape), 699);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for shape in [
            Shape { phones: 0, ..SHAPE },
            Shape { group_size: 11, ..SHAPE },
            Shape { group_size: 0, ..SHAPE },
            Shape { senders: 0, ..SHAPE },
            Shape { slow_percent: 100, ..SHAPE },
        ] {
            assert!(shape.talks().is_err(), "{shape:?}");
        }
    }

    #[test]
    fn a_stamp_comes_back_from_the_message() {
        let stamp = Stamp { run: 7, number: u64::MAX, due: 12_345_678_901, sender: 99 };
        for (lengths, want) in [(Lengths::Same(200), 200), (Lengths::Listed(vec![28, 64]), 28)] {
            let message = Bodies::new(lengths, 1).message(stamp);
            assert_eq!((Stamp::of(&message), message.len()), (Some(stamp), want));
        }
        assert_eq!(Stamp::of(&[0; STAMP_BYTES - 1]), None);
    }

    #[test]
    fn lengths_are_read_from_a_file_and_mistakes_are_named_with_their_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lengths");
        std::fs::write(&path, "# as measured\n100\n\n200\n").unwrap();
        let text = path.to_str().unwrap();
        assert_eq!(Lengths::parse(text).unwrap(), Lengths::Listed(vec![100, 200]));
        assert_eq!(Lengths::parse("chat").unwrap(), Lengths::Chat);
        std::fs::write(&path, "100\n27\n").unwrap();
        assert!(format!("{:#}", Lengths::parse(text).unwrap_err()).contains(":2"));
        for wrong in ["12", "20000", "no-such-file"] {
            assert!(Lengths::parse(wrong).is_err(), "{wrong}");
        }
    }
}
