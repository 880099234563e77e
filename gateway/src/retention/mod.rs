//! How long what is in the log is kept: looks at one conversation after the other and moves its beginning.
//!
//! - [`policy`] says what is kept of which conversation, [`clock`] what time it is beyond doubt; both are pure.
//!   [`sweep`] walks over a shard's conversations, slowly, and asks the shard to move their marks.
//! - The mark is moved by a commit of the shard like everything else: all or nothing, and readers see it when it is on
//!   disk. Readers who were not that far get an explicit gap.
//! - Nothing is kept shorter than configured: a clock that jumps takes nothing away (see [`clock`]).
//!
//! Not here: giving the space back (the store's), telling readers (`conversation`, `receipt`).

pub mod clock;
pub mod policy;
pub mod sweep;
