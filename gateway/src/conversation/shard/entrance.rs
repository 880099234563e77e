//! From the queue into the batch: at once while there is room; else what comes waits here, or is turned away.
//!
//! - Sends wait by app ([`crate::conversation::intake`]), all other commands in the order in which they came; both have their turn.
//! - Whoever is turned away is told so before anything is decided, with a time to come again. Its number is not used up.
//! - Sends of a lane keep their order. Between them and other commands there is none: they come on different streams.

use std::sync::{Arc, atomic::Ordering};

use fulmar_protocol::{
    close::RefusalCode,
    frame,
    id::{AppId, Producer},
};

use super::Shard;
use crate::{
    conversation::{
        command::{Command, Refusal},
        commit::send_refused,
        intake::TurnedAway,
    },
    fanout::owed::{Owed, Settled},
};

/// Commands besides sends that may wait. Full: nothing more is taken in, but for those that nobody waits for and that were left
/// before one that is ([`crate::conversation::unhurried`]).
const OTHERS_MAX: usize = 4_096;

/// A send that waits.
#[derive(Debug)]
pub(super) struct Arrived {
    session: Arc<Owed>,
    app: AppId,
    producer: Producer,
    send: frame::Send,
}

impl Shard {
    /// Whether another command can be taken in, whatever it is.
    pub(super) fn has_room(&self) -> bool {
        // A flush answers for all that came before it.
        self.others.len() < OTHERS_MAX && !matches!(self.others.front(), Some(Command::Flush(_)))
    }

    /// Whether anything waits for the batch to have room.
    pub(super) fn somebody_waits(&self) -> bool {
        !self.intake.is_empty() || !self.others.is_empty()
    }

    /// A command has come, and before it what nobody waits for.
    pub(super) fn take_in(&mut self, command: Command) {
        self.take_in_unhurried();
        self.enter(command);
    }

    /// Takes in what was left here without waking the shard.
    pub(super) fn take_in_unhurried(&mut self) {
        for command in self.unhurried.take() {
            self.enter(command);
        }
    }

    fn enter(&mut self, command: Command) {
        let room = self.batch.has_room() && self.others.is_empty();
        match command {
            Command::Send { session, app, producer, send } if !room || !self.intake.is_calm() => {
                self.queue(Arrived { session, app, producer, send });
                if room {
                    // It came by here only because lanes are held.
                    self.let_in();
                }
            }
            command if room && self.intake.is_empty() => {
                if matches!(command, Command::Send { .. }) {
                    self.intake.passed();
                }
                self.handle(command);
            }
            command => self.others.push_back(command),
        }
    }

    fn queue(&mut self, arrived: Arrived) {
        let lane = (arrived.send.conversation, arrived.producer);
        let (app, pseq, bytes) = (arrived.app, arrived.send.pseq, arrived.send.payload.len());
        let clock = self.clock();
        let Some(TurnedAway { item, why, wait }) = self.intake.offer(app, lane, pseq, bytes, arrived, clock)
        else {
            return;
        };
        self.metrics.send_turned_away(why.word());
        self.metrics.send_refused(RefusalCode::Busy.name());
        let retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let refusal = Refusal { code: RefusalCode::Busy, retry_after_ms };
        let Arrived { session, send, .. } = item;
        session.settle(Settled::Refused(send_refused(send.conversation, send.pseq, refusal, send.pseq)));
    }

    /// Has those decided who wait, one send and one of the others in turns, as far as the batch has room.
    pub(super) fn let_in(&mut self) {
        while self.somebody_waits() && self.batch.has_room() {
            if let Some(Arrived { session, app, producer, send }) = self.intake.take() {
                self.send(session, app, producer, &send);
            }
            let after_sends = matches!(self.others.front(), Some(Command::Flush(_)));
            if self.batch.has_room()
                && (!after_sends || self.intake.is_empty())
                && let Some(command) = self.others.pop_front()
            {
                self.handle(command);
            }
        }
        self.waiting.store(self.intake.len() + self.others.len(), Ordering::Relaxed);
    }
}
