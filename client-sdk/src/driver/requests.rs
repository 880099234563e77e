//! What the app asked for and has no answer to yet.
//!
//! Not here: repeating OPENs and bounding what is in flight (the session half does).

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame::{CallStatus, Event, NetworkHint, OpenTarget, Opened, Reply},
    id::{ConversationId, RequestId, ServiceId, UserId},
    service::{self, Method, Names, NamesFound, PAGE_MAX},
};
use tokio::sync::oneshot;

use super::{
    Driver,
    ledger::{Change, OpenReplies},
};
use crate::{
    error::Error,
    keepalive::Keepalive,
    networks::NetworkKey,
    state::{self, State},
};

/// Calls, and opens, that may wait for an answer.
const WAITING_MAX: usize = 100;

/// Users whose names are asked for; of more, the rest stay nameless until their next message.
const NAMELESS_MAX: usize = 1_024;

/// What the app wants from the driver.
#[derive(Debug)]
pub(crate) enum Request {
    Call(Call),
    Open {
        target: OpenTarget,
        on_screen: bool,
        reply: oneshot::Sender<Result<Opened, Error>>,
    },
    Event(Event),
    Network(NetworkHint, String),
    Suspend,
    /// The conversation that is wanted first, if one is.
    Resume(Option<ConversationId>),
    Close(oneshot::Sender<()>),
}

/// A call that is repeated over connections until it expires.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) service: ServiceId,
    pub(crate) method: u32,
    pub(crate) body: Bytes,
    /// By the platform's monotonic clock.
    pub(crate) expires: Duration,
    pub(crate) reply: oneshot::Sender<Result<Bytes, Error>>,
}

#[derive(Debug)]
struct Opening {
    target: OpenTarget,
    replies: OpenReplies,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Requests {
    calls: HashMap<RequestId, Call>,
    opens: HashMap<RequestId, Opening>,
    nameless: BTreeSet<UserId>,
    naming: Option<RequestId>,
}

impl Requests {
    /// Senders whose names should be asked for.
    pub(super) fn nameless(&mut self, users: BTreeSet<UserId>) {
        for user in users {
            if self.nameless.len() < NAMELESS_MAX {
                self.nameless.insert(user);
            }
        }
    }

    /// Nothing is answered any more.
    pub(super) fn close(&mut self) {
        self.calls.clear();
        self.opens.clear();
    }
}

impl Driver {
    pub(super) fn request(&mut self, request: Request) {
        let now = self.now();
        match request {
            Request::Call(call) => self.call(call),
            Request::Open { target, on_screen, reply } => self.open(target, on_screen, Some(reply)),
            Request::Event(event) => self.half.event(event, now),
            Request::Network(network, name) => self.network_changed(network, &name),
            Request::Suspend => {
                self.keepalive.suspend(true);
                self.step(state::Event::Suspend);
            }
            Request::Resume(wanted) => {
                self.keepalive.suspend(false);
                if let Some(conversation) = wanted {
                    self.open(OpenTarget::Number(conversation), true, None);
                }
                self.step(state::Event::Resume);
            }
            // The driver's loop takes this one itself.
            Request::Close(reply) => drop(reply),
        }
    }

    /// The connection goes on from the new network if it can.
    fn network_changed(&mut self, hint: NetworkHint, name: &str) {
        let srtt = self.srtt();
        self.keep_networks();
        self.options.network = hint;
        self.network = NetworkKey::new(hint.kind, name);
        let known = self.networks.network(self.network);
        let (shortest, longest) = self.keepalive.bounds();
        self.keepalive = Keepalive::new(known.keepalive());
        self.keepalive.range(shortest, longest);
        // What the new network is known for is a better guess than what the old one was like.
        let srtt = known.rtt().map_or(srtt, |(srtt, _)| srtt);
        self.step(state::Event::NetworkChanged { srtt });
    }

    fn call(&mut self, call: Call) {
        let left = call.expires.saturating_sub(self.shared.platform.monotonic());
        if call.reply.is_closed() || left.is_zero() {
            return;
        }
        if self.requests.calls.len() >= WAITING_MAX {
            let _ = call.reply.send(Err(Error::TooMany));
            return;
        }
        let now = self.now();
        let id = self.half.call(call.service, call.method, call.body.clone(), left, now);
        self.requests.calls.insert(id, call);
    }

    /// Asks for the number of a name, once for all who want it.
    pub(super) fn open(
        &mut self,
        target: OpenTarget,
        on_screen: bool,
        reply: Option<oneshot::Sender<Result<Opened, Error>>>,
    ) {
        let same = self.requests.opens.values_mut().find(|opening| opening.target == target);
        if let Some(opening) = same
            && !on_screen
        {
            opening.replies.retain(|reply| !reply.is_closed());
            opening.replies.extend(reply);
            return;
        }
        if self.requests.opens.len() >= WAITING_MAX {
            if let Some(reply) = reply {
                let _ = reply.send(Err(Error::TooMany));
            }
            return;
        }
        let now = self.now();
        let id = self.half.open(target.clone(), on_screen, now);
        self.requests.opens.insert(id, Opening { target, replies: reply.into_iter().collect() });
    }

    pub(super) fn opened(&mut self, opened: Opened) {
        if let Some(opening) = self.requests.opens.remove(&opened.id) {
            self.ledger.push(Change::Resolved(opening.target, opened, opening.replies));
        }
    }

    pub(super) fn request_refused(&mut self, error: fulmar_protocol::frame::Error) {
        let Some(opening) = self.requests.opens.remove(&error.refers) else { return };
        let final_answer = error.retry == fulmar_protocol::close::Retry::Never;
        if final_answer {
            self.ledger.push(Change::Unresolvable(opening.target, error.code));
        } else {
            // What waits for the name is looked at again.
            self.feed.look_again(self.now());
        }
        for reply in opening.replies {
            let _ = reply.send(Err(Error::Refused { code: error.code, text: error.text.clone() }));
        }
    }

    pub(super) fn replied(&mut self, reply: Reply) {
        if self.requests.naming == Some(reply.id) {
            self.requests.naming = None;
            self.named(&reply);
            return;
        }
        let Some(call) = self.requests.calls.remove(&reply.id) else { return };
        let answer = match reply.status {
            CallStatus::Ok => Ok(Bytes::copy_from_slice(&reply.body)),
            CallStatus::Refused(RefusalCode::ConnectionLost) => return self.call(call),
            CallStatus::Refused(RefusalCode::DeadlineExceeded) => Err(Error::TimedOut),
            CallStatus::Refused(code) => {
                Err(Error::Refused { code, text: String::from_utf8_lossy(&reply.body).into_owned() })
            }
        };
        let _ = call.reply.send(answer);
    }

    /// Asks for the names of senders, one call at a time.
    pub(super) fn ask_names(&mut self) {
        let online = matches!(self.machine.state(), State::Syncing | State::Live);
        if !online || self.requests.naming.is_some() || self.requests.nameless.is_empty() {
            return;
        }
        let users: Vec<UserId> = self.requests.nameless.iter().copied().take(PAGE_MAX).collect();
        for user in &users {
            self.requests.nameless.remove(user);
        }
        let Some(body) = service::encode(&Names { users }) else { return };
        let now = self.now();
        let timeout = crate::client::REQUEST_TIMEOUT;
        let id = self.half.call(service::BUILTIN, Method::Names as u32, body, timeout, now);
        self.requests.naming = Some(id);
    }

    fn named(&mut self, reply: &Reply) {
        // Without an answer they stay nameless until their next message.
        if reply.status == CallStatus::Ok
            && let Some(found) = service::decode::<NamesFound>(&reply.body)
        {
            self.ledger.push(Change::Names(found.names));
        }
        self.ask_names();
    }
}
