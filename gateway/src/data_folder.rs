//! The data folder: where everything lies that must survive the process.
//!
//! ```text
//! fulmar-data/
//!   fulmar.toml          configuration, if the operator puts it here
//!   LOCK                 held by the one process that uses the folder
//!   live.connections     who is connected, while a gateway runs and after it was killed
//!   folder.id            what the folder calls itself: clients keep numbers and cursors of this log only
//!   store/               the log; the store's own layout
//!   tls/cert.pem         self-signed certificate, for trying things out
//!   tls/key.pem          its private key
//!   keys/dev.pem         Ed25519 key (PKCS#8) that signs the tokens of `fulmar token`
//!   keys/dev.pub.pem     its public half
//!   keys/ticket.key      authenticates session tickets
//!   keys/reset.key       lets a restarted gateway tell its phones that their connections are gone
//!   keys/token.key       seals QUIC's address validation tokens
//!   keys/cid.key         recognises our own connection ids
//! ```
//!
//! - What is there is never overwritten; what is missing is made. Two processes starting at once agree on one key. Only
//!   `folder.id` is drawn again when the log is gone: the numbers of the next one mean something else.
//! - No file is ever half there: it is written beside its place, synced, and renamed into it. Only `live.connections` is news, not
//!   a possession: written in place, without a sync, and believed as far as its checksums go ([`crate::accept::book`]).
//! - Private files are readable by their owner only, from the moment they exist.
//! - Every error is one line that says what to do.
//!
//! Not here: what the store keeps in `store/`, and who may sign tokens of which app ([`crate::identity::token`]).

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, EncodePublicKey as _};
use ed25519_dalek::{SigningKey, VerifyingKey};
use fulmar_protocol::id::FolderId;
use rustix::fs::{FlockOperation, RenameFlags};

/// 2026-01-01T00:00:00Z: an earlier clock has not been set.
const CLOCK_FLOOR: Duration = Duration::from_secs(1_767_225_600);

/// Bytes of each symmetric key.
const KEY_BYTES: usize = 64;

/// Bytes of a file of ours we are ready to read: certificates and keys are far smaller.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Validity of the self-signed certificate, in years.
const CERTIFICATE_YEARS: i32 = 20;

/// The data folder can't be used; one line that says why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FolderError(String);

/// The keys behind QUIC's stateless parts. They outlive the process, or a restarted gateway could not tell phones
/// that it is a new one, and would take minutes to be rid of their old connections.
#[derive(Clone)]
pub struct EndpointKeys {
    /// Of stateless reset tokens.
    pub reset: [u8; KEY_BYTES],
    /// Of address validation tokens.
    pub token: [u8; KEY_BYTES],
    /// Of connection ids: packets with an id of an earlier process are answered with a reset, others are dropped.
    pub connection_id: u64,
}

impl fmt::Debug for EndpointKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointKeys").finish_non_exhaustive()
    }
}

/// The key that signs development tokens.
#[derive(Clone)]
pub struct DevKey {
    /// Its id, derived from its public half: `dev-` and 16 hexadecimal digits.
    pub kid: String,
    /// Signs.
    pub signing: SigningKey,
}

impl fmt::Debug for DevKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevKey").field("kid", &self.kid).finish_non_exhaustive()
    }
}

impl DevKey {
    fn new(signing: SigningKey) -> Self {
        Self { kid: kid_of(&signing.verifying_key()), signing }
    }

    /// The private half as PKCS#8 DER, as signers of tokens want it.
    ///
    /// # Errors
    /// The key has no encoding; one that was read or made here has.
    pub fn to_der(&self) -> Result<Vec<u8>, FolderError> {
        let der = self.signing.to_pkcs8_der();
        Ok(der
            .map_err(|e| FolderError(format!("the development key can't be encoded: {e}")))?
            .as_bytes()
            .to_vec())
    }
}

fn kid_of(public: &VerifyingKey) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, public.as_bytes());
    let mut kid = String::from("dev-");
    for byte in digest.as_ref().iter().take(8) {
        kid.push_str(&format!("{byte:02x}"));
    }
    kid
}

/// Held while the folder is in use; dropping it, or the end of the process however it comes, lets go.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

/// A data folder that has everything a gateway needs.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    /// Whether the folder's keys were made just now.
    pub first_start: bool,
    /// Of session tickets.
    pub ticket_key: TicketSecret,
    /// Of the QUIC endpoint.
    pub endpoint_keys: EndpointKeys,
    /// Of development tokens.
    pub dev_key: DevKey,
}

/// The secret that authenticates session tickets.
#[derive(Clone)]
pub struct TicketSecret(pub [u8; KEY_BYTES]);

impl fmt::Debug for TicketSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketSecret(..)")
    }
}

impl DataFolder {
    /// Makes what is missing and reads the keys. `names` go into the self-signed certificate if it is made now.
    ///
    /// # Errors
    /// One line: the clock is not set, the parent is missing, not writable, no space, a damaged key.
    pub fn prepare(path: &Path, names: &[String]) -> Result<Self, FolderError> {
        clock_is_set(SystemTime::now())?;
        make_folder(path, true)?;
        for part in ["store", "tls", "keys"] {
            make_folder(&path.join(part), false)?;
        }
        let first_start = !path.join("keys/ticket.key").exists();
        prepare_certificate(path, names)?;
        let dev_key = dev_key(path)?;
        let mut cid = [0; 8];
        symmetric_key(path, "cid.key", &mut cid, "phones notice the next restart later")?;
        let mut keys =
            EndpointKeys { reset: [0; 64], token: [0; 64], connection_id: u64::from_le_bytes(cid) };
        symmetric_key(path, "reset.key", &mut keys.reset, "phones notice the next restart later")?;
        symmetric_key(path, "token.key", &mut keys.token, "the next connects take a round trip more")?;
        let mut ticket = [0; KEY_BYTES];
        symmetric_key(path, "ticket.key", &mut ticket, "sessions authenticate with a token once more")?;
        Ok(Self {
            path: path.to_owned(),
            first_start,
            ticket_key: TicketSecret(ticket),
            endpoint_keys: keys,
            dev_key,
        })
    }

    /// Claims the folder for this process.
    ///
    /// # Errors
    /// Another process has it.
    pub fn lock(&self) -> Result<FolderLock, FolderError> {
        let path = self.path.join("LOCK");
        let failed = |e: io::Error| explain(&e, "lock the data folder with", &path);
        let options = &mut OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut owner = String::new();
                let _ = (&mut file).take(20).read_to_string(&mut owner);
                let owner = match owner.trim() {
                    "" => String::new(),
                    pid => format!(" (process {pid})"),
                };
                return Err(FolderError(format!(
                    "data folder {} is in use by another fulmar{owner}: stop that one, or give this one its own with \
                     --data",
                    self.path.display()
                )));
            }
            Err(e) => return Err(failed(e.into())),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
        Ok(FolderLock { _file: file })
    }

    /// What the folder calls itself, drawn when its log is begun. To be asked before the log is opened, by the process that
    /// has the lock. `elsewhere`: the log is not on this disk.
    ///
    /// # Errors
    /// One line: not readable or writable, no space, damaged.
    pub fn identity(&self, elsewhere: bool) -> Result<FolderId, FolderError> {
        let path = self.path.join("folder.id");
        if !elsewhere && !self.store().join("FORMAT").exists() {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(explain(&e, "remove", &path)),
                _ => {}
            }
        }
        let mut id = [0; 16];
        random_file(&path, &mut id, "clients that know this gateway then refuse it")?;
        Ok(FolderId(id))
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the store lives.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Who is connected ([`crate::accept::book`]).
    #[must_use]
    pub fn live_connections(&self) -> PathBuf {
        self.path.join("live.connections")
    }

    /// The self-signed certificate.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.path.join("tls/cert.pem")
    }

    /// The private key of the self-signed certificate.
    #[must_use]
    pub fn certificate_key(&self) -> PathBuf {
        self.path.join("tls/key.pem")
    }
}

/// The development key of a folder, made if it is missing, together with the folder itself. Needs no lock: `fulmar token`
/// uses it beside a running gateway.
///
/// # Errors
/// As [`DataFolder::prepare`].
pub fn open_dev_key(path: &Path) -> Result<DevKey, FolderError> {
    clock_is_set(SystemTime::now())?;
    make_folder(path, true)?;
    make_folder(&path.join("keys"), false)?;
    dev_key(path)
}

/// Refuses a clock from before this program was written.
///
/// # Errors
/// The clock shows a time before 2026.
pub fn clock_is_set(now: SystemTime) -> Result<(), FolderError> {
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    if since_epoch >= CLOCK_FLOOR {
        return Ok(());
    }
    let year = (1970 + since_epoch.as_secs() / 31_556_952).min(2025);
    Err(FolderError(format!(
        "the system clock is not set (it shows the year {year}): set it and start again; message times, tokens and \
         certificates depend on it"
    )))
}

fn make_folder(path: &Path, is_root: bool) -> Result<(), FolderError> {
    match std::fs::create_dir(path) {
        Ok(()) => {
            let parent =
                path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
            sync_folder(parent)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(FolderError(format!(
            "{} is a file, and a folder is needed there: move it away, or choose another data folder with --data",
            path.display()
        ))),
        Err(e) if e.kind() == io::ErrorKind::NotFound && is_root => {
            let parent = path.parent().unwrap_or_else(|| Path::new("/"));
            Err(FolderError(format!(
                "can't make data folder {}: its parent {} does not exist; make that first, or choose another with --data",
                path.display(),
                parent.display()
            )))
        }
        Err(e) => Err(explain(&e, "make", path)),
    }
}

/// What to do about a failed file operation.
fn explain(error: &io::Error, doing: &str, path: &Path) -> FolderError {
    let path = path.display();
    let user = rustix::process::geteuid().as_raw();
    FolderError(match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "can't {doing} {path}: user {user} may not; give it the data folder (chown -R {user}) or choose another with \
             --data"
        ),
        io::ErrorKind::ReadOnlyFilesystem => {
            format!(
                "can't {doing} {path}: the file system is read-only; choose a data folder elsewhere with --data"
            )
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!(
                "can't {doing} {path}: no space is left; free some, or choose a data folder elsewhere with --data"
            )
        }
        io::ErrorKind::NotADirectory => {
            format!(
                "can't {doing} {path}: a part of the path is a file; choose another data folder with --data"
            )
        }
        _ => format!(
            "can't {doing} {path}: {error}; check the disk, or choose another data folder with --data"
        ),
    })
}

fn sync_folder(path: &Path) -> Result<(), FolderError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| explain(&e, "sync folder", path))
}

/// Who may read a file.
#[derive(Clone, Copy)]
enum Access {
    Owner,
    Everybody,
}

/// Puts a whole file in its place unless there is one; `false` when there was.
fn write_new(path: &Path, bytes: &[u8], access: Access) -> Result<bool, FolderError> {
    if path.exists() {
        return Ok(false);
    }
    let mut random = [0; 8];
    fill_random(&mut random)?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("file");
    let beside = path.with_file_name(format!(".{name}.{:016x}", u64::from_le_bytes(random)));
    let mode = match access {
        Access::Owner => 0o600,
        Access::Everybody => 0o644,
    };
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| rename_new(&beside, path));
    match written {
        Ok(true) => sync_folder(path.parent().unwrap_or_else(|| Path::new("."))).map(|()| true),
        Ok(false) => {
            let _ = std::fs::remove_file(&beside);
            Ok(false)
        }
        Err(e) => {
            let _ = std::fs::remove_file(&beside);
            Err(explain(&e, "write", path))
        }
    }
}

/// Renames unless the target is there; `false` when it is.
fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        // The file system does not know the flag: a hard link refuses an existing target as well.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            match std::fs::hard_link(from, to) {
                Ok(()) => std::fs::remove_file(from).map(|()| true),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(e),
            }
        }
        Err(e) => Err(e.into()),
    }
}

fn fill_random(bytes: &mut [u8]) -> Result<(), FolderError> {
    getrandom::fill(bytes).map_err(|e| FolderError(format!("the system gives no random numbers: {e}")))
}

fn read_whole(path: &Path) -> Result<Vec<u8>, FolderError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes))
        .map_err(|e| explain(&e, "read", path))?;
    Ok(bytes)
}

/// Reads a key, or makes it.
fn symmetric_key(folder: &Path, name: &str, key: &mut [u8], if_deleted: &str) -> Result<(), FolderError> {
    random_file(&folder.join("keys").join(name), key, if_deleted)
}

/// Reads a file of random bytes, or makes it.
fn random_file(path: &Path, key: &mut [u8], if_deleted: &str) -> Result<(), FolderError> {
    fill_random(key)?;
    if write_new(path, key, Access::Owner)? {
        return Ok(());
    }
    let bytes = read_whole(path)?;
    if bytes.len() != key.len() {
        return Err(FolderError(format!(
            "{} is damaged ({} bytes, not {}): restore it, or delete it to have a new one made ({if_deleted})",
            path.display(),
            bytes.len(),
            key.len()
        )));
    }
    key.copy_from_slice(&bytes);
    Ok(())
}

fn dev_key(folder: &Path) -> Result<DevKey, FolderError> {
    let path = folder.join("keys/dev.pem");
    let mut seed = [0; 32];
    fill_random(&mut seed)?;
    let fresh = SigningKey::from_bytes(&seed);
    let encoding = |e: &dyn fmt::Display| FolderError(format!("the development key can't be encoded: {e}"));
    let pem = fresh.to_pkcs8_pem(LineEnding::LF).map_err(|e| encoding(&e))?;
    let signing = if write_new(&path, pem.as_bytes(), Access::Owner)? {
        fresh
    } else {
        let damaged = || {
            FolderError(format!(
                "{} is not an Ed25519 private key (PKCS#8 PEM): restore it, or delete it to have a new one made \
                 (tokens of `fulmar token` must be made again)",
                path.display()
            ))
        };
        let text = String::from_utf8(read_whole(&path)?).map_err(|_| damaged())?;
        SigningKey::from_pkcs8_pem(&text).map_err(|_| damaged())?
    };
    let public = signing.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|e| encoding(&e))?;
    write_new(&folder.join("keys/dev.pub.pem"), public.as_bytes(), Access::Everybody)?;
    Ok(DevKey::new(signing))
}

/// The key first, then the certificate that is worth nothing without it.
fn prepare_certificate(folder: &Path, names: &[String]) -> Result<(), FolderError> {
    let certificate_path = folder.join("tls/cert.pem");
    if certificate_path.exists() {
        return Ok(());
    }
    let failed = |e: &dyn fmt::Display| FolderError(format!("can't make a self-signed certificate: {e}"));
    let key_path = folder.join("tls/key.pem");
    let fresh = rcgen::KeyPair::generate().map_err(|e| failed(&e))?;
    let key = if write_new(&key_path, fresh.serialize_pem().as_bytes(), Access::Owner)? {
        fresh
    } else {
        let text = String::from_utf8_lossy(&read_whole(&key_path)?).into_owned();
        rcgen::KeyPair::from_pem(&text).map_err(|e| {
            FolderError(format!(
                "{} is not a private key ({e}): restore it, or delete it to have a new one made",
                key_path.display()
            ))
        })?
    };
    let mut params = rcgen::CertificateParams::new(certificate_names(names)).map_err(|e| failed(&e))?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "Fulmar gateway, self-signed");
    // A day back: the clock of a phone may be behind ours.
    params.not_before = rcgen::date_time_ymd(2025, 12, 31);
    params.not_after = rcgen::date_time_ymd(2026 + CERTIFICATE_YEARS, 1, 1);
    let certificate = params.self_signed(&key).map_err(|e| failed(&e))?;
    write_new(&certificate_path, certificate.pem().as_bytes(), Access::Everybody)?;
    Ok(())
}

/// localhost in all its forms, this host, and what was configured; each once.
fn certificate_names(configured: &[String]) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    let uname = rustix::system::uname();
    let host = uname.nodename().to_str().unwrap_or_default();
    let host_is_usable =
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'));
    for name in configured.iter().map(String::as_str).chain(host_is_usable.then_some(host)) {
        if !names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            names.push(name.to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn snapshot(path: &Path) -> Vec<(PathBuf, Vec<u8>, u32)> {
        let mut files = Vec::new();
        for part in ["tls", "keys"] {
            for entry in std::fs::read_dir(path.join(part)).unwrap() {
                let path = entry.unwrap().path();
                let mode = path.metadata().unwrap().permissions().mode() & 0o777;
                files.push((path.clone(), std::fs::read(&path).unwrap(), mode));
            }
        }
        files.sort();
        files
    }

    #[test]
    fn first_start_makes_everything_and_the_second_changes_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let first = DataFolder::prepare(&path, &["chat.example".to_owned()]).unwrap();
        assert!(first.first_start);
        let before = snapshot(&path);
        let names: Vec<&str> =
            before.iter().map(|(p, _, _)| p.strip_prefix(&path).unwrap().to_str().unwrap()).collect();
        assert_eq!(
            names,
            [
                "keys/cid.key",
                "keys/dev.pem",
                "keys/dev.pub.pem",
                "keys/reset.key",
                "keys/ticket.key",
                "keys/token.key",
                "tls/cert.pem",
                "tls/key.pem"
            ]
        );
        for (path, _, mode) in &before {
            let public = path.ends_with("dev.pub.pem") || path.ends_with("cert.pem");
            assert_eq!(*mode, if public { 0o644 } else { 0o600 }, "{}", path.display());
        }
        let second = DataFolder::prepare(&path, &[]).unwrap();
        assert!(!second.first_start);
        assert_eq!(snapshot(&path), before);
        assert_eq!(second.ticket_key.0, first.ticket_key.0);
        assert_eq!(second.endpoint_keys.reset, first.endpoint_keys.reset);
        assert_eq!(second.endpoint_keys.token, first.endpoint_keys.token);
        assert_eq!(second.endpoint_keys.connection_id, first.endpoint_keys.connection_id);
        assert_ne!(first.endpoint_keys.reset, first.endpoint_keys.token);
        assert_eq!(second.dev_key.kid, first.dev_key.kid);
        assert_eq!(open_dev_key(&path).unwrap().kid, first.dev_key.kid);
    }

    #[test]
    fn starts_at_the_same_time_agree_on_one_set_of_keys() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let folders: Vec<DataFolder> = std::thread::scope(|scope| {
            let starts: Vec<_> =
                (0..4).map(|_| scope.spawn(|| DataFolder::prepare(&path, &[]).unwrap())).collect();
            starts.into_iter().map(|s| s.join().unwrap()).collect()
        });
        for folder in &folders {
            assert_eq!(folder.dev_key.kid, folders[0].dev_key.kid);
            assert_eq!(folder.ticket_key.0, folders[0].ticket_key.0);
        }
        assert_eq!(snapshot(&path).len(), 8, "no file is left beside its place");
    }

    #[test]
    fn a_folder_keeps_its_name_as_long_as_it_keeps_its_log() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let prepare = || DataFolder::prepare(&path, &[]).unwrap();
        let never_begun = prepare().identity(false).unwrap();
        let kept = prepare().identity(false).unwrap();
        assert_ne!(kept, never_begun, "a start that did not come as far as the log");
        std::fs::write(path.join("store/FORMAT"), "the log is there").unwrap();
        for _ in 0..2 {
            assert_eq!(prepare().identity(false).unwrap(), kept);
        }
        assert_eq!(std::fs::read(path.join("folder.id")).unwrap(), kept.0);
        std::fs::remove_file(path.join("store/FORMAT")).unwrap();
        assert_eq!(prepare().identity(true).unwrap(), kept, "the log is elsewhere");
        assert_ne!(prepare().identity(false).unwrap(), kept, "the log is gone");
        std::fs::write(path.join("folder.id"), "short").unwrap();
        let error = prepare().identity(true).unwrap_err().to_string();
        assert!(error.contains("folder.id is damaged (5 bytes, not 16)"), "{error}");
    }

    #[test]
    fn the_second_process_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let folder = DataFolder::prepare(&path, &[]).unwrap();
        let held = folder.lock().unwrap();
        let error = folder.lock().unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "data folder {} is in use by another fulmar (process {}): stop that one, or give this one its own with \
                 --data",
                path.display(),
                std::process::id()
            )
        );
        drop(held);
        folder.lock().unwrap();
    }

    #[test]
    fn bad_folders_are_refused_in_one_sentence() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        let damage = |folder: &str, file: &str, bytes: &[u8]| {
            DataFolder::prepare(&at(folder), &[]).unwrap();
            std::fs::write(at(folder).join(file), bytes).unwrap();
        };
        damage("short", "keys/ticket.key", b"short");
        damage("text", "keys/dev.pem", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
        damage("tls", "tls/key.pem", b"nothing");
        std::fs::remove_file(at("tls/tls/cert.pem")).unwrap();
        let shown = |name: &str| at(name).display().to_string();
        for (path, want) in [
            (
                at("none/data"),
                format!(
                    "can't make data folder {}: its parent {} does not exist; make that first, or choose another with \
                     --data",
                    shown("none/data"),
                    shown("none")
                ),
            ),
            (
                at("file"),
                format!(
                    "{} is a file, and a folder is needed there: move it away, or choose another data folder with --data",
                    shown("file")
                ),
            ),
            (
                at("file/data"),
                format!(
                    "can't make {}: a part of the path is a file; choose another data folder with --data",
                    shown("file/data")
                ),
            ),
            (
                at("short"),
                format!(
                    "{} is damaged (5 bytes, not 64): restore it, or delete it to have a new one made (sessions \
                     authenticate with a token once more)",
                    shown("short/keys/ticket.key")
                ),
            ),
            (
                at("text"),
                format!(
                    "{} is not an Ed25519 private key (PKCS#8 PEM): restore it, or delete it to have a new one made \
                     (tokens of `fulmar token` must be made again)",
                    shown("text/keys/dev.pem")
                ),
            ),
        ] {
            assert_eq!(DataFolder::prepare(&path, &[]).unwrap_err().to_string(), want);
        }
        let error = DataFolder::prepare(&at("tls"), &[]).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{} is not a private key (", shown("tls/tls/key.pem"))),
            "{error}"
        );
    }

    #[test]
    fn failed_writes_say_what_to_do() {
        let user = rustix::process::geteuid().as_raw();
        for (kind, want) in [
            (
                io::ErrorKind::PermissionDenied,
                format!(
                    "can't write /d/k: user {user} may not; give it the data folder (chown -R {user}) or choose another \
                     with --data"
                ),
            ),
            (
                io::ErrorKind::StorageFull,
                "can't write /d/k: no space is left; free some, or choose a data folder elsewhere with --data".to_owned(),
            ),
            (
                io::ErrorKind::ReadOnlyFilesystem,
                "can't write /d/k: the file system is read-only; choose a data folder elsewhere with --data".to_owned(),
            ),
        ] {
            assert_eq!(explain(&kind.into(), "write", Path::new("/d/k")).to_string(), want);
        }
    }

    #[test]
    fn an_unset_clock_is_refused() {
        for (seconds, want) in [
            (0, Some(1970)),
            (1_000_000_000, Some(2001)),
            (CLOCK_FLOOR.as_secs() - 1, Some(2025)),
            (CLOCK_FLOOR.as_secs(), None),
        ] {
            let result = clock_is_set(UNIX_EPOCH + Duration::from_secs(seconds));
            let want = want.map(|year| {
                format!(
                    "the system clock is not set (it shows the year {year}): set it and start again; message times, \
                     tokens and certificates depend on it"
                )
            });
            assert_eq!(result.err().map(|e| e.to_string()), want);
        }
    }

    #[test]
    fn the_certificate_names_this_host_once() {
        let names =
            certificate_names(&["LOCALHOST".to_owned(), "a.example".to_owned(), "a.example".to_owned()]);
        assert_eq!(names.iter().filter(|n| n.eq_ignore_ascii_case("localhost")).count(), 1);
        assert_eq!(names.iter().filter(|n| *n == "a.example").count(), 1);
        assert!(names.contains(&"::1".to_owned()));
    }
}
