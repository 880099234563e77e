//! Segments as a whole: round trips, golden bytes, damage.

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};

use super::*;
use crate::{
    files::memory::MemoryFiles,
    record::{Record, RecordKind},
};

pub(super) fn shard() -> ShardId {
    ShardId::new(3).unwrap()
}

pub(super) fn conversation(n: u64) -> ConversationId {
    ConversationId::new(n).unwrap()
}

pub(super) fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

/// One record and its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) conversation: ConversationId,
    pub(super) record: Record,
    pub(super) encoded: Bytes,
}

pub(super) fn sample(conversation: u64, seq: u64, time: u64, payload: impl Into<Bytes>) -> Sample {
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
        silent: false,
        payload: payload.into(),
    };
    let mut encoded = Vec::new();
    record.encode(conversation, &mut encoded);
    Sample { conversation, record, encoded: encoded.into() }
}

pub(super) type OwnedRow = (u8, Vec<u8>, Option<Vec<u8>>);

/// Writes a segment; both lists are in order.
pub(super) fn write(files: &MemoryFiles, id: u64, samples: &[Sample], rows: &[OwnedRow]) -> Summary {
    let mut writer = SegmentWriter::create(files, shard(), id).unwrap();
    for s in samples {
        writer.record(s.conversation, s.record.seq, s.record.time, &s.encoded).unwrap();
    }
    for (table, key, row) in rows {
        writer.row(*table, key, row.as_deref()).unwrap();
    }
    writer.finish(id..=id).unwrap()
}

pub(super) fn read_records(segment: &Segment) -> Vec<Sample> {
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

pub(super) fn read_rows(segment: &Segment) -> Vec<OwnedRow> {
    segment
        .rows()
        .map(|row| {
            let (table, key, row) = row.unwrap();
            (table, key.to_vec(), row.map(|row| row.to_vec()))
        })
        .collect()
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
    let segment = Segment::open(&files, shard(), 9).unwrap();
    assert_eq!(segment.summary(), &summary);
    assert_eq!(read_records(&segment), samples);
    assert_eq!(read_rows(&segment), rows);
}
