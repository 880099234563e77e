//! The driver: one task per client.

use std::sync::Arc;

use bytes::Bytes;
use fulmar_protocol::{
    frame::{Event, NetworkHint, OpenTarget, Opened},
    id::{ConversationId, ServiceId},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    client::Shared,
    db::{Identity, Restore},
    error::Error,
    event::{CloseReason, ConnectionState},
    options::Options,
    transport::Tls,
};

/// What the app wants from the driver.
#[derive(Debug)]
pub(crate) enum Request {
    Call {
        service: ServiceId,
        method: u32,
        body: Bytes,
        expires: Instant,
        reply: oneshot::Sender<Result<Bytes, Error>>,
    },
    Open {
        target: OpenTarget,
        on_screen: bool,
        expires: Instant,
        reply: oneshot::Sender<Result<Opened, Error>>,
    },
    Event(Event),
    Network(NetworkHint),
    Suspend,
    Resume,
    Close(oneshot::Sender<()>),
}

/// What the database held when the client was made.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) identity: Identity,
    pub(crate) restore: Restore,
    pub(crate) arrival: u64,
    pub(crate) waiting: Vec<ConversationId>,
}

/// Runs one client to its end.
pub(crate) async fn run(
    shared: Arc<Shared>,
    options: Options,
    tls: Tls,
    start: Start,
    mut requests: mpsc::Receiver<Request>,
) {
    let _ = (options, tls, start);
    while let Some(request) = requests.recv().await {
        if let Request::Close(reply) = request {
            shared.states.send_replace(ConnectionState::Closed { reason: CloseReason::Requested });
            shared.closed.send_replace(true);
            shared.handles().close();
            let _ = reply.send(());
            return;
        }
    }
}
