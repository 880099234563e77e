//! What the application asked the gateway and has no answer to yet, over connections.
//!
//! - Numbers are never used twice in the life of a half, so a late answer meets nobody.
//! - OPEN and PULL are asked again on the next connection. A CALL is not: it may have been carried out.
//! - What is in flight is bounded per kind, what waits is bounded in all.
//!
//! Not here: the half's own pulls (`reading`).

use std::collections::{BTreeMap, BTreeSet};

use core::time::Duration;

use crate::{
    frame::{Block, Call, Frame, Open, Pull},
    id::RequestId,
    limit::{PULLS_INFLIGHT_MAX, REQUESTS_MAX},
};

/// OPENs in flight.
const OPENS_INFLIGHT_MAX: usize = 16;

/// PULLs of the application in flight; the others are the half's own.
const APP_PULLS_INFLIGHT_MAX: usize = PULLS_INFLIGHT_MAX / 2;

/// One request.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Open(Open),
    Pull(Pull),
    Call(Call),
}

impl Ask {
    const fn kind(&self) -> usize {
        match self {
            Self::Open(_) => 0,
            Self::Pull(_) => 1,
            Self::Call(_) => 2,
        }
    }

    const fn id(&self) -> RequestId {
        match self {
            Self::Open(open) => open.id,
            Self::Pull(pull) => pull.id,
            Self::Call(call) => call.id,
        }
    }

    fn frame(&self) -> Frame {
        match self {
            Self::Open(open) => Frame::Open(open.clone()),
            Self::Pull(pull) => Frame::Pull(*pull),
            Self::Call(call) => Frame::Call(call.clone()),
        }
    }
}

#[derive(Debug)]
struct Request {
    ask: Ask,
    deadline: Option<Duration>,
    /// How many ACKs had left before it did.
    sent: Option<u64>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Requests {
    next: RequestId,
    all: BTreeMap<RequestId, Request>,
    waiting: BTreeSet<RequestId>,
    deadlines: BTreeSet<(Duration, RequestId)>,
    flying: [usize; 3],
    calls_max: usize,
}

impl Requests {
    pub(super) fn new() -> Self {
        Self {
            next: RequestId::FIRST,
            all: BTreeMap::new(),
            waiting: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            flying: [0; 3],
            calls_max: 0,
        }
    }

    /// A number nobody else has.
    pub(super) fn number(&mut self) -> RequestId {
        let id = self.next;
        self.next = id.next().unwrap_or(RequestId::FIRST);
        id
    }

    /// Takes a request. `false`: too many are unanswered.
    pub(super) fn insert(&mut self, ask: Ask, deadline: Option<Duration>) -> bool {
        if self.all.len() >= REQUESTS_MAX {
            return false;
        }
        let id = ask.id();
        self.waiting.insert(id);
        self.deadlines.extend(deadline.map(|at| (at, id)));
        self.all.insert(id, Request { ask, deadline, sent: None });
        true
    }

    pub(super) fn set_calls_max(&mut self, calls_max: usize) {
        self.calls_max = calls_max;
    }

    /// The next request that may leave; before the WELCOME only those that may be replayed.
    pub(super) fn take_next(&mut self, replayable_only: bool, acks_sent: u64) -> Option<Frame> {
        let limits =
            [OPENS_INFLIGHT_MAX, APP_PULLS_INFLIGHT_MAX, if replayable_only { 0 } else { self.calls_max }];
        let id = self.waiting.iter().copied().find(|id| {
            self.all.get(id).is_some_and(|request| {
                let kind = request.ask.kind();
                self.flying.get(kind) < limits.get(kind)
            })
        })?;
        let request = self.all.get_mut(&id)?;
        self.waiting.remove(&id);
        request.sent = Some(acks_sent);
        if let Some(flying) = self.flying.get_mut(request.ask.kind()) {
            *flying += 1;
        }
        Some(request.ask.frame())
    }

    /// A request is answered: what it was, and how many ACKs had left before it.
    pub(super) fn answered(&mut self, id: RequestId) -> Option<(Ask, u64)> {
        let acks = self.all.get(&id)?.sent?;
        self.remove(id).map(|ask| (ask, acks))
    }

    /// Whether `id` is a pull in flight; the part of it that `block` answers is not asked again.
    pub(super) fn pulled(&mut self, id: RequestId, block: &Block) -> bool {
        let Some(Request { ask: Ask::Pull(pull), sent: Some(_), .. }) = self.all.get_mut(&id) else {
            return false;
        };
        let answered = u32::try_from(block.records.len()).unwrap_or(u32::MAX);
        pull.limit = pull.limit.saturating_sub(answered);
        if let Some(next) = block.records.last().and_then(|record| record.seq.next()) {
            pull.from = pull.from.max(next);
        }
        if block.last || pull.limit == 0 {
            self.remove(id);
        }
        true
    }

    fn remove(&mut self, id: RequestId) -> Option<Ask> {
        let request = self.all.remove(&id)?;
        self.waiting.remove(&id);
        if let Some(at) = request.deadline {
            self.deadlines.remove(&(at, id));
        }
        if request.sent.is_some()
            && let Some(flying) = self.flying.get_mut(request.ask.kind())
        {
            *flying = flying.saturating_sub(1);
        }
        Some(request.ask)
    }

    /// Takes a call whose deadline has passed; call again until `None`.
    pub(super) fn expire(&mut self, now: Duration) -> Option<RequestId> {
        let &(_, id) = self.deadlines.first().filter(|(at, _)| *at <= now)?;
        self.remove(id);
        Some(id)
    }

    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The connection is gone: what may be repeated waits again, the calls that had left are returned.
    pub(super) fn disconnected(&mut self) -> Vec<RequestId> {
        let mut lost = Vec::new();
        for (id, request) in &mut self.all {
            if request.sent.take().is_some() {
                match request.ask {
                    Ask::Call(_) => lost.push(*id),
                    _ => {
                        self.waiting.insert(*id);
                    }
                }
            }
        }
        for id in &lost {
            self.remove(*id);
        }
        self.flying = [0; 3];
        lost
    }
}
