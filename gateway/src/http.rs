//! The operator's pages: `/metrics`, `/healthz`, `/readyz`, on a TCP address of their own.
//!
//! - `/healthz` does what a send does: it writes to the log and waits until that is durable. Many askers share one write.
//!   While a shard refuses writes it says which and why, and what goes on all the same.
//! - `/readyz` says whether to send new phones here: not while starting or draining.
//! - Connections and their lifetime are bounded; nobody can hold the pages shut for long.
//! - There is no authentication: the address is private unless configured otherwise.
//!
//! Not here: the business API.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};

use fulmar_protocol::id::ShardId;

use crate::drain::Drain;
use crate::metrics::Metrics;

/// Connections to these pages at once: a few scrapers and probes. More wait to be accepted.
const CONNECTIONS_MAX: usize = 64;

/// How long one of them lives at most; scrapers just connect again.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(120);

/// How long the canary may take before the gateway counts as ill.
const CANARY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a canary's answer is given to others who ask.
const CANARY_FRESH: Duration = Duration::from_secs(1);

/// A durable write to the log; the text says what failed.
pub type Canary = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The pages can't be served; one line that says why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HttpError(String);

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    /// For `/metrics`.
    pub metrics: Metrics,
    /// For `/healthz`.
    pub canary: Canary,
    /// For `/healthz`: why a shard refuses writes, while it does.
    pub faults: Vec<(ShardId, watch::Receiver<Option<String>>)>,
    /// For `/healthz`: what is as it was configured, but should not be forgotten.
    pub warning: Option<String>,
    /// For `/readyz`: whether the gateway has started.
    pub started: watch::Receiver<bool>,
    /// For `/readyz`: whether it is leaving.
    pub drain: Drain,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// A bound address, not yet serving.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
}

impl HttpServer {
    /// Takes the address.
    ///
    /// # Errors
    /// One line: it is in use, not ours, or not allowed.
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let failed = |e: io::Error| HttpError(cannot_listen("listen.http_address", "--http", address, &e));
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// The address, with the port the system chose if 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is done, then lets requests in progress finish.
    ///
    /// # Errors
    /// The listener failed.
    pub async fn serve(
        self,
        pages: Pages,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), HttpError> {
        let listener =
            Bounded { listener: self.listener, permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
        let shared = Arc::new(Shared { pages, last: Mutex::new(None) });
        let router = Router::new()
            .route("/", get(index))
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(shared);
        axum::serve(listener, router)
            .with_graceful_shutdown(stop)
            .await
            .map_err(|e| HttpError(format!("the pages at http://{} ended: {e}", self.address)))
    }
}

/// Why an address can't be listened on, and what to do; `setting` and `flag` name where it comes from.
#[must_use]
pub fn cannot_listen(setting: &str, flag: &str, address: SocketAddr, error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("another program has it; stop that one, or choose another with {flag} or {setting}")
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("it is no address of this host; choose another with {flag} or {setting}")
        }
        io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need a privilege; choose another with {flag} or {setting}")
        }
        _ => format!("{error}; choose another with {flag} or {setting}"),
    };
    format!("can't listen on {address}: {advice}")
}

struct Shared {
    pages: Pages,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Shared {
    /// One write at a time; who asks meanwhile gets its answer.
    async fn canary(&self) -> Result<(), String> {
        let mut last = self.last.lock().await;
        if let Some((at, result)) = &*last
            && at.elapsed() < CANARY_FRESH
        {
            return result.clone();
        }
        let result = match tokio::time::timeout(CANARY_TIMEOUT, (self.pages.canary)()).await {
            Ok(result) => result,
            Err(_) => Err(format!("the log took no write within {} s", CANARY_TIMEOUT.as_secs())),
        };
        *last = Some((Instant::now(), result.clone()));
        result
    }
}

type Answer = (StatusCode, [(HeaderName, &'static str); 1], String);

fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body.into())
}

async fn index() -> impl IntoResponse {
    let version = env!("CARGO_PKG_VERSION");
    text(
        StatusCode::OK,
        format!(
            "Fulmar gateway {version}\n\n\
             /metrics   counters for Prometheus\n\
             /healthz   200 when a write to the log succeeds, else 503 and why not\n\
             /readyz    200 when phones may come, 503 while starting or draining\n"
        ),
    )
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (StatusCode::OK, [(header::CONTENT_TYPE, kind)], shared.pages.metrics.encode())
}

async fn healthz(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let canary = shared.canary().await;
    let mut body = String::new();
    for (shard, fault) in &shared.pages.faults {
        if let Some(why) = &*fault.borrow() {
            body.push_str(&format!("degraded: shard {shard} refuses writes, reads go on: {why}\n"));
        }
    }
    if let Err(why) = canary
        && !body.contains(&why)
    {
        body.push_str(&format!("{why}\n"));
    }
    if !body.is_empty() {
        return text(StatusCode::SERVICE_UNAVAILABLE, body);
    }
    match &shared.pages.warning {
        Some(warning) => text(StatusCode::OK, format!("ok\nwarning: {warning}\n")),
        None => text(StatusCode::OK, "ok\n"),
    }
}

async fn readyz(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    if shared.pages.drain.is_draining() {
        text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if *shared.pages.started.borrow() {
        text(StatusCode::OK, "ready\n")
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}

/// Accepts no more than so many at once.
struct Bounded {
    listener: TcpListener,
    permits: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guarded, SocketAddr) {
        let Ok(permit) = self.permits.clone().acquire_owned().await else {
            // The semaphore is never closed.
            return std::future::pending().await;
        };
        // The trait's own accept waits out a lack of descriptors instead of failing.
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let deadline = Box::pin(tokio::time::sleep(CONNECTION_LIFETIME));
        (Guarded { stream, deadline, _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that counts, and ends.
struct Guarded {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Guarded {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::drain::{Cause, drain};

    fn loopback() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
    }

    async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn the_pages_say_how_it_stands() {
        let (starting, started) = watch::channel(false);
        let (trigger, drain) = drain(Duration::from_secs(30));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let writes = Arc::new(AtomicUsize::new(0));
        let counted = writes.clone();
        let canary: Canary = Arc::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(())).boxed()
        });
        let server = HttpServer::bind(loopback()).await.unwrap();
        let address = server.address();
        let (fault_told, fault) = watch::channel(None);
        let faults = vec![(ShardId::new(3).unwrap(), fault)];
        let warning = Some("a power cut may lose the newest".to_owned());
        let pages = Pages { metrics: Metrics::default(), canary, faults, warning, started, drain };
        let serving = tokio::spawn(server.serve(pages, stopped.map(drop)));
        assert_eq!(fetch(address, "/readyz").await, (503, "starting\n".to_owned()));
        starting.send_replace(true);
        assert_eq!(fetch(address, "/readyz").await, (200, "ready\n".to_owned()));
        for _ in 0..3 {
            let well = "ok\nwarning: a power cut may lose the newest\n".to_owned();
            assert_eq!(fetch(address, "/healthz").await, (200, well));
        }
        fault_told.send_replace(Some("the disk is full".to_owned()));
        let ill = "degraded: shard 3 refuses writes, reads go on: the disk is full\n".to_owned();
        assert_eq!(fetch(address, "/healthz").await, (503, ill));
        fault_told.send_replace(None);
        assert!(writes.load(Ordering::Relaxed) >= 1);
        let (status, text) = fetch(address, "/metrics").await;
        assert!(status == 200 && text.contains("fulmar_connections 0"), "{text}");
        assert_eq!(fetch(address, "/").await.0, 200);
        assert_eq!(fetch(address, "/else").await.0, 404);
        trigger.start(Cause::Request);
        assert_eq!(fetch(address, "/readyz").await, (503, "draining\n".to_owned()));
        stop.send(()).unwrap();
        serving.await.unwrap().unwrap();
        TcpStream::connect(address).await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn an_ill_log_is_told_and_askers_share_one_write() {
        let (_starting, started) = watch::channel(true);
        let (_trigger, drain) = drain(Duration::from_secs(30));
        let writes = Arc::new(AtomicUsize::new(0));
        let counted = writes.clone();
        let canary: Canary = Arc::new(move || match counted.fetch_add(1, Ordering::Relaxed) {
            0 => std::future::ready(Err("shard 3: the disk is full".to_owned())).boxed(),
            _ => std::future::pending().boxed(),
        });
        let pages =
            Pages { metrics: Metrics::default(), canary, faults: vec![], warning: None, started, drain };
        let shared = Shared { pages, last: Mutex::new(None) };
        let full = Err("shard 3: the disk is full".to_owned());
        assert_eq!(shared.canary().await, full);
        assert_eq!(shared.canary().await, full);
        assert_eq!(writes.load(Ordering::Relaxed), 1, "the answer is fresh");
        tokio::time::advance(CANARY_FRESH).await;
        assert_eq!(shared.canary().await, Err("the log took no write within 5 s".to_owned()));
        assert_eq!(writes.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn an_address_in_use_is_refused_in_one_sentence() {
        let first = HttpServer::bind(loopback()).await.unwrap();
        let error = HttpServer::bind(first.address()).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "can't listen on {}: another program has it; stop that one, or choose another with --http or \
                 listen.http_address",
                first.address()
            )
        );
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 1));
        let error = HttpServer::bind(elsewhere).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "can't listen on 192.0.2.1:1: it is no address of this host; choose another with --http or \
             listen.http_address"
        );
    }
}
