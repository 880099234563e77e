//! The log of Fulmar: what is acknowledged is in it for good.
//!
//! A data folder has a fixed number of shards. A shard is one commit log and the tables that are made from it:
//!
//! - [`ShardWriter::commit`] takes a batch of operations ([`Op`]), all or nothing. When it answers `Ok`, the batch is
//!   durable and every reader sees it. One writer per shard, one commit in flight.
//! - [`ShardReader`] reads conversations, members, users, devices and cursors, from any thread.
//! - What can't be verified is refused with a report, never served.
//!
//! ```
//! use fulmar_protocol::id::{AppId, UnixMillis};
//! use fulmar_store::{EngineKind, Op, Store, StoreOptions, User};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = StoreOptions { engine: EngineKind::Memory, ..StoreOptions::default() };
//! let store = Store::open("unused", &options)?;
//! let app = AppId::of("demo");
//! let (mut writer, reader) = store.shard(store.shard_of_user(app, "alice"))?;
//!
//! let alice = reader.allocate_user().ok_or("no more numbers")?;
//! let row = User { app, name: "alice".to_owned(), created: UnixMillis::default() };
//! writer.commit(&[Op::NameUser { user: alice, row }]).await?;
//! assert_eq!(reader.user_by_name(app, "alice")?, Some(alice));
//! store.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! `docs/storage.md` describes every byte on disk, the order of writes, and recovery.
//!
//! Not here: who may do what, sequence numbers (the gateway gives them, this crate checks them), the wire.

mod codec;
mod cold;
mod commit;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "payloads made of small numbers")]
mod conformance;
mod engine;
mod error;
mod files;
mod format;
mod key;
mod log;
mod maintain;
mod op;
mod reader;
mod record;
mod retention;
mod row;
mod segment;
mod shard;
mod store;
mod writer;

pub use codec::Malformed;
pub use cold::ColdOptions;
pub use commit::{ChainHash, Commit, CommitId};
pub use error::{CommitError, OpenError, ReadError};
pub use files::memory::MemoryDisk;
pub use format::FORMAT_VERSION;
pub use log::{Log, Writer};
pub use maintain::{
    MaintainError, Progress,
    backup::{BackupReport, ShardCopied, backup},
    export::{ExportOptions, ExportReport, ExportTo, Numbers, export},
    import::{ImportOptions, ImportReport, import},
    inspect::{FolderStats, ShardFigures, Tier, inspect},
    salvage::{Lost, SalvageReport, ShardSalvaged, salvage},
    scrub::{ScrubReport, scrub},
    verify::{PROBLEMS_MAX, Problem, Repair, ShardVerified, VerifyReport, verify},
};
pub use maintain::{
    compact::{CompactReport, compact},
    migrate::{MigrateReport, migrate},
    upgrade::{UpgradeReport, upgrade},
};
pub use op::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Batch, Op};
pub use reader::ShardReader;
pub use record::{RECORD_HEADER_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX, Record, RecordKind};
pub use retention::{RetentionLimits, RetentionMark};
pub use row::{
    ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, PendingLink, Role, User,
};
pub use shard::{ShardStats, view::Limits};
pub use store::{Durability, EngineKind, ShardError, Store, StoreOptions};
pub use writer::{Committed, EmbeddedWriter, ShardWriter};

#[cfg(test)]
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
