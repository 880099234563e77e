//! Copies of folders that are in use.

use std::{
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::*;
use crate::maintain::{MaintainError, backup::backup};

fn taken(from: &Path, to: &Path) -> crate::BackupReport {
    backup(from, to, &mut |_| {}).unwrap()
}

/// Opens a copy of the backup, compares it with the model, and says how many rounds are in it.
fn restored(backup: &Path, at: u16) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    copy(backup, folder.path());
    let store = open(folder.path(), EngineKind::Sled);
    let reader = store.reader(shard(at)).unwrap();
    let rounds = reader.head(conversation(at, 1)).unwrap().unwrap_or_default().seq.get() / 4;
    if rounds > 0 {
        compare(&reader, at, rounds);
    }
    drop(reader);
    // And it can be written to.
    let (mut writer, _) = store.shard(shard(at)).unwrap();
    write(&mut writer, &round_of(at, rounds));
    store.close().unwrap();
    drop(writer);
    drop(store);
    sound(folder.path());
    rounds
}

#[test]
fn a_backup_under_a_busy_writer_has_what_was_acknowledged_and_no_hole() {
    let folder = tempfile::tempdir().unwrap();
    let backups = tempfile::tempdir().unwrap();
    let store = open(folder.path(), EngineKind::Sled);
    let (mut writer, _) = store.shard(shard(1)).unwrap();
    write(&mut writer, &people(1));
    let acked = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let busy = {
        let (acked, stop) = (Arc::clone(&acked), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut round = 0;
            while !stop.load(Ordering::Acquire) && round < 3_000 {
                write(&mut writer, &round_of(1, round));
                round += 1;
                acked.store(round, Ordering::Release);
            }
            round
        })
    };
    while acked.load(Ordering::Acquire) < 30 {
        std::thread::yield_now();
    }
    let mut counts = Vec::new();
    for n in 0..8 {
        // Into one folder again and again, and into a new one.
        let to = backups.path().join(if n % 2 == 0 { "same".to_owned() } else { format!("new {n}") });
        let before = acked.load(Ordering::Acquire);
        let report = taken(folder.path(), &to);
        let after = acked.load(Ordering::Acquire);
        assert!(!sound(&to).shards[1].index_compared);
        // verify has not made it a folder somebody uses.
        let rounds = restored(&to, 1);
        assert!(
            (before..=after + 1).contains(&rounds),
            "{before} acknowledged before, {rounds} in it, {after} after"
        );
        assert_eq!(report.shards[1].last_commit, rounds + 2);
        counts.push(rounds);
    }
    stop.store(true, Ordering::Release);
    let rounds = busy.join().unwrap();
    assert!(counts.is_sorted(), "{counts:?}");
    store.close().unwrap();
    drop(store);
    // When nothing happens, it is everything.
    taken(folder.path(), &backups.path().join("same"));
    assert_eq!(restored(&backups.path().join("same"), 1), rounds);
}

#[test]
fn a_second_backup_takes_only_what_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let backups = tempfile::tempdir().unwrap();
    let to = backups.path().join("backup");
    make(folder.path(), EngineKind::Sled, 40, true);
    let first = taken(folder.path(), &to);
    let linked: u64 = first.shards.iter().map(|shard| shard.linked).sum();
    assert!(linked > 0 && first.shards.iter().all(|shard| shard.kept == 0), "{first:?}");
    let second = taken(folder.path(), &to);
    assert_eq!(second.shards.iter().map(|shard| shard.kept).sum::<u64>(), linked);
    assert!(second.shards.iter().all(|shard| shard.linked == 0 && shard.copied_bytes == 0), "{second:?}");
    // Linked: one file with two names. A copy is kept by what its footer says.
    for file in files_of(&to.join("shard-001"), ".seg") {
        assert_eq!(fs::metadata(&file).unwrap().nlink(), 2);
        let bytes = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        fs::write(&file, bytes).unwrap();
    }
    let third = taken(folder.path(), &to);
    assert_eq!(third.shards.iter().map(|shard| shard.kept).sum::<u64>(), linked);
    // Half a segment is not kept, and neither is what a gateway made of the copy.
    let half = files_of(&to.join("shard-001"), ".seg").remove(0);
    let bytes = fs::read(&half).unwrap();
    fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(taken(folder.path(), &to).shards[1].linked, 1);
    {
        let store = open(&to, EngineKind::Sled);
        let busy = backup(folder.path(), &to, &mut |_| {}).unwrap_err();
        assert!(busy.to_string().contains("in use"), "{busy}");
        let (mut writer, _) = store.shard(shard(0)).unwrap();
        write(&mut writer, &round_of(0, 40));
        store.close().unwrap();
    }
    let anew = taken(folder.path(), &to);
    assert!(anew.shards.iter().all(|shard| shard.kept == 0), "{anew:?}");
    sound(&to);
    assert_eq!((restored(&to, 0), restored(&to, 1)), (40, 40));
    assert_eq!(restored(folder.path(), 0), 40, "the source is as it was");
}

#[test]
fn a_backup_that_can_not_be_right_is_not_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let backups = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 40, false);
    let other = backups.path().join("letters");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("letter.txt"), "dear").unwrap();
    assert!(matches!(backup(folder.path(), &other, &mut |_| {}), Err(MaintainError::NotEmpty { .. })));

    let to = backups.path().join("backup");
    taken(folder.path(), &to);
    assert_eq!(restored(&to, 1), 40, "what is not settled is in it");
    let log = files_of(&folder.path().join("shard-001"), ".log").pop().unwrap();
    flip(&log, 200);
    let refused = backup(folder.path(), &to, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, MaintainError::Damaged { .. }), "{refused}");
    assert!(!to.join("FORMAT").exists());
    assert!(matches!(verify(&to, &mut |_| {}), Err(MaintainError::NoFolder { .. })));
    flip(&log, 200);
    taken(folder.path(), &to);
    sound(&to);
}
