//! A race as it is run: names are looked up, attempts made as [`Race`] says, and the first flight written on each of them, in early
//! data where that is possible. The first attempt on which the gateway answers it is the winner.
//!
//! - The first flight may be replayed, so it may leave on several attempts; the gateway takes it once.
//! - The gateway counts a session for others, and ends older ones of the device, when the client goes on with it. So what is said
//!   on an attempt takes nothing from anybody, and whoever loses is closed without ever having been there for others.
//! - Without a first flight (the token is not there yet) attempts wait when they are connected.
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
use fulmar_transport::Connection;

use crate::{
    event::{Attempt, AttemptOutcome},
    options::BoxFuture,
    race::{AttemptId, Memory, Race, Step, Transport, Verdict, Win},
    transport::{
        Dialer,
        dial::Progress,
        link::{Link, LinkEvent},
    },
};

/// What became of a race.
#[derive(Debug)]
pub(super) enum RaceEvent {
    /// Somebody answered.
    Won(Box<Won>),
    /// Nobody did; the text is for people.
    Nobody(String),
    /// The race goes on, and [`Racing::poll_timeout`] says another time than before.
    Rescheduled,
    /// The race is over after it was won; what it showed of UDP.
    Over(Option<Verdict>),
}

/// The winner; the first flight has left on it.
#[derive(Debug)]
pub(super) struct Won {
    pub(super) link: Link,
    /// Its answer.
    pub(super) first: LinkEvent,
    pub(super) win: Win,
    /// From its first packet to the gateway's.
    pub(super) took: Duration,
}

struct Runner {
    id: AttemptId,
    transport: Transport,
    address: SocketAddr,
    began: Duration,
    /// From its first packet to the end of its handshake.
    connected: Option<Duration>,
    /// What it waits for before or beside its link; `None`: its handshake is complete.
    step: Option<BoxFuture<Progress>>,
    link: Option<Link>,
    /// Frames of the first flight written on the link.
    written: usize,
}

/// What a look at a runner showed.
enum Look {
    /// Nothing new, or nothing that concerns others.
    Nothing,
    Answered(LinkEvent),
    Failed {
        text: String,
        answered: bool,
    },
    /// It is connected, after the race was won.
    TooLate,
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
    won: bool,
    last_error: String,
    attempts: Vec<Attempt>,
    /// Connections of attempts that ended, to be counted.
    ended: Vec<Connection>,
}

impl Racing {
    /// A race that begins now, by every way there is.
    pub(super) fn new(dialer: &Arc<Dialer>, memory: Memory) -> Self {
        Self::by(dialer.offered(), dialer, memory)
    }

    /// The same by QUIC alone: for a connection by another way that is fine, but could be better.
    pub(super) fn by_quic(dialer: &Arc<Dialer>, memory: Memory) -> Self {
        Self::by(&[Transport::Quic], dialer, memory)
    }

    fn by(offered: &'static [Transport], dialer: &Arc<Dialer>, memory: Memory) -> Self {
        let looking = Arc::clone(dialer);
        Self {
            dialer: Arc::clone(dialer),
            offered,
            memory,
            resolving: Some(Box::pin(async move { looking.resolve().await })),
            race: None,
            addresses: Vec::new(),
            runners: Vec::new(),
            won: false,
            last_error: "no address".to_owned(),
            attempts: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// When [`Self::poll`] has to be called if nothing happens.
    pub(super) fn poll_timeout(&self) -> Option<Duration> {
        self.race.as_ref().and_then(Race::poll_timeout)
    }

    /// Attempts that ended since the last call.
    pub(super) fn take_attempts(&mut self) -> Vec<Attempt> {
        std::mem::take(&mut self.attempts)
    }

    /// Connections of attempts that ended since the last call.
    pub(super) fn take_ended(&mut self) -> Vec<Connection> {
        std::mem::take(&mut self.ended)
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
            self.take_steps(flight.is_some(), now);
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

    fn take_steps(&mut self, early: bool, now: Duration) {
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
                        let step = self.dialer.dial(transport, address, self.memory.rtt, early);
                        self.runners.push(Runner {
                            id,
                            transport,
                            address,
                            began: now,
                            connected: None,
                            step: Some(step),
                            link: None,
                            written: 0,
                        });
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
                            self.ended.extend(runner.close());
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
        let Some(race) = &mut self.race else { return Poll::Pending };
        let mut index = 0;
        while let Some(runner) = self.runners.get_mut(index) {
            let look = runner.look(race, flight, now, cx);
            if matches!(look, Look::Nothing) {
                index += 1;
                continue;
            }
            let runner = self.runners.swap_remove(index);
            return Poll::Ready(self.ended(runner, look, now));
        }
        Poll::Pending
    }

    fn ended(&mut self, mut runner: Runner, look: Look, now: Duration) -> Option<RaceEvent> {
        let race = self.race.as_mut()?;
        match look {
            Look::Nothing => {}
            Look::Answered(first) => {
                let won = race.won(runner.id, now);
                if let (Some(win), Some(link)) = (won, runner.link.take()) {
                    self.won = true;
                    note(&mut self.attempts, &runner, AttemptOutcome::Won, now);
                    let took = runner.connected.unwrap_or_else(|| now.saturating_sub(runner.began));
                    return Some(RaceEvent::Won(Box::new(Won { link, first, win, took })));
                }
                note(&mut self.attempts, &runner, AttemptOutcome::Overtaken, now);
                self.ended.extend(runner.close());
            }
            Look::TooLate => {
                note(&mut self.attempts, &runner, AttemptOutcome::Overtaken, now);
                self.ended.extend(runner.close());
            }
            Look::Failed { text, answered } => {
                self.last_error = format!("{}: {text}", runner.address);
                race.failed(runner.id, answered, now);
                note(&mut self.attempts, &runner, AttemptOutcome::Failed(text), now);
                self.ended.extend(runner.close());
            }
        }
        None
    }
}

impl Runner {
    fn look(
        &mut self,
        race: &mut Race,
        flight: Option<&[(Channel, Frame)]>,
        now: Duration,
        cx: &mut Context<'_>,
    ) -> Look {
        while let Some(step) = &mut self.step {
            let Poll::Ready(progress) = step.as_mut().poll(cx) else { break };
            self.step = None;
            match progress {
                Progress::Early(link, next) => {
                    self.link = Some(*link);
                    self.step = Some(next);
                    self.speak(race, flight, now);
                    continue;
                }
                Progress::Confirmed => {}
                Progress::Up(link) => (self.link, self.written) = (Some(*link), 0),
                Progress::Failed { text, answered } => return Look::Failed { text, answered },
            }
            if self.link.is_none() {
                return Look::Failed { text: "the connection was lost at once".to_owned(), answered: true };
            }
            self.connected = Some(now.saturating_sub(self.began));
            if !race.connected(self.id, now) {
                return Look::TooLate;
            }
        }
        self.speak(race, flight, now);
        // Records may be there before the WELCOME: they are read when it is.
        let Some(Poll::Ready(event)) = self.link.as_mut().map(|link| link.poll(false, cx)) else {
            return Look::Nothing;
        };
        match event {
            // Nobody but the gateway can have said this.
            LinkEvent::Frames(_) => Look::Answered(event),
            LinkEvent::Lost(..) | LinkEvent::Violation(_) if self.step.is_some() => {
                // Refused early data shows like this as well; the step will tell.
                self.link = None;
                Look::Nothing
            }
            LinkEvent::Lost(Some(code), _) if is_answer(code) => Look::Answered(event),
            LinkEvent::Lost(_, text) => Look::Failed { text, answered: true },
            LinkEvent::Violation(violation) => {
                if let Some(link) = &self.link {
                    link.close(violation.close_code());
                }
                Look::Failed { text: violation.to_string(), answered: true }
            }
        }
    }

    /// Writes what was not written yet of the first flight.
    fn speak(&mut self, race: &mut Race, flight: Option<&[(Channel, Frame)]>, now: Duration) {
        let (Some(link), Some(flight)) = (&mut self.link, flight) else { return };
        for (channel, frame) in flight.iter().skip(self.written) {
            link.write(*channel, frame);
        }
        if self.written == 0 && !flight.is_empty() {
            race.asked(self.id, now);
        }
        self.written = flight.len();
    }

    /// Closes it; what there was of a connection.
    fn close(&self) -> Option<Connection> {
        let link = self.link.as_ref()?;
        link.close(CloseCode::Done);
        Some(link.connection().clone())
    }
}

/// Whether a connection that was closed before the WELCOME has told what it had to: another attempt would be told the same.
const fn is_answer(code: CloseCode) -> bool {
    matches!(
        code,
        CloseCode::Kicked | CloseCode::AuthFailed | CloseCode::AuthExpired | CloseCode::VersionUnsupported
    )
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
