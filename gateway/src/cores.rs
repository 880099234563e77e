//! A thread per core, each with a runtime, an endpoint and the connections that came by it.
//!
//! - Everything of a connection happens on its core's thread, QUIC included: no lock is waited for, nothing moves. What
//!   connects it to others are the shards' queues, and their word that something is due ([`crate::fanout::desk`]).
//! - A core that fails ends the gateway: half of its clients would be left without a word.
//! - The threads end with [`Cores`], however that ends.
//!
//! Not here: the sockets and who steers to them ([`crate::accept::sockets`]), what is served (`accept`).

use std::{io, net, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context as _;
use quinn::TokioRuntime;
use tokio::sync::{oneshot, watch};

use crate::{
    accept::{
        endpoint::{Shared, accept},
        stream::Streams,
    },
    drain::Drain,
    fanout::desk::Desk,
};

/// How long the last CLOSE frames may take to leave.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);

/// What one core serves.
#[derive(Debug)]
pub(crate) struct Post {
    /// Where its packets come in.
    pub(crate) socket: net::UdpSocket,
    /// The endpoint's settings.
    pub(crate) endpoint: quinn::EndpointConfig,
    /// The settings of its connections.
    pub(crate) quic: quinn::ServerConfig,
    /// Where byte streams come in, and their TLS. All cores have the same socket; who is idle takes the stream.
    pub(crate) streams: Option<(net::TcpListener, Arc<rustls::ServerConfig>)>,
}

/// Threads that serve.
#[derive(Debug)]
pub(crate) struct Cores {
    stop: watch::Sender<bool>,
    running: Vec<(oneshot::Receiver<anyhow::Result<()>>, Option<JoinHandle<()>>)>,
}

impl Cores {
    /// Starts a thread for every post.
    ///
    /// # Errors
    /// A thread or its runtime can't be started.
    pub(crate) fn start(posts: Vec<Post>, shared: &Shared, drain: &Drain) -> io::Result<Self> {
        let (stop, _) = watch::channel(false);
        let mut cores = Self { stop, running: Vec::new() };
        for (number, post) in (0..).zip(posts) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (shared, drain, mut stop) = (shared.on(number), drain.clone(), cores.stop.subscribe());
            let (told, ended) = oneshot::channel();
            let run = move || {
                let serving = async {
                    tokio::select! {
                        biased;
                        _ = stop.wait_for(|stop| *stop) => Ok(()),
                        result = Box::pin(serve(post, shared, drain)) => result,
                    }
                };
                let result = runtime.block_on(serving);
                Desk::close();
                // Reads of the disk that are under way are waited for by nobody.
                runtime.shutdown_background();
                let _ = told.send(result);
            };
            let thread = std::thread::Builder::new().name(format!("core-{number}")).spawn(run)?;
            cores.running.push((ended, Some(thread)));
        }
        Ok(cores)
    }

    /// Waits until all of them are done, or the first one fails.
    ///
    /// # Errors
    /// What failed; a thread that panicked.
    pub(crate) async fn ended(&mut self) -> anyhow::Result<()> {
        let ends = self.running.iter_mut().enumerate().map(async |(number, (ended, _))| match ended.await {
            Ok(result) => result.with_context(|| format!("core {number}")),
            Err(_) => anyhow::bail!("the thread of core {number} panicked; what was acked is on disk"),
        });
        futures_util::future::try_join_all(ends).await.map(drop)
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.running.iter_mut().filter_map(|(_, thread)| thread.take()) {
            // They end at once, and what they hold must be free when this is. A panic was told already.
            let _ = thread.join();
        }
    }
}

async fn serve(post: Post, shared: Shared, mut drain: Drain) -> anyhow::Result<()> {
    let desk = Desk::open();
    let mut attending = tokio::spawn(async move { desk.attend().await });
    let endpoint = quinn::Endpoint::new(post.endpoint, Some(post.quic), post.socket, Arc::new(TokioRuntime))
        .context("the QUIC endpoint can't start")?;
    let streams = match post.streams {
        Some((listener, tls)) => {
            let listener = tokio::net::TcpListener::from_std(listener).context("TCP can't be listened to")?;
            Some(Streams { listener: Box::new(listener), tls })
        }
        None => None,
    };
    tokio::select! {
        biased;
        accepted = accept(&endpoint, streams, &shared, drain.clone()) => accepted?,
        _ = &mut attending => anyhow::bail!("nobody wakes its connections any more"),
    }
    drain.started().await;
    endpoint.close(0u32.into(), b"");
    // The last CLOSE frames leave, and the port with them.
    let _ = tokio::time::timeout(GOODBYE, endpoint.wait_idle()).await;
    Ok(())
}
