//! Proving a data folder, and making right what can be made right without losing anything.
//!
//! - The log is never changed: where it is damaged nothing is done but to say so.
//! - Indexes that are wrong are thrown away and made again from the segments, and then everything is proven once more.
//!
//! Not here: what is proven (`verify`), saving what is left of a damaged log (`salvage`).

use std::{fs, path::Path};

use serde::Serialize;

use super::{
    MaintainError, Progress, export, folder,
    verify::{Repair, VerifyReport, verify},
};
use crate::StoreOptions;

/// What [`scrub`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ScrubReport {
    /// What was found at first.
    pub found: VerifyReport,
    /// Shards whose indexes were made again.
    pub made_again: Vec<u16>,
    /// What was found after that; `None` if nothing was done.
    pub after: Option<VerifyReport>,
}

impl ScrubReport {
    /// Nothing is wrong, or no longer.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.after.as_ref().unwrap_or(&self.found).is_sound()
    }
}

/// Proves the data folder at `path`, and makes again the indexes that are wrong. Nobody else may have it open. `options` say
/// how the folder is opened for that; engine and shard count are the folder's.
///
/// # Errors
/// The folder can't be looked at, or an index can't be made again.
pub fn scrub(
    path: impl AsRef<Path>,
    options: &StoreOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ScrubReport, MaintainError> {
    let path = path.as_ref();
    let mut report = ScrubReport { found: verify(path, progress)?, ..ScrubReport::default() };
    if report.found.is_sound() || !report.found.only_indexes() {
        return Ok(report);
    }
    {
        let lock = folder::hold(path)?;
        for problem in &report.found.problems {
            let Some(shard) = problem.shard.filter(|_| problem.repair == Repair::Index) else { continue };
            if report.made_again.contains(&shard) {
                continue;
            }
            let index = path.join(format!("shard-{shard:03}")).join(crate::store::INDEX);
            if index.exists() {
                fs::remove_dir_all(&index).map_err(MaintainError::io("can't remove", &index))?;
            }
            report.made_again.push(shard);
        }
        drop(lock);
    }
    // Opening makes what is missing, and settles; so does every start.
    drop(export::open_to_read(path, options)?);
    report.after = Some(verify(path, progress)?);
    Ok(report)
}
