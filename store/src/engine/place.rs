//! Tells an index that was written where it is from one that was copied there.
//!
//! - The files of an engine make sense together only as they were at one moment. A copy of a folder that was in use has them from
//!   several moments, and an engine may open it and miss rows. So an index that was copied is not used: it is made again.
//! - A file in the index' folder holds when it was itself created, by the file system's own clock (its inode, where the file
//!   system keeps no such time). A copy of the file is created at another time; renaming keeps it, and so do snapshots of a
//!   whole disk, which are of one moment.
//!
//! Not here: making an index again (`shard::index`).

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    time::UNIX_EPOCH,
};

const NAME: &str = "place";

/// Notes that the index in the folder `index` was written here.
pub(crate) fn note(index: &Path) -> io::Result<()> {
    let path = index.join(NAME);
    let mut file = File::create(&path)?;
    let text = told_by(&file)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Whether the index in the folder `index` was written here.
pub(crate) fn is_here(index: &Path) -> io::Result<bool> {
    let path = index.join(NAME);
    let said = match fs::read(&path) {
        Ok(said) => said,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(said == told_by(&File::open(&path)?)?.as_bytes())
}

/// Lets the index in the folder `index` be taken for a copy. Nothing happens if there is none.
pub(crate) fn forget(index: &Path) -> io::Result<()> {
    match fs::remove_file(index.join(NAME)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn told_by(file: &File) -> io::Result<String> {
    let data = file.metadata()?;
    Ok(match data.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
        Some(at) => format!("created {}\n", at.as_nanos()),
        None => format!("inode {}\n", data.ino()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_told_from_what_was_renamed() {
        let folder = tempfile::tempdir().unwrap();
        let (index, moved, copied) =
            (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
        fs::create_dir(&index).unwrap();
        assert!(!is_here(&index).unwrap(), "nothing is noted yet");
        note(&index).unwrap();
        assert!(is_here(&index).unwrap());
        fs::create_dir(&copied).unwrap();
        fs::copy(index.join(NAME), copied.join(NAME)).unwrap();
        assert!(!is_here(&copied).unwrap());
        fs::rename(&index, &moved).unwrap();
        assert!(is_here(&moved).unwrap());
        forget(&moved).unwrap();
        assert!(!is_here(&moved).unwrap());
        forget(&moved).unwrap();
    }
}
