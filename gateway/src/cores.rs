//! A thread per core, each with a runtime, an endpoint and the connections that came by it.
//!
//! - Everything of a connection happens on its core's thread, QUIC included: no lock is waited for, nothing moves. What
//!   connects it to others are the shards' queues, and their word that something is due ([`crate::fanout::desk`]). A shard that
//!   rests is looked at on the thread of the core that asks it, which may wait for a disk then ([`crate::conversation::visits`]).
//! - A core that fails ends the gateway: half of its clients would be left without a word.
//! - The threads end with [`Cores`], however that ends.
//!
//! Not here: the sockets and who steers to them ([`crate::accept::sockets`]), what is served (`accept`).

use std::{io, net, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context as _;
use quinn::TokioRuntime;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};

use crate::{
    accept::{
        endpoint::{Shared, accept},
        sockets,
        stream::Streams,
    },
    connection::lateness,
    conversation::visits::Visits,
    drain::Drain,
    fanout::desk::Desk,
};

/// How long the last CLOSE frames may take to leave.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);

/// How often a core says how late it is while nobody sends.
const TELL_EVERY: Duration = Duration::from_secs(1);

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
    /// How each ended; nothing, if it panicked.
    ends: Vec<oneshot::Receiver<anyhow::Result<()>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Cores {
    /// Starts a thread for every post.
    ///
    /// # Errors
    /// A thread or its runtime can't be started.
    pub(crate) fn start(posts: Vec<Post>, shared: &Shared, drain: &Drain) -> io::Result<Self> {
        let works = (0..).zip(posts).map(|(number, post)| {
            let (shared, drain) = (shared.on(number), drain.clone());
            move || serve(post, shared, drain)
        });
        Self::start_works(works)
    }

    fn start_works<W, F>(works: impl IntoIterator<Item = W>) -> io::Result<Self>
    where
        W: FnOnce() -> F + Send + 'static,
        F: Future<Output = anyhow::Result<()>>,
    {
        let (stop, _) = watch::channel(false);
        let mut cores = Self { stop, ends: Vec::new(), threads: Vec::new() };
        for (number, work) in works.into_iter().enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let mut stop = cores.stop.subscribe();
            let (told, ended) = oneshot::channel();
            let run = move || {
                // Also when this panics: whoever was left something by this core is told before it goes.
                let closing = Closing;
                let result = runtime.block_on(async {
                    tokio::select! {
                        biased;
                        _ = stop.wait_for(|stop| *stop) => Ok(()),
                        result = Box::pin(work()) => result,
                    }
                });
                drop(closing);
                // Reads of the disk that are under way are waited for by nobody.
                runtime.shutdown_background();
                let _ = told.send(result);
            };
            let thread = std::thread::Builder::new().name(format!("core-{number}")).spawn(run)?;
            cores.ends.push(ended);
            cores.threads.push(thread);
        }
        Ok(cores)
    }

    /// Waits until all of them are done, or the first one fails.
    ///
    /// # Errors
    /// What failed; a thread that panicked.
    pub(crate) async fn ended(&mut self) -> anyhow::Result<()> {
        let ends = self.ends.iter_mut().enumerate().map(async |(number, ended)| match ended.await {
            Ok(result) => result.with_context(|| format!("core {number}")),
            Err(_) => anyhow::bail!("the thread of core {number} panicked; what was acked is on disk"),
        });
        futures_util::future::try_join_all(ends).await.map(drop)
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            // They end at once, and what they hold must be free when this is. A panic was told already.
            let _ = thread.join();
        }
    }
}

/// Ends what this thread has as a core.
struct Closing;

impl Drop for Closing {
    fn drop(&mut self) {
        Visits::close();
        Desk::close();
        lateness::close();
    }
}

async fn serve(post: Post, shared: Shared, mut drain: Drain) -> anyhow::Result<()> {
    let desk = Desk::open();
    let visits = Visits::open(shared.context.metrics.clone());
    let mut attending = JoinSet::new();
    attending.spawn(async move { desk.attend().await });
    attending.spawn(async move { visits.make().await });
    let wait = Duration::from_millis(shared.context.config.limits.core_wait_ms.into());
    let _watching = if wait.is_zero() { None } else { Some(watch(wait, &post.socket, &shared)?) };
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
        _ = attending.join_next() => anyhow::bail!("nobody wakes its connections, or its shards, any more"),
    }
    drain.started().await;
    endpoint.close(0u32.into(), b"");
    // The last CLOSE frames leave, and the port with them.
    let _ = tokio::time::timeout(GOODBYE, endpoint.wait_idle()).await;
    Ok(())
}

/// Has this core know how late it is, and refuse sends while that is more than `wait`.
fn watch(wait: Duration, socket: &net::UdpSocket, shared: &Shared) -> anyhow::Result<JoinSet<()>> {
    let socket = socket.try_clone().context("the socket can't be looked at")?;
    let age = Box::new(move || sockets::age(&socket));
    lateness::open(shared.core, wait, age, shared.context.metrics.clone());
    let mut telling = JoinSet::new();
    telling.spawn(async {
        let mut tick = tokio::time::interval(TELL_EVERY);
        loop {
            tick.tick().await;
            lateness::tell();
        }
    });
    Ok(telling)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts the works that were dropped or are done.
    struct Gone(Arc<AtomicUsize>);

    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Clone, Copy)]
    enum Fate {
        Goes,
        Stays,
        Fails,
        Panics,
    }

    async fn end(fates: &[Fate]) -> (Result<(), String>, usize) {
        let gone = Arc::new(AtomicUsize::new(0));
        let works = fates.iter().map(|fate| {
            let (fate, here) = (*fate, Gone(Arc::clone(&gone)));
            move || async move {
                // Left to the runtime, as connections are.
                tokio::spawn(async move {
                    let _here = here;
                    std::future::pending::<()>().await;
                });
                match fate {
                    Fate::Goes => Ok(()),
                    Fate::Stays => std::future::pending().await,
                    Fate::Fails => anyhow::bail!("no socket"),
                    Fate::Panics => panic!("as a test wants it"),
                }
            }
        });
        let mut cores = Cores::start_works(works).unwrap();
        let ended = cores.ended().await.map_err(|error| format!("{error:#}"));
        drop(cores);
        (ended, gone.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn one_core_that_fails_ends_all() {
        use Fate::{Fails, Goes, Panics, Stays};

        assert_eq!(end(&[Goes, Goes]).await, (Ok(()), 2));
        assert_eq!(end(&[Stays, Fails, Goes]).await, (Err("core 1: no socket".to_owned()), 3));
        let panicked = "the thread of core 2 panicked; what was acked is on disk".to_owned();
        assert_eq!(end(&[Goes, Stays, Panics, Stays]).await, (Err(panicked), 4));
    }

    #[test]
    fn what_a_core_left_with_a_shard_is_looked_at_even_if_it_panics() {
        let shard = crate::conversation::visits::tests::Resting::new();
        let call = shard.bell();
        let work = || async move {
            let _visits = Visits::open(crate::metrics::Metrics::default());
            // To be visited by this core, which does not live to do it.
            call();
            panic!("as a test wants it")
        };
        let mut cores = Cores::start_works([work]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(runtime.block_on(cores.ended()).is_err());
        drop(cores);
        assert!(shard.is_looked_at());
    }
}
