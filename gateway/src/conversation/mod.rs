//! Stage 3: one writer per shard decides, appends, and answers only after the commit is on disk.
//!
//! - [`route`] says which shard; [`shard`] drives it; [`state`] decides, and knows no clock and no disk.
//! - Fan-out and acks see committed records only.
//! - Nothing in here can name a connection: a session is an `Owed` that is told things.
//!
//! Not here: reading history for a client (`receipt`), who a client is (`accept`).

mod command;
mod commit;
mod directory;
pub(crate) mod holds;
mod home;
mod intake;
pub mod route;
pub mod shard;
pub mod state;
mod storage;
mod unhurried;
pub(crate) mod visits;

pub use fulmar_store::ConversationClass;

pub use self::command::{
    Answer, Command, DirectRequest, Found, GroupRequest, KnownCursors, LoggedIn, LoginRequest,
    MembersRequest, Refusal,
};
