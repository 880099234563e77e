//! A race as it is run: names are looked up, attempts made as [`Race`] says, and the first flight is on each that may carry
//! early data, so that the answer to it comes with the handshake's.
//!
//! - The first flight may be replayed, so it may leave on several attempts; the gateway takes it once.
//! - Whoever loses is closed before its handshake is complete, as a rule, and then was never there for anybody.
//!
//! Not here: what to try when (`race`), what a won race is good for (`driver`), sockets (`transport`).

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use fulmar_protocol::{
    close::CloseCode,
    frame::{Channel, Frame},
};

use crate::{
    event::{Attempt, AttemptOutcome},
    options::BoxFuture,
    race::{Arrival, AttemptId, Memory, Race, Step, Transport, Verdict, Win},
    transport::{
        Dialer,
        dial::Progress,
        link::{Link, LinkEvent},
    },
};

/// What became of a race.
#[derive(Debug)]
pub(super) enum RaceEvent {
    /// Somebody was reached.
    Won(Box<Won>),
    /// Nobody was; the text is for people.
    Nobody(String),
    /// The race goes on, and [`Racing::poll_timeout`] says another time than before.
    Rescheduled,
    /// The race is over after it was won; what it showed of UDP.
    Over(Option<Verdict>),
}

/// The winner.
#[derive(Debug)]
pub(super) struct Won {
    pub(super) link: Link,
    /// The first flight has left on it.
    pub(super) spoken: bool,
    /// What came on it already.
    pub(super) frames: Vec<(Channel, Frame)>,
    pub(super) win: Win,
    /// From its first packet to its answer.
    pub(super) took: Duration,
}

struct Runner {
    id: AttemptId,
    transport: Transport,
    address: SocketAddr,
    began: Duration,
    step: BoxFuture<Progress>,
    /// Open for early data; the first flight is written on it.
    early: Option<Link>,
}

/// See the module's text.
pub(super) struct Racing {
    dialer: Arc<Dialer>,
    offered: &'static [Transport],
    memory: Memory,
    resolving: Option<BoxFuture<Result<Vec<SocketAddr>, String>>>,
    race: Option<Race>,
    addresses: Vec<SocketAddr>,
    runners: Vec<Runner>,
    /// Early data may be sent.
    early: bool,
    won: bool,
    last_error: String,
    attempts: Vec<Attempt>,
}

impl Racing {
    /// A race that begins now, by every way there is.
    pub(super) fn new(dialer: &Arc<Dialer>, memory: Memory, early: bool) -> Self {
        Self::by(dialer.offered(), dialer, memory, early)
    }

    /// The same by QUIC alone: for a connection by another way that is fine, but could be better.
    pub(super) fn by_quic(dialer: &Arc<Dialer>, memory: Memory) -> Self {
        Self::by(&[Transport::Quic], dialer, memory, false)
    }

    fn by(offered: &'static [Transport], dialer: &Arc<Dialer>, memory: Memory, early: bool) -> Self {
        let looking = Arc::clone(dialer);
        Self {
            dialer: Arc::clone(dialer),
            offered,
            memory,
            resolving: Some(Box::pin(async move { looking.resolve().await })),
            race: None,
            addresses: Vec::new(),
            runners: Vec::new(),
            early,
            won: false,
            last_error: "no address".to_owned(),
            attempts: Vec::new(),
        }
    }

    /// When [`Self::poll`] has to be called if nothing happens.
    pub(super) fn poll_timeout(&self) -> Option<Duration> {
        self.race.as_ref().and_then(Race::poll_timeout)
    }

    /// Writes one more frame of the first flight.
    pub(super) fn write(&mut self, channel: Channel, frame: &Frame) {
        for link in self.runners.iter_mut().filter_map(|runner| runner.early.as_mut()) {
            link.write(channel, frame);
        }
    }

    /// Attempts that ended since the last call.
    pub(super) fn take_attempts(&mut self) -> Vec<Attempt> {
        std::mem::take(&mut self.attempts)
    }

    /// Goes on. `flight` is what has been said of the first flight.
    pub(super) fn poll(
        &mut self,
        flight: Option<&[(Channel, Frame)]>,
        now: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<RaceEvent> {
        let before = self.poll_timeout();
        if let Some(resolving) = &mut self.resolving {
            let found = std::task::ready!(resolving.as_mut().poll(cx));
            self.resolving = None;
            match found {
                Ok(addresses) => {
                    self.race = Some(Race::new(addresses.len(), self.offered, &self.memory, now));
                    self.addresses = addresses;
                }
                Err(error) => return Poll::Ready(RaceEvent::Nobody(error)),
            }
        }
        loop {
            self.take_steps(now);
            match self.poll_runners(flight, now, cx) {
                Poll::Ready(Some(event)) => return Poll::Ready(event),
                // Something ended: what comes next is due at once.
                Poll::Ready(None) => {}
                Poll::Pending => break,
            }
        }
        let Some(race) = &self.race else { return Poll::Pending };
        match race.is_over() {
            true if self.won => Poll::Ready(RaceEvent::Over(race.verdict())),
            true => Poll::Ready(RaceEvent::Nobody(self.last_error.clone())),
            // Whoever waits does so until the time it was told before.
            false if self.poll_timeout() != before => Poll::Ready(RaceEvent::Rescheduled),
            false => Poll::Pending,
        }
    }

    fn take_steps(&mut self, now: Duration) {
        let Some(race) = &mut self.race else { return };
        loop {
            let steps = race.poll(now);
            if steps.is_empty() {
                return;
            }
            for step in steps {
                match step {
                    Step::Start { id, transport, address } => {
                        let Some(&address) = self.addresses.get(address) else { continue };
                        let step = self.dialer.dial(transport, address, self.memory.rtt, self.early);
                        self.runners.push(Runner { id, transport, address, began: now, step, early: None });
                    }
                    Step::Stop(id) => {
                        if let Some(at) = self.runners.iter().position(|runner| runner.id == id) {
                            let runner = self.runners.swap_remove(at);
                            if !self.won {
                                self.last_error = format!("{}: no answer", runner.address);
                            }
                            let outcome =
                                if self.won { AttemptOutcome::Overtaken } else { AttemptOutcome::NoAnswer };
                            note(&mut self.attempts, &runner, outcome, now);
                        }
                    }
                }
            }
        }
    }

    /// `Ready(None)`: an attempt ended without consequence for anybody else.
    fn poll_runners(
        &mut self,
        flight: Option<&[(Channel, Frame)]>,
        now: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<Option<RaceEvent>> {
        let mut index = 0;
        while let Some(runner) = self.runners.get_mut(index) {
            let mut frames = Vec::new();
            let mut progress = runner.step.as_mut().poll(cx);
            if let Poll::Ready(Progress::Early(mut link, next)) = progress {
                for (channel, frame) in flight.into_iter().flatten() {
                    link.write(*channel, frame);
                }
                runner.early = Some(*link);
                runner.step = next;
                progress = runner.step.as_mut().poll(cx);
            }
            if progress.is_pending()
                && let Some(link) = &mut runner.early
            {
                match link.poll(true, cx) {
                    Poll::Ready(LinkEvent::Frames(come)) => {
                        // Nobody but the gateway can have said this: it is there.
                        frames = come;
                        progress = Poll::Ready(Progress::Confirmed);
                    }
                    // Refused early data shows like this as well; the step will tell.
                    Poll::Ready(LinkEvent::Lost(..) | LinkEvent::Violation(_)) => runner.early = None,
                    Poll::Pending => {}
                }
            }
            let Poll::Ready(progress) = progress else {
                index += 1;
                continue;
            };
            let mut runner = self.runners.swap_remove(index);
            let link = match progress {
                Progress::Up(link) => Ok((*link, false)),
                Progress::Confirmed => match runner.early.take() {
                    Some(link) => Ok((link, true)),
                    None => Err(("the connection was lost at once".to_owned(), true)),
                },
                Progress::Early(..) => Err(("early data twice".to_owned(), false)),
                Progress::Failed { text, answered } => Err((text, answered)),
            };
            return Poll::Ready(self.ended(runner, link, frames, now));
        }
        Poll::Pending
    }

    fn ended(
        &mut self,
        runner: Runner,
        link: Result<(Link, bool), (String, bool)>,
        frames: Vec<(Channel, Frame)>,
        now: Duration,
    ) -> Option<RaceEvent> {
        let race = self.race.as_mut()?;
        match link {
            Ok((link, spoken)) => match race.won(runner.id, now) {
                Arrival::First(win) => {
                    self.won = true;
                    note(&mut self.attempts, &runner, AttemptOutcome::Won, now);
                    let took = now.saturating_sub(runner.began);
                    Some(RaceEvent::Won(Box::new(Won { link, spoken, frames, win, took })))
                }
                Arrival::Probe | Arrival::Late => {
                    link.close(CloseCode::Done);
                    note(&mut self.attempts, &runner, AttemptOutcome::Overtaken, now);
                    None
                }
            },
            Err((text, answered)) => {
                self.last_error = format!("{}: {text}", runner.address);
                race.failed(runner.id, answered, now);
                note(&mut self.attempts, &runner, AttemptOutcome::Failed(text), now);
                None
            }
        }
    }
}

/// For the report of attempts.
fn note(attempts: &mut Vec<Attempt>, runner: &Runner, outcome: AttemptOutcome, now: Duration) {
    attempts.push(Attempt {
        transport: runner.transport.into(),
        address: runner.address,
        took: now.saturating_sub(runner.began),
        outcome,
        at: fulmar_protocol::id::UnixMillis::default(),
    });
}
