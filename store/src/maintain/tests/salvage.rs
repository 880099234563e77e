//! Folders that are saved from damage.

use super::*;
use crate::maintain::{MaintainError, salvage::salvage};

fn saved(from: &Path, to: &Path) -> crate::SalvageReport {
    salvage(from, to, &mut |_| {}).unwrap()
}

/// Proves and opens what was saved: all it serves is what was written. Returns (low, head, notices) of the conversations of a
/// shard.
fn checked(to: &Path, at: u16) -> Vec<(u64, u64, u64)> {
    sound(to);
    let folder = tempfile::tempdir().unwrap();
    copy(to, folder.path());
    let mut found = Vec::new();
    {
        let store = open(folder.path(), EngineKind::Sled);
        let (mut writer, reader) = store.shard(shard(at)).unwrap();
        let mut batch = Vec::new();
        for local in 1..=CONVERSATIONS {
            let c = conversation(at, local);
            let head = reader.head(c).unwrap().unwrap_or_default();
            let records = reader.records(c, Seq::FIRST, seq(1 << 40), ALL).unwrap();
            assert_eq!(records.len() as u64, head.seq.since(head.low), "{c}");
            let mut notices = 0;
            for record in &records {
                if record.kind == RecordKind::Notice {
                    notices += 1;
                } else {
                    assert_eq!(*record, super::record(c, record.seq.get()));
                }
            }
            assert_eq!(reader.members(c, None, usize::MAX).unwrap().len() as u64, head.members);
            found.push((head.low.get(), head.seq.get(), notices));
            batch.push(append(c, head.seq.get() + 1));
            batch.push(Op::Member { conversation: c, user: user(0, 1), row: None });
        }
        let fresh = reader.allocate_user().unwrap();
        assert!(fresh.get() > user(at, 5).get() || found.iter().all(|(_, head, _)| *head == 0), "{fresh}");
        write(&mut writer, &batch);
        store.close().unwrap();
    }
    sound(folder.path());
    found
}

#[test]
fn nothing_is_lost_of_a_sound_folder() {
    for (engine, rounds, close) in
        [(EngineKind::Sled, 0, false), (EngineKind::Sled, 45, false), (EngineKind::Fjall, 45, true)]
    {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), engine, rounds, close);
        let to = tempfile::tempdir().unwrap();
        let report = saved(folder.path(), to.path());
        assert_eq!((report.lost.as_slice(), report.lost_records), (&[][..], 0));
        for shard in &report.shards {
            assert!(shard.damage.is_empty() && shard.rows_made_again == 0, "{shard:?}");
            let commits = commits(rounds, close);
            assert_eq!((shard.last_commit, shard.acknowledged), (commits, commits));
        }
        sound(to.path());
        if rounds > 0 {
            let store = open(to.path(), engine);
            for at in 0..2 {
                compare(&store.reader(shard(at)).unwrap(), at, rounds);
            }
        }
        sound(folder.path());
        assert!(matches!(
            salvage(folder.path(), to.path(), &mut |_| {}),
            Err(MaintainError::NotEmpty { .. })
        ));
    }
}

#[test]
fn whatever_byte_is_damaged_what_is_saved_is_sound_and_true() {
    let original = tempfile::tempdir().unwrap();
    make(original.path(), EngineKind::Sled, 45, false);
    let source = original.path().join("shard-001");
    let mut files =
        vec![source.join("manifest"), source.join("tip"), files_of(&source, ".log").pop().unwrap()];
    // One that a merge was just beginning may be empty.
    let named = files_of(&source, ".seg").into_iter().filter(|file| fs::metadata(file).unwrap().len() > 200);
    files.extend(named.step_by(3));
    for file in files {
        let length = written(&file);
        for n in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            copy(original.path(), folder.path());
            let damaged = folder.path().join("shard-001").join(file.file_name().unwrap());
            let at = (n * length / 4 + n * 7).min(length - 1);
            flip(&damaged, at);
            let before = fs::read(&damaged).unwrap();
            let to = tempfile::tempdir().unwrap();
            let report = saved(folder.path(), to.path());
            assert_eq!(before, fs::read(&damaged).unwrap());
            let found = checked(to.path(), 1);
            let whole = checked(to.path(), 0);
            assert!(whole.iter().all(|found| *found == (low_after(45), 180, 0)), "{whole:?}");
            let said: u64 = report.lost.iter().map(|lost| lost.seqs.1.since(lost.seqs.0) + 1).sum();
            assert_eq!(said, report.lost_records);
            let missing: u64 =
                found.iter().map(|(low, _, notices)| low - low_after(45).min(*low) + notices).sum();
            assert!(said >= missing, "{said} told, {missing} missing: {report:#?}");
            if found.iter().any(|found| *found != (low_after(45), 180, 0)) {
                assert!(!report.shards[1].damage.is_empty(), "byte {at} of {file:?}: {report:#?}");
            }
        }
    }
}

/// A run of the first conversation, in the last segment or in one in the middle that retention left, by where its bytes lie.
fn run_of(folder: &Path, last: bool) -> (PathBuf, usize, u64, u64) {
    let files = crate::files::disk::Disk::new(&folder.join("shard-001"));
    let manifest = crate::shard::manifest::Manifest::load(&files, shard(1)).unwrap();
    // How many segments there are, and how many runs in one, depends on when the settler had its turn.
    let mut runs = Vec::new();
    for entry in &manifest.segments {
        let segment = crate::segment::Segment::open(&files, shard(1), entry.id).unwrap();
        let path = folder.join("shard-001").join(crate::segment::name(entry.id));
        for run in segment.runs().map(Result::unwrap).filter(|run| run.conversation == conversation(1, 1)) {
            let at = usize::try_from(run.offset).unwrap() + 9;
            runs.push((path.clone(), at, run.first.get(), run.last().get()));
        }
    }
    runs.sort_by_key(|run| run.2);
    runs.retain(|(.., end)| last || (low_after(45) + 1..180).contains(end));
    let n = if last { runs.len() - 1 } else { runs.len() / 2 };
    runs.swap_remove(n)
}

#[test]
fn of_a_log_with_a_gap_the_newest_part_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 45, true);
    let (file, at, first, last) = run_of(folder.path(), false);
    assert!(last < 180 && last > low_after(45));
    flip(&file, at);
    let to = tempfile::tempdir().unwrap();
    let report = saved(folder.path(), to.path());
    let [lost] = report.lost.as_slice() else { panic!("{report:#?}") };
    assert_eq!((lost.shard, lost.conversation), (1, conversation(1, 1)));
    assert_eq!(lost.seqs, (seq(low_after(45) + 1), seq(last)));
    assert!(lost.what.contains(&format!("records {} to {last}", first.max(low_after(45) + 1))), "{lost:?}");
    let whole = (low_after(45), 180, 0);
    assert_eq!(checked(to.path(), 1), [(last, 180, 0), whole, whole, whole]);
}

#[test]
fn records_missing_at_the_end_keep_their_numbers() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 45, true);
    let (file, at, first, last) = run_of(folder.path(), true);
    assert_eq!(last, 180);
    flip(&file, at);
    let to = tempfile::tempdir().unwrap();
    let report = saved(folder.path(), to.path());
    let [lost] = report.lost.as_slice() else { panic!("{report:#?}") };
    assert_eq!(lost.seqs, (seq(first), seq(180)));
    let whole = (low_after(45), 180, 0);
    assert_eq!(checked(to.path(), 1), [(low_after(45), 180, 180 - first + 1), whole, whole, whole]);
}

#[test]
fn a_folder_without_manifest_marker_or_half_its_log_is_saved_as_far_as_it_goes() {
    let original = tempfile::tempdir().unwrap();
    make(original.path(), EngineKind::Sled, 45, false);
    let whole = (low_after(45), 180, 0);
    let after = |damage: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        copy(original.path(), folder.path());
        damage(folder.path());
        let to = tempfile::tempdir().unwrap();
        let report = saved(folder.path(), to.path());
        (checked(to.path(), 1), report)
    };
    let (found, report) = after(&|path| fs::remove_file(path.join("shard-001/manifest")).unwrap());
    assert_eq!(found, [whole; 4], "{report:#?}");
    let (found, _) = after(&|path| fs::write(path.join("FORMAT"), "nonsense").unwrap());
    assert_eq!(found, [whole; 4]);
    let (found, report) = after(&|path| {
        let log = files_of(&path.join("shard-001"), ".log").pop().unwrap();
        let bytes = fs::read(&log).unwrap();
        fs::write(&log, &bytes[..written(&log) - 3]).unwrap();
    });
    assert_eq!(found, [(low_after(45), 176, 0); 4]);
    assert_eq!((report.shards[1].acknowledged, report.shards[1].last_commit), (48, 47));
    // Only segments are left: numbers go on after theirs.
    let (found, _) = after(&|path| {
        fs::remove_file(path.join("shard-001/manifest")).unwrap();
        for log in files_of(&path.join("shard-001"), ".log") {
            fs::remove_file(log).unwrap();
        }
    });
    assert!(found.iter().all(|(_, head, _)| *head > 0 && *head < 180), "{found:?}");
    let (found, _) = after(&|path| fs::remove_dir_all(path.join("shard-001")).unwrap());
    assert_eq!(found, [(0, 0, 0); 4]);
    // A segment is gone: of most conversations there is a gap, and rows are made again or are older.
    let (found, report) = after(&|path| {
        fs::remove_file(run_of(path, true).0).unwrap();
    });
    assert!(found.iter().all(|(low, head, _)| low < head && *head == 180), "{found:?}");
    assert!(!report.lost.is_empty() && !report.shards[1].damage.is_empty());
}

#[test]
fn a_segment_without_header_footer_and_directory_is_saved_block_by_block() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 45, true);
    for file in files_of(&folder.path().join("shard-001"), ".seg") {
        let mut bytes = fs::read(&file).unwrap();
        let length = bytes.len();
        if length < 200 {
            continue;
        }
        bytes[..64].fill(0x55);
        bytes[length - 128..].fill(0x55);
        bytes.extend_from_slice(b"and more");
        fs::write(file, bytes).unwrap();
    }
    let to = tempfile::tempdir().unwrap();
    let report = saved(folder.path(), to.path());
    assert_eq!(report.lost_records, 0, "{report:#?}");
    assert!(!report.shards[1].damage.is_empty());
    assert_eq!(checked(to.path(), 1), [(low_after(45), 180, 0); 4]);
    let store = open(to.path(), EngineKind::Sled);
    compare(&store.reader(shard(1)).unwrap(), 1, 45);
}

#[test]
fn scrubbing_finds_damage_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 45, true);
    let options = StoreOptions {
        scrub_every: Duration::from_millis(1),
        scrub_bytes_per_second: 1 << 30,
        ..options(EngineKind::Sled)
    };
    let passes = |options: &StoreOptions| {
        let store = Store::open(folder.path(), options).unwrap();
        let stats = || store.stats(shard(1)).unwrap();
        while stats().scrubs < 2 {
            std::thread::yield_now();
        }
        let (mut writer, reader) = store.shard(shard(1)).unwrap();
        let head = reader.head(conversation(1, 2)).unwrap().unwrap();
        write(&mut writer, &[append(conversation(1, 2), head.seq.get() + 1)]);
        stats()
    };
    let stats = passes(&options);
    assert_eq!(stats.scrub_damage, 0);
    assert!(stats.scrubbed_bytes >= stats.segment_bytes, "{stats:?}");
    let (file, at, ..) = run_of(folder.path(), false);
    flip(&file, at);
    let stats = passes(&options);
    assert!(stats.scrub_damage > 0 && stats.failing.is_none(), "{stats:?}");
    let off = StoreOptions { scrub_bytes_per_second: 0, ..options };
    let store = Store::open(folder.path(), &off).unwrap();
    assert_eq!(store.stats(shard(1)).unwrap().scrubs, 0);
}
