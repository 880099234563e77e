//! Which data folder objects belong to.
//!
//! - The file `COLD` in the data folder has a random number, and names the file itself: its number in the file system, and the
//!   time it was made. In a copy of the folder they are others: the copy gets a number of its own, reads the objects it has from
//!   before, and never removes one of them. Otherwise a copy that was only opened to look at it could remove what the
//!   original still needs.
//!
//! Not here: which objects there are (the manifests).

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    time::UNIX_EPOCH,
};

/// The file in the data folder.
const NAME: &str = "COLD";
const NAME_NEW: &str = "COLD.new";

/// Bytes of the file at most.
const BYTES_MAX: u64 = 4096;

/// 64 random bits as hex digits.
pub(crate) fn random() -> io::Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What the data folder at `path` is called in the object store. One that has no name gets one.
pub(crate) fn of(path: &Path) -> io::Result<String> {
    let at = path.join(NAME);
    match fs::metadata(&at) {
        Ok(data) if data.len() <= BYTES_MAX => {
            if let Some((id, file)) = parse(&fs::read_to_string(&at)?) {
                if file == self::file(&data) {
                    return Ok(id);
                }
                tracing::warn!(
                    folder = %path.display(), id,
                    "this data folder is a copy: the objects it has in the cold tier are read, and no longer removed"
                );
            }
        }
        // It is not ours: nothing that it names is removed.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    make(path)
}

fn make(path: &Path) -> io::Result<String> {
    let id = format!("{}{}", random()?, random()?);
    let new = path.join(NAME_NEW);
    let mut file = File::create(&new)?;
    let itself = self::file(&file.metadata()?);
    write!(file, "fulmar cold tier\nid = {id}\nfile = {itself}\n")?;
    file.sync_all()?;
    fs::rename(&new, path.join(NAME))?;
    File::open(path)?.sync_all()?;
    Ok(id)
}

/// Names a file as long as it is not copied.
fn file(data: &fs::Metadata) -> String {
    // Not every file system knows when a file was made.
    let made = data.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    format!("{}-{}", data.ino(), made.map_or(0, |made| made.as_nanos()))
}

fn parse(text: &str) -> Option<(String, String)> {
    let mut lines = text.lines();
    if lines.next() != Some("fulmar cold tier") {
        return None;
    }
    let id = lines.next()?.strip_prefix("id = ")?;
    let file = lines.next()?.strip_prefix("file = ")?;
    let whole = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    whole.then(|| (id.to_owned(), file.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_name_and_a_copy_gets_another() {
        let folder = tempfile::tempdir().unwrap();
        let id = of(folder.path()).unwrap();
        assert_eq!(id.len(), 32);
        assert_eq!(of(folder.path()).unwrap(), id);
        let copy = tempfile::tempdir().unwrap();
        fs::copy(folder.path().join(NAME), copy.path().join(NAME)).unwrap();
        let other = of(copy.path()).unwrap();
        assert_ne!(other, id);
        assert_eq!(of(copy.path()).unwrap(), other);
        fs::write(copy.path().join(NAME), "fulmar cold tier\nid = ..\nfile = x\n").unwrap();
        assert_ne!(of(copy.path()).unwrap(), other);
    }
}
