//! The client's database: one SQLite connection on one thread, jobs through a bounded channel.
//!
//! - Jobs that wait while a commit is in progress share the next transaction, so a sync to the disk is paid once for
//!   all of them. Each has a savepoint: one that fails takes nothing of the others with it.
//! - A job's answer leaves after the commit, never before. A failed commit fails every job of it.
//! - In a world with one thread ([`crate::Platform::in_place`]) there is no thread: a job is done, and committed, where it is
//!   brought.
//! - The file is locked for this process: two processes on one database would number their messages alike.
//!
//! Not here: what the jobs do (`store`, and the tables of `schema`).

mod inbox;
mod outbox;
mod register;
mod schema;
mod store;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, oneshot};

pub use self::register::ConversationSummary;
pub(crate) use self::{
    inbox::{Delivered, Marker, Own},
    outbox::{Draft, Outcome, Settled, Unsettled, WaitingSend},
    register::{Identity, Restore},
    store::Store,
};
use crate::{
    client::lock,
    error::Error,
    options::{Database, Durability},
};

/// Jobs that may wait for the thread; whoever brings one more waits for room.
const JOBS_MAX: usize = 256;

/// Jobs of one transaction.
const GROUP_MAX: usize = 128;

/// Stack of the database's thread: several hundred clients may run in one process.
const STACK_BYTES: usize = 512 * 1024;

/// A handle to the database, cheap to clone. It is closed with the last handle.
#[derive(Clone, Debug)]
pub(crate) struct Db {
    worker: Worker,
}

/// Who does the work.
#[derive(Clone, Debug)]
enum Worker {
    /// The database's thread.
    Thread(mpsc::Sender<Job>),
    /// Whoever asks, one after the other.
    Caller(Arc<Mutex<Store>>),
}

struct Job {
    durable: bool,
    work: Box<dyn Work>,
}

/// One job: it is run inside a transaction and answered after its commit.
trait Work: Send {
    /// `true` keeps what it did.
    fn run(&mut self, store: &mut Store) -> bool;
    fn answer(self: Box<Self>, committed: Result<(), String>);
}

struct Task<T, F, A> {
    work: Option<F>,
    after: A,
    result: Option<Result<T, Error>>,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<T, F, A> Work for Task<T, F, A>
where
    T: Send,
    F: FnOnce(&mut Store) -> Result<T, Error> + Send,
    A: FnOnce(&mut T) + Send,
{
    fn run(&mut self, store: &mut Store) -> bool {
        let Some(work) = self.work.take() else { return false };
        let result = work(store);
        let keep = result.is_ok();
        self.result = Some(result);
        keep
    }

    fn answer(self: Box<Self>, committed: Result<(), String>) {
        let result = match (committed, self.result) {
            (Ok(()), Some(Ok(mut value))) => {
                (self.after)(&mut value);
                Ok(value)
            }
            (_, Some(Err(error))) => Err(error),
            (Ok(()), None) => Err(Error::Closed),
            (Err(text), _) => Err(Error::Database(text.into())),
        };
        // Whoever asked may have gone; what was committed stays committed.
        let _ = self.reply.send(result);
    }
}

impl Db {
    /// Opens the database and starts its thread, unless the work is to be done `in_place`.
    ///
    /// # Errors
    /// When it can't be opened, is in use, or was written by a newer version.
    pub(crate) async fn open(
        database: Database,
        durability: Durability,
        in_place: bool,
    ) -> Result<Self, Error> {
        if in_place {
            let store = Store::open(&database, durability)?;
            return Ok(Self { worker: Worker::Caller(Arc::new(Mutex::new(store))) });
        }
        let (jobs, inbox) = mpsc::channel(JOBS_MAX);
        let (opened, ready) = oneshot::channel();
        std::thread::Builder::new()
            .name("fulmar-db".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || match Store::open(&database, durability) {
                Ok(store) => {
                    if opened.send(Ok(())).is_ok() {
                        serve(store, inbox);
                    }
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            })
            .map_err(|error| Error::Database(Box::new(error)))?;
        ready.await.map_err(|_| Error::Closed)??;
        Ok(Self { worker: Worker::Thread(jobs) })
    }

    /// Runs `work` and waits for its commit. `durable`: synced to the disk before the answer, where the durability
    /// asked for says so; else it may be undone by a power cut (never partly, never out of order).
    pub(crate) async fn run<T, F>(&self, durable: bool, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
    {
        self.run_then(durable, work, |_| {}).await
    }

    /// Like [`Self::run`]; `after` is run on the database's thread when the commit is through, in the order of the
    /// jobs, also when the caller has gone.
    pub(crate) async fn run_then<T, F, A>(&self, durable: bool, work: F, after: A) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
        A: FnOnce(&mut T) + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let work = Box::new(Task { work: Some(work), after, result: None, reply });
        let job = Job { durable, work };
        match &self.worker {
            Worker::Thread(jobs) => jobs.send(job).await.map_err(|_| Error::Closed)?,
            Worker::Caller(store) => commit(&mut lock(store), &mut vec![job]),
        }
        answer.await.map_err(|_| Error::Closed)?
    }

    /// Like [`Self::run`], without waiting; `false` when there is no room. For what is repeated later anyway.
    pub(crate) fn try_run<F>(&self, work: F) -> bool
    where
        F: FnOnce(&mut Store) -> Result<(), Error> + Send + 'static,
    {
        let (reply, _) = oneshot::channel();
        let work = Box::new(Task { work: Some(work), after: |_: &mut ()| {}, result: None, reply });
        let job = Job { durable: false, work };
        match &self.worker {
            Worker::Thread(jobs) => jobs.try_send(job).is_ok(),
            Worker::Caller(store) => {
                commit(&mut lock(store), &mut vec![job]);
                true
            }
        }
    }
}

fn serve(mut store: Store, mut inbox: mpsc::Receiver<Job>) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    while let Some(first) = inbox.blocking_recv() {
        group.push(first);
        while group.len() < GROUP_MAX {
            let Ok(job) = inbox.try_recv() else { break };
            group.push(job);
        }
        commit(&mut store, &mut group);
    }
}

/// Runs the jobs in one transaction, and answers them.
fn commit(store: &mut Store, group: &mut Vec<Job>) {
    let durable = group.iter().any(|job| job.durable);
    let committed = transact(store, durable, group).map_err(|error| error.to_string());
    if let Err(text) = &committed {
        tracing::error!(error = %text, "the client's database could not commit");
    }
    for job in group.drain(..) {
        job.work.answer(committed.clone());
    }
}

fn transact(store: &mut Store, durable: bool, group: &mut [Job]) -> Result<(), Error> {
    store.begin(durable)?;
    let mut outcome = Ok(());
    for job in group {
        outcome = store.savepoint();
        if outcome.is_err() {
            break;
        }
        let keep = job.work.run(store);
        outcome = store.release(keep);
        if outcome.is_err() {
            break;
        }
    }
    match outcome {
        Ok(()) => store.commit(),
        Err(error) => {
            store.roll_back();
            Err(error)
        }
    }
}
