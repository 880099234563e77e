//! A simulated phone: a real client of the SDK with a database of its own, behind the proxy.
//!
//! - Whatever its app is handed, and whenever it connects or loses the connection, goes to the board.
//!
//! Not here: what it says (`play`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use fulmar_badnet::history::Event;
use fulmar_client::{Client, ConnectionState, Conversation, Options};
use tokio::task::JoinHandle;

use super::board::{Board, client_of};
use super::plan::Plan;
use crate::cli::rehearsal::again;

/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A phone that runs.
#[derive(Debug)]
pub(super) struct Phone {
    client: Client,
    tasks: Vec<JoinHandle<()>>,
}

impl Phone {
    /// Starts it; it connects by itself.
    ///
    /// # Errors
    /// Its database can't be opened, or the certificate can't be read.
    pub(super) async fn start(
        number: usize,
        options: Options,
        plan: Arc<Plan>,
        board: Arc<Board>,
    ) -> anyhow::Result<Self> {
        let client =
            Client::connect(options).await.with_context(|| format!("{} can't start", plan.phone(number)))?;
        let watching = tokio::spawn(watch_connection(number, client.clone(), Arc::clone(&board)));
        let mut messages = client.messages();
        let reading = tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                board.received(&plan, number, &message);
            }
        });
        Ok(Self { client, tasks: vec![watching, reading] })
    }

    /// The client.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// How often it was connected, beyond the first time.
    pub(super) fn reconnects(&self) -> u64 {
        self.client.traffic().connections.saturating_sub(1)
    }

    /// Where its connection stands, in words.
    pub(super) fn state(&self) -> String {
        match self.client.state().current() {
            ConnectionState::Offline { reason, .. } => format!("offline ({reason:?})"),
            ConnectionState::Closed { reason } => format!("closed ({reason:?})"),
            state => format!("{state:?}").to_lowercase(),
        }
    }

    /// The conversation with the user or the group of this name, and its number.
    ///
    /// # Errors
    /// The gateway refused, or did not answer in time.
    pub(super) async fn open(&self, name: &str, group: bool) -> anyhow::Result<(Conversation, u64)> {
        let conversation =
            if group { self.client.group(name).await? } else { self.client.direct(name).await? };
        let number =
            again(|| conversation.resolved()).await.with_context(|| format!("{name} can't be opened"))?;
        Ok((conversation, number.get()))
    }

    /// Makes a group.
    ///
    /// # Errors
    /// The gateway refused, or did not answer in time.
    pub(super) async fn create_group(&self, name: &str, members: &[&str]) -> anyhow::Result<()> {
        again(|| self.client.create_group(name, members))
            .await
            .with_context(|| format!("{name} can't be made"))?;
        Ok(())
    }

    /// Ends it.
    pub(super) async fn close(self) {
        // What is left in its database is of no use to anybody: nobody looks at it any more.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.client.close()).await;
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn watch_connection(number: usize, client: Client, board: Arc<Board>) {
    let mut states = client.state();
    let mut connected = false;
    let phone = client_of(number);
    while let Some(state) = states.next().await {
        let now = match state {
            ConnectionState::Syncing | ConnectionState::Live | ConnectionState::Suspect => true,
            ConnectionState::Offline { .. }
            | ConnectionState::Connecting
            | ConnectionState::Closed { .. } => false,
            // A draining connection still carries messages; what comes next decides.
            _ => connected,
        };
        if now == connected {
            continue;
        }
        connected = now;
        if now {
            board.record(Event::Connected { client: phone });
            board.counts.online.fetch_add(1, Ordering::Relaxed);
        } else {
            board.record(Event::Disconnected { client: phone });
            board.counts.online.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
