//! Segments as a whole: round trips, golden bytes, damage.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};

use proptest::prelude::*;

use super::{
    layout::{BLOCK_BYTES, Codec, FOOTER_BYTES, Footer, HEADER_BYTES, Kind},
    *,
};
use crate::{
    files::{Append, Files, ReadAt, Slots, memory::MemoryFiles},
    record::{Record, RecordKind},
};

fn shard() -> ShardId {
    ShardId::new(3).unwrap()
}

fn conversation(n: u64) -> ConversationId {
    ConversationId::new(n).unwrap()
}

fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

/// One record and its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sample {
    conversation: ConversationId,
    record: Record,
    encoded: Bytes,
}

fn sample(conversation: u64, seq: u64, time: u64, payload: impl Into<Bytes>) -> Sample {
    let conversation = ConversationId::new(conversation).unwrap();
    let record = Record {
        seq: Seq::new(seq).unwrap(),
        kind: RecordKind::Message,
        sender: UserId::new(256).unwrap(),
        device: DeviceId::ZERO,
        epoch: Epoch::ZERO,
        pseq: Pseq::ZERO,
        time: UnixMillis::new(time).unwrap(),
        count: seq,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: payload.into(),
    };
    let mut encoded = Vec::new();
    record.encode(conversation, &mut encoded);
    Sample { conversation, record, encoded: encoded.into() }
}

type OwnedRow = (u8, Vec<u8>, Option<Vec<u8>>);

/// Writes a segment; both lists are in order.
fn write(files: &MemoryFiles, id: u64, samples: &[Sample], rows: &[OwnedRow]) -> Summary {
    write_in_blocks(files, id, BLOCK_BYTES, samples, rows)
}

fn write_in_blocks(
    files: &MemoryFiles,
    id: u64,
    body_bytes: usize,
    samples: &[Sample],
    rows: &[OwnedRow],
) -> Summary {
    let mut writer = SegmentWriter::create(files, shard(), id).unwrap().with_bodies_of(body_bytes);
    for s in samples {
        writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded).unwrap();
    }
    for (table, key, row) in rows {
        writer.row(*table, key, row.as_deref()).unwrap();
    }
    writer.finish(id..=id).unwrap()
}

fn read_records(segment: &Segment) -> Vec<Sample> {
    let mut all = Vec::new();
    for run in segment.runs() {
        let run = run.unwrap();
        let bytes = segment.run(&run).unwrap();
        for record in records(&run, &bytes, Seq::ZERO) {
            let (record, encoded) = record.unwrap();
            all.push(Sample { conversation: run.conversation, record, encoded });
        }
    }
    all
}

fn read_rows(segment: &Segment) -> Vec<OwnedRow> {
    segment
        .rows()
        .map(|row| {
            let (table, key, row) = row.unwrap();
            (table, key.to_vec(), row.map(|row| row.to_vec()))
        })
        .collect()
}

fn contents(files: &MemoryFiles, id: u64) -> Vec<u8> {
    let file = files.open(&name(id)).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn put(files: &MemoryFiles, id: u64, bytes: &[u8]) {
    files.create(&name(id)).unwrap().append(bytes).unwrap();
}

/// Looks at everything, by steps of `budget`; returns the damage.
fn verify(segment: &Segment, budget: usize) -> Vec<SegmentDamage> {
    let mut verifier = segment.verifier();
    let mut damage = Vec::new();
    loop {
        match verifier.step(budget) {
            Ok(Progress::More) => {}
            Ok(Progress::Done) => return damage,
            Err(found) => damage.push(found),
        }
    }
}

/// Three runs of two conversations, and three rows.
fn tiny() -> (Vec<Sample>, Vec<OwnedRow>) {
    let samples = vec![
        sample(259, 5, 1_000, &b"hi"[..]),
        sample(259, 6, 1_001, &b"there"[..]),
        sample(259, 9, 1_002, &b""[..]),
        sample(515, 1, 999, &b"!"[..]),
    ];
    let rows = vec![
        (3, vec![0, 1], Some(b"row".to_vec())),
        (3, vec![0, 2], None),
        (4, vec![0, 1], Some(Vec::new())),
    ];
    (samples, rows)
}

#[test]
fn a_segment_comes_back() {
    let files = MemoryFiles::default();
    let samples: Vec<Sample> = (1..400)
        .flat_map(|c| (1..=c % 40).map(move |s| sample(c * 256, s * (1 + s / 30), 5_000 + s, vec![7; 700])))
        .collect();
    let rows: Vec<OwnedRow> = (0..9_000u32)
        .map(|n| (u8::from(n > 5_000), n.to_be_bytes().to_vec(), (n % 3 > 0).then(|| vec![8; 20])))
        .collect();
    let summary = write(&files, 9, &samples, &rows);
    assert_eq!((summary.rows, summary.records), (9_000, samples.len() as u64));
    let segment = Segment::open(&files, shard(), 9).unwrap();
    assert_eq!(segment.summary(), &summary);
    assert_eq!(read_records(&segment), samples);
    assert_eq!(read_rows(&segment), rows);
    assert!(verify(&segment, 10_000).is_empty());
}

#[test]
fn bytes_are_pinned() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    let summary = write(&files, 0x1a, &samples, &rows);
    assert_eq!(name(0x1a), "000000000000001a.seg");
    assert_eq!(crate::hex(&contents(&files, 0x1a)), GOLDEN);
    let segment = Segment::open(&files, shard(), 0x1a).unwrap();
    assert_eq!(segment.summary(), &summary);
    assert_eq!(
        summary,
        Summary {
            shard: shard(),
            id: 0x1a,
            first_commit: 0x1a,
            last_commit: 0x1a,
            runs: 3,
            rows: 3,
            records: 4,
            bytes: GOLDEN.len() as u64 / 2,
            run_bytes: samples.iter().map(|s| s.encoded.len() as u64).sum(),
            newest: UnixMillis::new(1_002).unwrap(),
            oldest: UnixMillis::new(999).unwrap(),
        }
    );
    let runs: Vec<Run> = segment.runs().map(Result::unwrap).collect();
    let places: Vec<_> = runs.iter().map(|r| (r.conversation.get(), r.first.get(), r.count)).collect();
    assert_eq!(places, [(259, 5, 2), (259, 9, 1), (515, 1, 1)]);
}

const GOLDEN: &str = concat!(
    // header: magic, version, codec, shard 3, id; zero; checksum
    "464c4d5301000003000000000000001a",
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
    "8e2e6a8d",
    // conversation 259: records 5 and 6, and 9; conversation 515: record 1
    "010005e807800205026869964b5296",
    "010006e907800206057468657265a30ad5f0",
    "010009ea07800209003025e7d0",
    "010001e70780020101216a3a0c09",
    // index block: kind, zero, 32 bytes, 3 entries, checksum; conversation, first seq, records, newest, bytes, checksum
    "01000000000000200000000383ba50b5",
    "83020502e9072154394426",
    "000201ea070da1e18c79",
    "80020101e7070e451b601d",
    // row block: table, key, row; gone; empty
    "020000000000001200000003ac0665cf",
    "0302000104726f77",
    "0302000200",
    "0402000101",
    // directory block: 60 bytes of runs, 48 of index
    "03000000000000020000000121930ee8",
    "3c30",
    // footer: magic, version, codec, shard, id, commits; runs, rows, records; bytes of runs, oldest, newest; bytes, rows at,
    // directory at; zero; checksum
    "464c4d4501000003000000000000001a000000000000001a000000000000001a",
    "000000000000000300000000000000030000000000000004",
    "000000000000003c00000000000003e700000000000003ea",
    "000000000000016000000000000000ac00000000000000ce",
    "0000000000000000000000000000000000000000",
    "c9b833bc",
);

#[test]
fn a_segment_of_nothing_is_a_segment() {
    let files = MemoryFiles::default();
    let summary = write(&files, 1, &[], &[]);
    assert_eq!(summary.bytes, (HEADER_BYTES + FOOTER_BYTES) as u64);
    let segment = Segment::open(&files, shard(), 1).unwrap();
    assert!(segment.runs().next().is_none() && segment.rows().next().is_none());
    assert!(verify(&segment, 1).is_empty());
}

#[test]
fn records_are_cut_into_runs_of_a_bounded_size() {
    let files = MemoryFiles::default();
    let largest = vec![1; RECORD_PAYLOAD_BYTES_MAX];
    let samples: Vec<Sample> = (1..=7).map(|s| sample(256, s, s, largest.clone())).collect();
    write(&files, 1, &samples, &[]);
    let segment = Segment::open(&files, shard(), 1).unwrap();
    let counts: Vec<u64> = segment.runs().map(|run| run.unwrap().count).collect();
    assert_eq!(counts, [1; 7], "two of the largest records are more than a run");
    let small: Vec<Sample> = (1..=1_000).map(|s| sample(256, s, s, vec![1; 200])).collect();
    write(&files, 2, &small, &[]);
    let segment = Segment::open(&files, shard(), 2).unwrap();
    for run in segment.runs() {
        let run = run.unwrap();
        assert!(run.bytes as usize <= RUN_BYTES);
        let full = run.bytes as usize + 230 > RUN_BYTES;
        assert!(full || run.last() == seq(1_000), "only the last run has room left");
    }
}

#[test]
fn records_are_given_from_anywhere_in_a_run() {
    let files = MemoryFiles::default();
    let samples: Vec<Sample> = (5..=20).map(|s| sample(256, s, s, vec![1; 20])).collect();
    write(&files, 1, &samples, &[]);
    let segment = Segment::open(&files, shard(), 1).unwrap();
    let run = segment.runs().next().unwrap().unwrap();
    let bytes = segment.run(&run).unwrap();
    for from in 0..23 {
        let found: Vec<u64> =
            records(&run, &bytes, seq(from)).map(|record| record.unwrap().0.seq.get()).collect();
        assert_eq!(found, (from.max(5)..=20).collect::<Vec<u64>>());
    }
    for (wrong, what) in [
        (Run { first: seq(4), ..run }, "another first seq"),
        (Run { count: 15, ..run }, "fewer records"),
        (Run { count: 17, ..run }, "more records"),
        (Run { conversation: conversation(512), ..run }, "another conversation"),
        (Run { newest: UnixMillis::new(21).unwrap(), ..run }, "another time"),
    ] {
        assert!(records(&wrong, &bytes, Seq::ZERO).any(|record| record.is_err()), "{what}");
    }
}

#[test]
fn a_run_outside_of_the_runs_is_refused() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    let summary = write(&files, 1, &samples, &rows);
    let segment = Segment::open(&files, shard(), 1).unwrap();
    let run = segment.runs().next().unwrap().unwrap();
    for (offset, bytes) in [(0, 8), (u64::MAX, 8), (summary.bytes - 4, 8), (64, u32::MAX), (64, 4_000_000)] {
        let wrong = Run { offset, bytes, ..run };
        assert!(matches!(segment.run(&wrong), Err(SegmentError::Malformed(_))), "{offset} {bytes}");
    }
    assert!(segment.run(&Run { crc: run.crc ^ 1, ..run }).is_err());
}

#[test]
fn what_is_out_of_order_is_refused_before_it_is_written() {
    let files = MemoryFiles::default();
    let mut writer = SegmentWriter::create(&files, shard(), 1).unwrap();
    let mut put = |s: &Sample| writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded);
    put(&sample(256, 5, 1, vec![])).unwrap();
    for (c, s) in [(256, 5), (256, 4), (255, 9), (512, 0)] {
        assert_eq!(put(&sample(c, s, 1, vec![])).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    put(&sample(256, 6, 1, vec![])).unwrap();
    let time = UnixMillis::default();
    for length in [0, 10, RUN_BYTES_MAX + 1] {
        assert!(writer.record(conversation(512), seq(1), time, &vec![0; length]).is_err());
    }
    writer.row(3, b"b", None).unwrap();
    for (table, key) in [(3, b"b"), (3, b"a"), (2, b"c")] {
        assert!(writer.row(table, key, None).is_err());
    }
    assert!(writer.row(3, b"c", Some(&vec![0; ROW_BYTES_MAX])).is_err(), "too large");
    let late = sample(512, 1, 1, vec![]);
    assert!(writer.record(late.conversation, late.record.seq, time, &late.encoded).is_err());
    writer.row(3, b"c", Some(&vec![0; ROW_BYTES_MAX - 1])).unwrap();
    let summary = writer.finish(4..=9).unwrap();
    assert_eq!((summary.runs, summary.records, summary.rows), (1, 2, 2));
    let segment = Segment::open(&files, shard(), 1).unwrap();
    assert!(verify(&segment, 1).is_empty());
    let writer = SegmentWriter::create(&files, shard(), 2).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    let refused = writer.finish(4..=3);
    assert!(refused.is_err());
}

#[test]
fn another_segment_or_shard_is_refused() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    write(&files, 1, &samples, &rows);
    put(&files, 2, &contents(&files, 1));
    let refused = Segment::open(&files, shard(), 2).unwrap_err();
    assert!(refused.to_string().contains("another segment"), "{refused}");
    let refused = Segment::open(&files, ShardId::new(4).unwrap(), 1).unwrap_err();
    assert!(refused.to_string().contains("another shard"), "{refused}");
    assert!(matches!(Segment::open(&files, shard(), 3), Err(SegmentError::Io(_))), "no such file");
}

/// A block that is intact, but of another segment with the same layout.
#[test]
fn a_block_of_another_segment_is_noticed() {
    let files = MemoryFiles::default();
    let (samples, mut rows) = tiny();
    write(&files, 1, &samples, &rows);
    rows[0].2 = Some(b"ROW".to_vec());
    write(&files, 2, &samples, &rows);
    let (mut one, two) = (contents(&files, 1), contents(&files, 2));
    let rows_at = |bytes: &[u8]| bytes.windows(3).position(|w| w.eq_ignore_ascii_case(b"row")).unwrap() - 21;
    assert_eq!(rows_at(&one), rows_at(&two));
    let footer_at = one.len() - FOOTER_BYTES;
    let at = rows_at(&one);
    assert_eq!(one[at], Kind::Rows as u8);
    one[at..footer_at].copy_from_slice(&two[at..footer_at]);
    put(&files, 1, &one);
    let segment = Segment::open(&files, shard(), 1).unwrap();
    assert!(segment.rows().any(|row| row.is_err()));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    // With large and with small blocks: one and several of each kind.
    for body_bytes in [BLOCK_BYTES, 1] {
        write_in_blocks(&files, 1, body_bytes, &samples, &rows);
        let whole = contents(&files, 1);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                put(&files, 1, &bytes);
                let Ok(segment) = Segment::open(&files, shard(), 1) else { continue };
                assert!(!verify(&segment, 1).is_empty(), "byte {at}, bit {bit}");
                // Whatever is still given out is what was written.
                for run in segment.runs().map_while(Result::ok) {
                    if let Ok(bytes) = segment.run(&run) {
                        for (record, encoded) in records(&run, &bytes, Seq::ZERO).map(Result::unwrap) {
                            let found = Sample { conversation: run.conversation, record, encoded };
                            assert!(samples.contains(&found), "byte {at}, bit {bit}");
                        }
                    }
                }
                for (table, key, row) in segment.rows().map_while(Result::ok) {
                    let found = (table, key.to_vec(), row.map(|row| row.to_vec()));
                    assert!(rows.contains(&found), "byte {at}, bit {bit}");
                }
            }
        }
    }
}

/// The file changes after it was opened.
#[test]
fn a_verifier_reads_everything_from_the_file() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    write(&files, 1, &samples, &rows);
    let length = contents(&files, 1).len();
    let segment = Segment::open(&files, shard(), 1).unwrap();
    assert!(verify(&segment, 1).is_empty());
    let slots = files.open_slots(&name(1)).unwrap();
    for at in 0..length as u64 {
        let mut byte = [0];
        slots.read_exact_at(&mut byte, at).unwrap();
        slots.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        assert!(!verify(&segment, 1_000).is_empty(), "byte {at}");
        slots.write_all_at(&byte, at).unwrap();
    }
}

#[test]
fn damage_names_the_records_and_the_next_run_is_looked_at() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    write(&files, 1, &samples, &rows);
    let mut bytes = contents(&files, 1);
    let runs: Vec<Run> = Segment::open(&files, shard(), 1).unwrap().runs().map(Result::unwrap).collect();
    for run in &runs[..2] {
        bytes[usize::try_from(run.offset).unwrap()] ^= 0xff;
    }
    put(&files, 1, &bytes);
    let damage = verify(&Segment::open(&files, shard(), 1).unwrap(), 1);
    let texts: Vec<String> = damage.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "segment 0000000000000001 (conversation 259, seqs 5 to 6): the segment is damaged: malformed segment run checksum",
            "segment 0000000000000001 (conversation 259, seqs 9 to 9): the segment is damaged: malformed segment run checksum",
        ]
    );
}

#[test]
fn another_length_is_refused() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    write(&files, 1, &samples, &rows);
    let whole = contents(&files, 1);
    for length in 0..whole.len() {
        put(&files, 1, &whole[..length]);
        assert!(Segment::open(&files, shard(), 1).is_err(), "{length} bytes of {}", whole.len());
        let mut zeroed = whole[..length].to_vec();
        zeroed.resize(whole.len(), 0);
        if zeroed != whole {
            put(&files, 1, &zeroed);
            let noticed = Segment::open(&files, shard(), 1).map_or(true, |s| !verify(&s, 1).is_empty());
            assert!(noticed, "{length} bytes, then zeros");
        }
    }
    for more in [&b"\0"[..], b"more", &whole] {
        put(&files, 1, &[&whole, more].concat());
        assert!(Segment::open(&files, shard(), 1).is_err());
    }
}

/// Parts of a file that are put together under right checksums.
#[derive(Clone, Debug)]
struct Crafted {
    /// Records; entries of the index; bytes after the index block that nobody accounts for.
    groups: Vec<(Vec<Sample>, Vec<Run>, usize)>,
    rows: Vec<OwnedRow>,
    /// Bytes after the last entry of each block.
    trailing: usize,
    /// Added to the length of each index block in the directory.
    longer: u32,
}

impl Crafted {
    fn intact() -> Self {
        let (samples, rows) = tiny();
        let mut offset = HEADER_BYTES as u64;
        let groups = samples.chunks(2).map(|records| {
            let runs = records.iter().map(|s| {
                let bytes = u32::try_from(s.encoded.len()).unwrap();
                let run = Run {
                    conversation: s.conversation,
                    first: s.record.seq,
                    count: 1,
                    newest: s.record.time,
                    offset,
                    bytes,
                    crc: crc32c::crc32c(&s.encoded),
                };
                offset += u64::from(bytes);
                run
            });
            (records.to_vec(), runs.collect(), 0)
        });
        Self { groups: groups.collect(), rows, trailing: 0, longer: 0 }
    }

    /// Writes it with a footer that `change` has had its way with; returns what is noticed.
    fn noticed(&self, change: impl FnOnce(&mut Footer)) -> Option<String> {
        let (mut out, seed) = layout::header(shard(), 1, Codec::Plain);
        let block = |out: &mut Vec<u8>, kind, entries: usize, mut body: Vec<u8>| {
            body.resize(body.len() + self.trailing, 0);
            let entries = u32::try_from(entries).unwrap();
            out.extend_from_slice(&layout::block_header(kind, entries, &body, seed, out.len() as u64));
            out.extend_from_slice(&body);
        };
        let mut directory = Vec::new();
        let mut runs = Vec::new();
        for (samples, entries, gap) in &self.groups {
            let begin = out.len();
            samples.iter().for_each(|s| out.extend_from_slice(&s.encoded));
            let index_at = out.len();
            let mut body = Vec::new();
            let mut before = None;
            for run in entries {
                layout::put_run(&mut body, before, run);
                before = Some(run);
            }
            block(&mut out, Kind::Index, entries.len(), body);
            let block_bytes = u32::try_from(out.len() - index_at).unwrap() + self.longer;
            layout::put_group(
                &mut directory,
                layout::Group { run_bytes: (index_at - begin) as u64, block_bytes },
            );
            out.resize(out.len() + gap, 0);
            runs.extend_from_slice(entries);
        }
        let rows_at = out.len() as u64;
        let mut body = Vec::new();
        for (table, key, row) in &self.rows {
            layout::put_row(&mut body, *table, key, row.as_deref());
        }
        block(&mut out, Kind::Rows, self.rows.len(), body);
        let directory_at = out.len() as u64;
        block(&mut out, Kind::Directory, self.groups.len(), directory);
        let summary = Summary {
            shard: shard(),
            id: 1,
            first_commit: 1,
            last_commit: 1,
            runs: runs.len() as u64,
            rows: self.rows.len() as u64,
            records: runs.iter().map(|run| run.count).sum(),
            bytes: (out.len() + FOOTER_BYTES) as u64,
            run_bytes: runs.iter().map(|run| u64::from(run.bytes)).sum(),
            newest: runs.iter().map(|run| run.newest).max().unwrap(),
            oldest: runs.iter().map(|run| run.newest).min().unwrap(),
        };
        let mut footer =
            Footer { summary, codec: Codec::Plain, rows_at, directory_at, frames_at: 0, frames_bytes: 0 };
        change(&mut footer);
        out.extend_from_slice(&footer.encode(seed));
        let files = MemoryFiles::default();
        put(&files, 1, &out);
        match Segment::open(&files, shard(), 1) {
            Ok(segment) => verify(&segment, 1_000).first().map(ToString::to_string),
            Err(refused) => Some(format!("at opening: {refused}")),
        }
    }
}

/// Checksums are no excuse: what contradicts itself is refused, whoever wrote it.
#[test]
fn a_file_that_contradicts_itself_is_refused() {
    let intact = Crafted::intact();
    assert_eq!(intact.noticed(|_| ()), None);
    let with = |change: fn(&mut Crafted)| {
        let mut crafted = Crafted::intact();
        change(&mut crafted);
        crafted.noticed(|_| ()).unwrap_or_else(|| panic!("not noticed: {crafted:?}"))
    };
    let meet = "runs and index do not meet";
    for (found, expected) in [
        // A record that no run has, at the end and at the beginning; a run that reaches into the index.
        (with(|c| c.groups[0].1.truncate(1)), meet),
        (with(|c| c.groups[1].1[1].bytes += 3), meet),
        (with(|c| c.groups[0].1[0].bytes += 1), "run checksum"),
        // Bytes that nobody accounts for.
        (with(|c| c.groups[0].2 = 5), "index block"),
        (with(|c| c.groups[1].2 = 5), "what the footer says"),
        (with(|c| c.trailing = 1), "index block"),
        (with(|c| (c.longer, c.groups[0].2, c.groups[1].2) = (4, 4, 4)), "outside of the runs"),
        // The same, and another order.
        (with(|c| c.groups.swap(0, 1)), "a run out of order"),
        (with(|c| c.groups.push(c.groups[0].clone())), "a run out of order"),
        (with(|c| c.rows.swap(0, 2)), "a row out of order"),
        (with(|c| c.rows.insert(1, c.rows[0].clone())), "a row out of order"),
        // Runs that say of their records what is not so.
        (with(|c| c.groups[0].1[1].newest = UnixMillis::new(7).unwrap()), "time of the newest record"),
        (with(|c| c.groups[0].1[1].first = seq(7)), "a record out of place"),
        (with(|c| c.groups[1].1[1].conversation = conversation(771)), "record checksum"),
        // A block that is too large.
        (
            with(|c| {
                let samples: Vec<Sample> = (1..9_000).map(|n| sample(n, 1, 5, Vec::new())).collect();
                let run = c.groups[0].1[0];
                let run = |s: &Sample| Run { conversation: s.conversation, first: seq(1), bytes: 13, ..run };
                c.groups = vec![(samples.clone(), samples.iter().map(run).collect(), 0)];
            }),
            "index block",
        ),
    ] {
        assert!(found.contains(expected), "{found}, not {expected}");
    }
    let footers: [fn(&mut Footer); 16] = [
        |f| f.summary.runs -= 1,
        |f| f.summary.records += 1,
        |f| f.summary.records = u64::MAX,
        |f| f.summary.runs = f.summary.records + 1,
        |f| f.summary.rows += 1,
        |f| f.summary.rows = u64::MAX,
        |f| f.summary.run_bytes += 1,
        |f| f.summary.run_bytes = f.rows_at,
        |f| f.summary.newest = UnixMillis::new(1_003).unwrap(),
        |f| f.summary.oldest = UnixMillis::new(998).unwrap(),
        |f| f.summary.first_commit = 2,
        |f| f.rows_at = 63,
        |f| f.rows_at = f.directory_at + 1,
        |f| f.rows_at -= 1,
        |f| f.directory_at = f.summary.bytes,
        |f| f.directory_at -= 1,
    ];
    for (n, change) in footers.into_iter().enumerate() {
        assert!(intact.noticed(change).is_some(), "change {n} of the footer");
    }
    // What can't be is refused at once, before anybody works with it.
    for n in [2, 3, 5, 7, 10, 11, 12, 14] {
        let refused = intact.noticed(footers[n]).unwrap();
        assert!(refused.starts_with("at opening"), "change {n} of the footer: {refused}");
    }
}

/// Blocks whose checksums are right and whose bodies are anything.
fn with_blocks(runs: &[u8], blocks: &[(Kind, u32, Vec<u8>)], numbers: [u64; 6]) -> Vec<u8> {
    let (mut out, seed) = layout::header(shard(), 1, Codec::Plain);
    out.extend_from_slice(runs);
    let mut begins = BTreeMap::new();
    for (kind, entries, body) in blocks {
        let at = out.len() as u64;
        begins.entry(*kind as u8).or_insert(at);
        out.extend_from_slice(&layout::block_header(*kind, *entries, body, seed, at));
        out.extend_from_slice(body);
    }
    let end = out.len() as u64;
    let directory_at = begins.get(&(Kind::Directory as u8)).copied().unwrap_or(end);
    let rows_at = begins.get(&(Kind::Rows as u8)).copied().unwrap_or(directory_at);
    let [runs, rows, records, run_bytes, oldest, newest] = numbers;
    let summary = Summary {
        shard: shard(),
        id: 1,
        first_commit: 1,
        last_commit: 1,
        runs,
        rows,
        records,
        bytes: end + FOOTER_BYTES as u64,
        run_bytes,
        newest: UnixMillis::new(newest).unwrap(),
        oldest: UnixMillis::new(oldest).unwrap(),
    };
    out.extend_from_slice(
        &Footer { summary, codec: Codec::Plain, rows_at, directory_at, frames_at: 0, frames_bytes: 0 }
            .encode(seed),
    );
    out
}

/// Reads everything there is to read.
fn read_all(segment: &Segment) {
    for run in segment.runs().map_while(Result::ok) {
        if let Ok(bytes) = segment.run(&run) {
            let _ = records(&run, &bytes, run.last()).count();
        }
    }
    let _ = segment.rows().count();
    let _ = verify(segment, 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let files = MemoryFiles::default();
        put(&files, 1, &bytes);
        prop_assert!(Segment::open(&files, shard(), 1).is_err());
    }

    #[test]
    fn any_bodies_under_right_checksums_are_read_without_a_panic(
        runs in proptest::collection::vec(any::<u8>(), 0..60),
        index in proptest::collection::vec(any::<u8>(), 0..80),
        rows in proptest::collection::vec(any::<u8>(), 0..80),
        directory in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
        entries in any::<[u8; 3]>(),
        counts in any::<[u8; 3]>(),
    ) {
        let [index_entries, row_entries, directory_entries] = entries.map(|n| u32::from(n % 5));
        // Mostly a directory that finds the index.
        let directory = directory.unwrap_or_else(|| {
            let mut body = Vec::new();
            let block_bytes = u32::try_from(index.len() + 16).unwrap();
            layout::put_group(&mut body, layout::Group { run_bytes: runs.len() as u64, block_bytes });
            body
        });
        let run_bytes = runs.len() as u64;
        let records_said = u64::from(counts[0] % 6).min(run_bytes / 11);
        let runs_said = u64::from(counts[1] % 6).min(records_said);
        let rows_said = u64::from(counts[2] % 6);
        let blocks = [
            (Kind::Index, index_entries, index),
            (Kind::Rows, row_entries, rows),
            (Kind::Directory, directory_entries.max(1), directory),
        ];
        let bytes = with_blocks(&runs, &blocks, [runs_said, rows_said, records_said, run_bytes, 0, 0]);
        let files = MemoryFiles::default();
        put(&files, 1, &bytes);
        if let Ok(segment) = Segment::open(&files, shard(), 1) {
            read_all(&segment);
        }
    }

    #[test]
    fn any_numbers_in_a_footer_are_read_without_a_panic(numbers in any::<[u64; 10]>(), at in any::<prop::sample::Index>()) {
        let files = MemoryFiles::default();
        let (samples, rows) = tiny();
        write(&files, 1, &samples, &rows);
        let mut bytes = contents(&files, 1);
        let footer_at = bytes.len() - FOOTER_BYTES;
        // All fields, or one of them alone.
        let one = at.index(11);
        for (n, number) in numbers.iter().enumerate().filter(|(n, _)| one == 10 || *n == one) {
            bytes[footer_at + 24 + n * 8..][..8].copy_from_slice(&number.to_be_bytes());
        }
        let (_, seed) = layout::header(shard(), 1, Codec::Plain);
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c_append(seed, &bytes[footer_at..end]);
        bytes[end..].copy_from_slice(&crc.to_be_bytes());
        put(&files, 1, &bytes);
        if let Ok(segment) = Segment::open(&files, shard(), 1) {
            read_all(&segment);
        }
    }
}

/// What a conversation's log looks like: sizes of records, with gaps in front of some.
fn any_log() -> impl Strategy<Value = Vec<(u64, usize)>> {
    let size = prop_oneof![4 => 0..300usize, 2 => 2_000..9_000usize, 1 => 12_000..=RECORD_PAYLOAD_BYTES_MAX];
    proptest::collection::vec((prop_oneof![9 => Just(0u64), 1 => 1..4u64], size), 0..25)
}

/// Several segments in order, as a shard would have written them.
#[derive(Clone, Debug)]
struct History {
    segments: Vec<(Vec<Sample>, Vec<OwnedRow>)>,
    lows: BTreeMap<ConversationId, Seq>,
}

prop_compose! {
    fn any_history()(
        logs in proptest::collection::vec(any_log(), 1..5),
        cuts in proptest::collection::vec(any::<[prop::sample::Index; 3]>(), 5),
        again in proptest::collection::vec(proptest::option::weighted(0.3, 0..6usize), 5),
        lows in proptest::collection::vec(proptest::option::of(any::<prop::sample::Index>()), 5),
        rows in proptest::collection::vec(proptest::collection::btree_map((1..4u8, proptest::collection::vec(0..4u8, 0..3)),
            proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)), 0..30), 4),
        parts in 1..=4usize,
    ) -> History {
        let mut segments = vec![(Vec::new(), Vec::new()); parts];
        let mut known_lows = BTreeMap::new();
        for (n, log) in logs.iter().enumerate() {
            let c = (n as u64 + 1) * 256;
            let mut next = 1;
            let samples: Vec<Sample> = log.iter().map(|(gap, size)| {
                let seq = next + gap;
                next = seq + 1;
                sample(c, seq, 1_000 + seq * 3 / 2, vec![seq.to_le_bytes()[0]; *size])
            }).collect();
            let mut ends: Vec<usize> = cuts[n].iter().map(|cut| cut.index(samples.len() + 1)).collect();
            ends.sort_unstable();
            ends.truncate(parts - 1);
            ends.push(samples.len());
            let mut begin = 0usize;
            for (part, end) in ends.iter().enumerate() {
                // After a crash some of what stands before the cut stands behind it as well.
                let from = again[n].map_or(begin, |records| begin.saturating_sub(records));
                segments[part].0.extend_from_slice(&samples[from.min(*end)..*end]);
                begin = *end;
            }
            if let Some(low) = lows[n] {
                known_lows.insert(conversation(c), seq(low.index(usize::try_from(next).unwrap()) as u64));
            }
        }
        for (part, rows) in segments.iter_mut().zip(rows) {
            part.1 = rows.into_iter().map(|((table, key), row)| (table, key, row)).collect();
        }
        History { segments, lows: known_lows }
    }
}

impl History {
    fn low(&self, conversation: ConversationId) -> Seq {
        self.lows.get(&conversation).copied().unwrap_or_default()
    }

    fn records(&self) -> Vec<Sample> {
        let all: BTreeMap<_, _> = self
            .segments
            .iter()
            .flat_map(|(samples, _)| samples)
            .filter(|s| s.record.seq > self.low(s.conversation))
            .map(|s| ((s.conversation, s.record.seq), s.clone()))
            .collect();
        all.into_values().collect()
    }

    fn rows(&self, drop_gone: bool) -> Vec<OwnedRow> {
        let mut all = BTreeMap::new();
        for (table, key, row) in self.segments.iter().flat_map(|(_, rows)| rows) {
            all.insert((*table, key.clone()), row.clone());
        }
        all.retain(|_, row| row.is_some() || !drop_gone);
        all.into_iter().map(|((table, key), row)| (table, key, row)).collect()
    }

    fn write(&self, files: &MemoryFiles, body_bytes: usize) -> Vec<Arc<Segment>> {
        let ids = 1..;
        ids.zip(&self.segments)
            .map(|(id, (samples, rows))| {
                write_in_blocks(files, id, body_bytes, samples, rows);
                Arc::new(Segment::open(files, shard(), id).unwrap())
            })
            .collect()
    }
}

fn finish(mut merge: Merge, budget: usize) -> Result<Summary, MergeError> {
    loop {
        if let Step::Done(summary) = merge.step(budget)? {
            assert_eq!(merge.step(budget)?, Step::Done(summary), "it stays done");
            return Ok(summary);
        }
    }
}

proptest! {
    #[test]
    fn any_segment_comes_back(history in any_history(), body_bytes in 1..600usize, budget in 1..100_000usize) {
        let files = MemoryFiles::default();
        for (segment, (samples, rows)) in history.write(&files, body_bytes).iter().zip(&history.segments) {
            prop_assert_eq!(&read_records(segment), samples);
            prop_assert_eq!(&read_rows(segment), rows);
            prop_assert!(verify(segment, budget).is_empty());
        }
    }

    #[test]
    fn a_merge_is_what_its_inputs_come_to(
        history in any_history(),
        bodies in (1..600usize, 1..600usize),
        budget in prop_oneof![Just(1usize), 1..200_000usize],
        drop_gone in any::<bool>(),
    ) {
        let files = MemoryFiles::default();
        let inputs = history.write(&files, bodies.0);
        let out = SegmentWriter::create(&files, shard(), 99).unwrap().with_bodies_of(bodies.1);
        let (lows, mut asked) = (history.clone(), BTreeSet::new());
        let low = Box::new(move |c| {
            assert!(asked.insert(c) && asked.last() == Some(&c), "asked once, in order");
            lows.low(c)
        });
        let summary = finish(Merge::new(inputs.clone(), out, low, drop_gone), budget).unwrap();
        prop_assert_eq!((summary.first_commit, summary.last_commit), (1, inputs.len() as u64));
        let merged = Segment::open(&files, shard(), 99).unwrap();
        prop_assert_eq!(merged.summary(), &summary);
        prop_assert_eq!(read_records(&merged), history.records());
        prop_assert_eq!(read_rows(&merged), history.rows(drop_gone));
        prop_assert!(verify(&merged, budget).is_empty());

        let runs: Vec<Run> = merged.runs().map(Result::unwrap).collect();
        for pair in runs.windows(2) {
            let follows = pair[0].conversation == pair[1].conversation && pair[0].last().next() == Some(pair[1].first);
            let one = pair[0].bytes as usize + pair[1].bytes as usize <= RUN_BYTES;
            // Taking a run apart can leave what would have fitted, but no more than that: never two that fit one.
            prop_assert!(!(follows && one), "{:?}", pair);
        }
    }
}

fn no_low() -> Box<dyn FnMut(ConversationId) -> Seq + Send> {
    Box::new(|_| Seq::ZERO)
}

fn segments(files: &MemoryFiles, all: &[&[Sample]]) -> Vec<Arc<Segment>> {
    (1..)
        .zip(all)
        .map(|(id, samples)| {
            write(files, id, samples, &[]);
            Arc::new(Segment::open(files, shard(), id).unwrap())
        })
        .collect()
}

#[test]
fn two_records_in_one_place_end_a_merge() {
    let files = MemoryFiles::default();
    let mut other = sample(256, 2, 5, &b"b"[..]);
    for (changed, ok) in [(false, true), (true, false)] {
        if changed {
            other = sample(256, 2, 5, &b"B"[..]);
        }
        let older = [sample(256, 1, 5, &b"a"[..]), sample(256, 2, 5, &b"b"[..])];
        let newer = [other.clone(), sample(256, 3, 5, &b"c"[..])];
        let inputs = segments(&files, &[&older, &newer]);
        let out = SegmentWriter::create(&files, shard(), 3).unwrap();
        let mut merge = Merge::new(inputs, out, no_low(), true);
        match merge.step(usize::MAX) {
            Ok(Step::Done(summary)) => {
                assert!(ok);
                assert_eq!((summary.runs, summary.records), (1, 3));
            }
            Err(MergeError::Differ { conversation: c, seq: s, segments }) => {
                assert!(!ok);
                assert_eq!((c.get(), s.get(), segments), (256, 2, (1, 2)));
                assert!(merge.step(1).is_err(), "it is over");
            }
            unexpected => panic!("{unexpected:?}"),
        }
    }
}

#[test]
fn damage_ends_a_merge() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    write(&files, 1, &samples, &rows);
    let whole = contents(&files, 1);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        put(&files, 1, &bytes);
        if let Ok(segment) = Segment::open(&files, shard(), 1) {
            let out = SegmentWriter::create(&files, shard(), 2).unwrap();
            let merged = finish(Merge::new(vec![Arc::new(segment)], out, no_low(), false), 100);
            assert!(matches!(merged, Err(MergeError::Damage(_))), "byte {at}: {merged:?}");
        }
    }
}

#[test]
fn segments_that_do_not_follow_each_other_are_not_merged() {
    let files = MemoryFiles::default();
    for id in [1, 2, 3] {
        write(&files, id, &[], &[]);
    }
    let open = |id| Arc::new(Segment::open(&files, shard(), id).unwrap());
    for (inputs, ok) in [
        (vec![], false),
        (vec![open(1), open(3)], false),
        (vec![open(2), open(1)], false),
        (vec![open(1), open(2), open(3)], true),
    ] {
        let out = SegmentWriter::create(&files, shard(), 9).unwrap();
        assert_eq!(finish(Merge::new(inputs, out, no_low(), true), 1).is_ok(), ok);
    }
}

/// A folder that knows its largest read and append, and fails on demand.
#[derive(Clone, Debug, Default)]
struct Watched {
    files: MemoryFiles,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    largest_read: usize,
    largest_append: usize,
    appends: u64,
    syncs: u64,
    /// The append or sync, counted together, that fails; and whether it did.
    fails_at: Option<u64>,
    failed: bool,
}

#[derive(Debug)]
struct WatchedFile<T>(T, Arc<Mutex<Seen>>);

impl Seen {
    fn write(&mut self) -> io::Result<()> {
        assert!(!self.failed, "written to after a failure");
        if self.fails_at == Some(self.appends + self.syncs) {
            self.failed = true;
            return Err(io::Error::other("the disk is gone"));
        }
        Ok(())
    }
}

impl Append for WatchedFile<Box<dyn Append>> {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut seen = self.1.lock().unwrap();
        seen.write()?;
        seen.appends += 1;
        seen.largest_append = seen.largest_append.max(bytes.len());
        self.0.append(bytes)
    }

    fn make_room(&mut self, until: u64) -> io::Result<()> {
        self.1.lock().unwrap().write()?;
        self.0.make_room(until)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut seen = self.1.lock().unwrap();
        seen.write()?;
        seen.syncs += 1;
        self.0.sync()
    }
}

impl ReadAt for WatchedFile<Arc<dyn ReadAt>> {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let mut seen = self.1.lock().unwrap();
        seen.largest_read = seen.largest_read.max(buffer.len());
        self.0.read_exact_at(buffer, at)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

impl Files for Watched {
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>> {
        Ok(Box::new(WatchedFile(self.files.create(name)?, Arc::clone(&self.seen))))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(WatchedFile(self.files.open(name)?, Arc::clone(&self.seen))))
    }

    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>> {
        self.files.open_slots(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.remove(name)
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        self.files.list()
    }

    fn sync_folder(&self) -> io::Result<()> {
        self.files.sync_folder()
    }

    fn free(&self) -> io::Result<Option<u64>> {
        self.files.free()
    }
}

#[test]
fn a_large_merge_keeps_its_bounds() {
    const SEGMENTS: u64 = 4;
    let watched = Watched::default();
    for id in 1..=SEGMENTS {
        // 25 000 records: many small runs, and one long conversation.
        let begin = (id - 1) * 5_000;
        let long = (1..=5_000).map(|n| sample(256, begin + n, n, vec![1; 100]));
        let small =
            (2..5_002).flat_map(|c| (1..=4).map(move |n| sample(c * 256, (id - 1) * 4 + n, n, vec![2; 20])));
        let mut writer = SegmentWriter::create(&watched, shard(), id).unwrap();
        for s in long.chain(small) {
            writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded).unwrap();
        }
        for n in 0..10_000u32 {
            writer.row(3, &n.to_be_bytes(), (n % 7 > 0).then_some(&[0; 40])).unwrap();
        }
        writer.finish(id..=id).unwrap();
    }
    let open = |id| Arc::new(Segment::open(&watched, shard(), id).unwrap());
    let inputs: Vec<_> = (1..=SEGMENTS).map(open).collect();
    *watched.seen.lock().unwrap() = Seen::default();
    let out = SegmentWriter::create(&watched, shard(), 9).unwrap();
    let mut merge = Merge::new(inputs, out, Box::new(|_| seq(2)), true);
    let mut held = 0usize;
    let summary = loop {
        let step = merge.step(20_000).unwrap();
        held = held.max(merge.held());
        if let Step::Done(summary) = step {
            break summary;
        }
    };
    assert_eq!(summary.records, 100_000 - 2 * 5_001);
    // 5 000 of one run each, and 2 MB in runs of 32 KiB, cut anew where an input ended.
    assert!((5_070..5_080).contains(&summary.runs), "{} runs of 20 000 small ones and a few", summary.runs);
    let per_input = 2 * BLOCK_BYTES + 2 * BLOCK_BYTES + RUN_BYTES_MAX;
    let writer = 2 * (256 * 1024 + RUN_BYTES_MAX) + 4 * BLOCK_BYTES;
    assert!(held > 256 * 1024, "it was counted");
    assert!(held <= usize::try_from(SEGMENTS).unwrap() * per_input + writer, "{held} bytes");
    let seen = watched.seen.lock().unwrap();
    assert!(seen.largest_read <= BLOCK_BYTES, "{}", seen.largest_read);
    assert!(seen.largest_append <= 256 * 1024 + BLOCK_BYTES, "{}", seen.largest_append);
    assert_eq!(seen.syncs, 1);
}

#[test]
fn nothing_is_written_after_a_failure() {
    let attempt = |fails_at| {
        let watched = Watched::default();
        watched.seen.lock().unwrap().fails_at = fails_at;
        let mut writer = SegmentWriter::create(&watched, shard(), 1).unwrap();
        let mut results = Vec::new();
        for n in 1..=6_000 {
            let s = sample(256, n, n, vec![1; 100]);
            results.push(writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded).is_ok());
        }
        results.push(writer.finish(1..=1).is_ok());
        let writes = watched.seen.lock().unwrap();
        (results, writes.appends + writes.syncs)
    };
    let (results, writes) = attempt(None);
    assert!(results.iter().all(|ok| *ok) && writes > 3);
    for at in 0..writes {
        // The watched file itself fails the test if it is written to again.
        let (results, _) = attempt(Some(at));
        assert_eq!(results.last(), Some(&false), "write {at}");
    }
}

// ---- cold segments

/// Where the frames of a cold segment are in a test.
#[derive(Clone, Debug, Default)]
struct Elsewhere(Arc<Mutex<Vec<u8>>>);

impl Frames for Elsewhere {
    fn read(&self, at: u64, bytes: u32) -> io::Result<Bytes> {
        let there = self.0.lock().unwrap();
        let at = usize::try_from(at).unwrap();
        there
            .get(at..at + bytes as usize)
            .map(Bytes::copy_from_slice)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn cached(&self, _number: u64) -> Option<Bytes> {
        None
    }

    fn keep(&self, _number: u64, _frame: &Bytes) {}
}

fn write_cold(
    files: &MemoryFiles,
    id: u64,
    body_bytes: usize,
    samples: &[Sample],
    rows: &[OwnedRow],
) -> Elsewhere {
    let there = Elsewhere::default();
    let sink = there.clone();
    let frames = FrameWriter::new(Box::new(move |frame| {
        sink.0.lock().unwrap().extend_from_slice(frame);
        Ok(())
    }));
    let writer = SegmentWriter::create_cold(files, shard(), id, frames.unwrap()).unwrap();
    let mut writer = writer.with_bodies_of(body_bytes);
    for s in samples {
        writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded).unwrap();
    }
    for (table, key, row) in rows {
        writer.row(*table, key, row.as_deref()).unwrap();
    }
    writer.finish(id..=id).unwrap();
    there
}

fn verify_cold(segment: &Segment) -> Vec<SegmentDamage> {
    let mut verifier = segment.verifier().with_cold();
    let mut damage = Vec::new();
    loop {
        match verifier.step(1) {
            Ok(Progress::More) => {}
            Ok(Progress::Done) => return damage,
            Err(found) => damage.push(found),
        }
    }
}

#[test]
fn a_cold_segment_comes_back() {
    let files = MemoryFiles::default();
    // Bytes that do not shrink, in several frames.
    let mut n = 1u64;
    let mut noise = |length: usize| -> Vec<u8> {
        std::iter::repeat_with(|| {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (n >> 56) as u8
        })
        .take(length)
        .collect()
    };
    let samples: Vec<Sample> = (1..80)
        .flat_map(|c| (1..=c % 40).map(move |s| (c, s)))
        .map(|(c, s)| sample(c * 256, s * (1 + s / 30), 5_000 + s, noise(700)))
        .collect();
    let rows: Vec<OwnedRow> =
        (0..9_000u32).map(|n| (1, n.to_be_bytes().to_vec(), (n % 3 > 0).then(|| vec![8; 20]))).collect();
    for body_bytes in [BLOCK_BYTES, 64] {
        write_in_blocks(&files, 1, body_bytes, &samples, &rows);
        let plain = Segment::open(&files, shard(), 1).unwrap();
        let there = write_cold(&files, 2, body_bytes, &samples, &rows);
        let cold = Segment::open(&files, shard(), 2).unwrap();
        assert!(cold.summary().run_bytes > 3 * FRAME_BYTES as u64, "runs lie across cuts");
        assert_eq!(cold.summary().records, plain.summary().records);
        assert_eq!(cold.frames_bytes(), there.0.lock().unwrap().len() as u64);
        // Without the frames everything but the runs is there.
        assert_eq!(read_rows(&cold), rows);
        let places = |segment: &Segment| -> Vec<_> {
            segment
                .runs()
                .map(Result::unwrap)
                .map(|run| (run.conversation, run.first, run.count, run.crc))
                .collect()
        };
        assert_eq!(places(&cold), places(&plain));
        assert_eq!(verify(&cold, 1).len(), 0);
        assert!(cold.run(&cold.runs().next().unwrap().unwrap()).is_err());
        let cold = cold.with_frames(Arc::new(there));
        assert_eq!(read_records(&cold), samples);
        assert_eq!(verify_cold(&cold).len(), 0);
        // It is merged like any other.
        let out = SegmentWriter::create(&files, shard(), 3).unwrap();
        let merge = Merge::new(vec![Arc::new(cold)], out, no_low(), false);
        finish(merge, usize::MAX).unwrap();
        let merged = Segment::open(&files, shard(), 3).unwrap();
        assert_eq!(read_records(&merged), samples);
        assert_eq!(read_rows(&merged), rows);
    }
}

#[test]
fn every_flipped_bit_of_a_cold_segment_is_noticed() {
    let files = MemoryFiles::default();
    let (samples, rows) = tiny();
    for body_bytes in [BLOCK_BYTES, 1] {
        let there = write_cold(&files, 1, body_bytes, &samples, &rows);
        let whole = contents(&files, 1);
        let open = |there: &Elsewhere| {
            Segment::open(&files, shard(), 1).map(|segment| segment.with_frames(Arc::new(there.clone())))
        };
        assert_eq!(verify_cold(&open(&there).unwrap()).len(), 0);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                put(&files, 1, &bytes);
                let Ok(segment) = open(&there) else { continue };
                assert!(!verify_cold(&segment).is_empty(), "byte {at}, bit {bit}");
            }
        }
        put(&files, 1, &whole);
        let frames = there.0.lock().unwrap().clone();
        for at in 0..frames.len() {
            for bit in 0..8 {
                let mut bytes = frames.clone();
                bytes[at] ^= 1 << bit;
                let flipped = Elsewhere(Arc::new(Mutex::new(bytes)));
                let segment = open(&flipped).unwrap();
                assert!(!verify_cold(&segment).is_empty(), "byte {at} of the frames, bit {bit}");
                for run in segment.runs().map(Result::unwrap) {
                    assert!(segment.run(&run).is_err(), "byte {at} of the frames, bit {bit}");
                }
            }
        }
        for end in 0..frames.len() {
            let cut = Elsewhere(Arc::new(Mutex::new(frames[..end].to_vec())));
            assert!(!verify_cold(&open(&cut).unwrap()).is_empty(), "cut off at {end}");
        }
    }
}

proptest! {
    #[test]
    fn any_frame_is_read_without_a_panic(
        frame in proptest::collection::vec(any::<u8>(), 0..300),
        length in 0usize..FRAME_BYTES,
    ) {
        if let Ok(bytes) = frames::decompress(&frame, length) {
            prop_assert_eq!(bytes.len(), length);
        }
    }
}
