//! Objects in an S3-compatible object store.
//!
//! - The client is asynchronous and runs on a thread of its own; callers wait for it, each for one answer at a time, so that what
//!   is under way is bounded by the callers, and by [`CALLS_MAX`].
//! - Nothing is waited for without an end: a call that takes too long is an error like another.
//! - Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
//!   `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`, or the metadata service of the machine).
//!
//! Not here: what is in the objects.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::{
    ClientOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path,
};
use tokio::runtime::Runtime;

use super::{ColdStore, Listed, Stop, Upload};
use crate::error::OpenError;

/// Calls under way at the same time; more are refused.
const CALLS_MAX: usize = 64;

/// How long a reader waits.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// How long everything else is waited for.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a call that is waited for looks whether it was told to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Bytes of a part of an object: S3 takes no smaller ones, and no more than 10,000 of them.
const PART_BYTES: usize = 8 << 20;

/// A bucket, or a part of one.
#[derive(Debug, Clone)]
pub(super) struct S3 {
    client: Arc<Client>,
    store: Arc<AmazonS3>,
    prefix: String,
}

struct Client {
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
    calls: AtomicUsize,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The last one to drop it may be a thread of another runtime, which must not wait.
            runtime.shutdown_background();
        }
    }
}

impl Client {
    /// Waits for `work`, at most `timeout`, and not after `stop` was told.
    fn call<T: Send + 'static>(
        &self,
        timeout: Duration,
        stop: &Stop,
        work: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> io::Result<T> {
        let Some(runtime) = &self.runtime else { return Err(io::Error::other("the client is gone")) };
        if self.calls.fetch_add(1, Ordering::AcqRel) >= CALLS_MAX {
            self.calls.fetch_sub(1, Ordering::AcqRel);
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "too many calls are under way"));
        }
        let (reply, answer) = sync_channel(1);
        let task = runtime.spawn(async move {
            let done = tokio::time::timeout(timeout, work).await;
            // Who asked may have been told to stop.
            let _ = reply.send(done);
        });
        let result = loop {
            match answer.recv_timeout(LOOK_EVERY) {
                Ok(Ok(done)) => break done.map_err(to_io),
                Ok(Err(_)) => {
                    break Err(io::Error::new(io::ErrorKind::TimedOut, "there was no answer in time"));
                }
                Err(RecvTimeoutError::Timeout) if stop.is_told() => {
                    task.abort();
                    break Err(io::Error::new(io::ErrorKind::Interrupted, "it was stopped"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    break Err(io::Error::other("the client's thread is gone"));
                }
            }
        };
        self.calls.fetch_sub(1, Ordering::AcqRel);
        result
    }
}

fn to_io(error: object_store::Error) -> io::Error {
    match error {
        object_store::Error::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, error),
        error => io::Error::other(error),
    }
}

impl S3 {
    pub(super) fn connect(bucket: &str, prefix: &str) -> Result<Self, OpenError> {
        let broken =
            |reason: String| OpenError::Cold { reason: format!("s3://{bucket} can't be used: {reason}") };
        // Whoever was first has chosen; both know the same algorithms.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options =
            ClientOptions::new().with_timeout(CALL_TIMEOUT).with_connect_timeout(Duration::from_secs(5));
        let retry = RetryConfig { max_retries: 2, retry_timeout: READ_TIMEOUT, ..RetryConfig::default() };
        let http = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(options.with_allow_http(http))
            .with_retry(retry)
            .build()
            .map_err(|error| broken(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("cold-s3")
            .enable_all()
            .build()
            .map_err(|error| broken(error.to_string()))?;
        let client = Client { runtime: Some(runtime), calls: AtomicUsize::new(0) };
        Ok(Self { client: Arc::new(client), store: Arc::new(store), prefix: prefix.to_owned() })
    }

    fn path(&self, name: &str) -> io::Result<Path> {
        let whole = if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Path::parse(whole).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }
}

#[derive(Debug)]
struct Parts {
    s3: S3,
    stop: Stop,
    upload: Option<Box<dyn MultipartUpload>>,
    part: Vec<u8>,
}

impl Parts {
    fn put(&mut self) -> io::Result<()> {
        let part = PutPayload::from(std::mem::take(&mut self.part));
        match &mut self.upload {
            Some(upload) => self.s3.client.call(CALL_TIMEOUT, &self.stop, upload.put_part(part)),
            None => Err(io::Error::other("it failed before")),
        }
    }
}

impl Upload for Parts {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = PART_BYTES.saturating_sub(self.part.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            self.part.extend_from_slice(now);
            bytes = later;
            if self.part.len() >= PART_BYTES {
                self.put()?;
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        if !self.part.is_empty() {
            self.put()?;
        }
        let Some(mut upload) = self.upload.take() else { return Err(io::Error::other("it failed before")) };
        self.s3.client.call(CALL_TIMEOUT, &self.stop, async move { upload.complete().await.map(drop) })
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        if let (Some(mut upload), Some(runtime)) = (self.upload.take(), &self.s3.client.runtime) {
            // Parts of what was not finished cost money until they are gone; a rule of the bucket removes what is left.
            runtime.spawn(async move { tokio::time::timeout(CALL_TIMEOUT, upload.abort()).await });
        }
    }
}

impl ColdStore for S3 {
    fn begin(&self, name: &str, stop: &Stop) -> io::Result<Box<dyn Upload>> {
        let (store, path) = (Arc::clone(&self.store), self.path(name)?);
        let upload = self.client.call(CALL_TIMEOUT, stop, async move { store.put_multipart(&path).await })?;
        Ok(Box::new(Parts { s3: self.clone(), stop: stop.clone(), upload: Some(upload), part: Vec::new() }))
    }

    fn read(&self, name: &str, at: u64, bytes: u32, stop: &Stop) -> io::Result<Bytes> {
        let (store, path) = (Arc::clone(&self.store), self.path(name)?);
        let range = at..at.saturating_add(u64::from(bytes));
        let work = async move { store.get_range(&path, range).await };
        let found = self.client.call(READ_TIMEOUT, stop, work)?;
        if found.len() as u64 == u64::from(bytes) {
            Ok(found)
        } else {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the object is too short"))
        }
    }

    fn size(&self, name: &str, stop: &Stop) -> io::Result<u64> {
        let (store, path) = (Arc::clone(&self.store), self.path(name)?);
        self.client.call(CALL_TIMEOUT, stop, async move { Ok(store.head(&path).await?.size) })
    }

    fn remove(&self, name: &str, stop: &Stop) -> io::Result<()> {
        let (store, path) = (Arc::clone(&self.store), self.path(name)?);
        let work = async move { store.delete(&path).await };
        match self.client.call(CALL_TIMEOUT, stop, work) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn list(&self, prefix: &str, limit: usize, stop: &Stop) -> io::Result<Vec<Listed>> {
        let store = Arc::clone(&self.store);
        let whole = self.path(prefix.trim_end_matches('/'))?;
        let skip = whole.as_ref().len() - prefix.trim_end_matches('/').len();
        let work = async move {
            let mut objects = store.list(Some(&whole)).take(limit);
            let mut found = Vec::new();
            while let Some(object) = objects.next().await {
                let object = object?;
                let written = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(0);
                let written = UNIX_EPOCH + Duration::from_millis(written);
                if let Some(name) = object.location.as_ref().get(skip..) {
                    // What is from the future is new.
                    let age = SystemTime::now().duration_since(written).unwrap_or(Duration::ZERO);
                    found.push(Listed { name: name.to_owned(), age });
                }
            }
            Ok(found)
        };
        self.client.call(CALL_TIMEOUT, stop, work)
    }
}
