//! Single failures and single damaged rows: nothing is acknowledged that is not durable, nothing damaged is served.

use std::{sync::Arc, time::Duration};

use super::{Open, append, conversation, seq};
use crate::{
    CommitError, Limits, Op, OpenError, ReadError, StoreOptions,
    engine::{Direction, Engine, EngineError, faulty::Faulty, memory::Memory},
    key::{Key, Table},
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

fn never_settles() -> StoreOptions {
    StoreOptions { settle_idle: Duration::from_secs(3600), ..StoreOptions::default() }
}

#[test]
fn after_the_first_failure_nothing_is_acknowledged_until_it_is_opened_again() {
    for (what, at_barrier) in [("insert", false), ("barrier", true)] {
        let memory = Arc::new(Memory::default());
        let engine = Arc::new(Faulty::new(
            Arc::clone(&memory) as Arc<dyn Engine>,
            EngineError::Failed("broken".to_owned()),
        ));
        let mut open = Open::over(Arc::clone(&engine) as Arc<dyn Engine>, None, &never_settles()).unwrap();
        open.commit(&[append(1, 1, "a")]).unwrap();
        if at_barrier {
            engine.fail_barrier_after(0)
        } else {
            engine.fail_insert_after(0)
        }
        let failed = open.commit(&[append(1, 2, "b")]);
        assert!(matches!(failed, Err(CommitError::Unavailable { .. })), "{what}: {failed:?}");
        assert_eq!(open.reader.head(conversation(1)).unwrap().unwrap().seq, seq(1), "{what}: not shown");
        engine.fail_barrier_after(i64::MAX);
        engine.fail_insert_after(i64::MAX);
        let again = open.commit(&[append(1, 2, "b")]);
        assert!(matches!(again, Err(CommitError::Unavailable { .. })), "{what}: the first error is final");
        open.abandon();
        let open = Open::over(engine, None, &never_settles()).unwrap();
        let head = open.reader.head(conversation(1)).unwrap().unwrap().seq;
        assert!(
            head == seq(1) || head == seq(2),
            "{what}: the unacknowledged one is there whole or not at all"
        );
        open.abandon();
    }
}

#[test]
fn a_full_disk_is_told_apart() {
    let engine = Arc::new(Faulty::new(Arc::new(Memory::default()), EngineError::Full));
    let mut open = Open::over(Arc::clone(&engine) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    engine.fail_insert_after(0);
    assert!(matches!(open.commit(&[append(1, 1, "a")]), Err(CommitError::Full { .. })));
    open.abandon();
}

#[test]
fn a_failure_while_settling_loses_nothing() {
    let memory = Arc::new(Memory::default());
    let engine = Arc::new(Faulty::new(
        Arc::clone(&memory) as Arc<dyn Engine>,
        EngineError::Failed("broken".to_owned()),
    ));
    let options = StoreOptions { settle_commits: 1 << 30, ..never_settles() };
    let mut open = Open::over(Arc::clone(&engine) as Arc<dyn Engine>, None, &options).unwrap();
    for n in 1..=30 {
        open.commit(&[append(1, n, vec![7; 600])]).unwrap();
    }
    engine.fail_insert_after(3);
    assert!(open.close().is_err());
    let open = Open::over(memory, None, &options).unwrap();
    assert_eq!(open.reader.records(conversation(1), seq(1), seq(99), ALL).unwrap().len(), 30);
    open.abandon();
}

/// A log of ten commits that are not settled, over memory.
fn ten_commits() -> Arc<Memory> {
    let memory = Arc::new(Memory::default());
    let mut open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    for n in 1..=9 {
        open.commit(&[append(1, n, vec![n as u8; 5_000])]).unwrap();
    }
    open.abandon();
    memory
}

fn refused(memory: &Arc<Memory>) -> (u64, String) {
    match Open::over(Arc::clone(memory) as Arc<dyn Engine>, None, &never_settles()) {
        Err(OpenError::Damaged { commit, what, .. }) => (commit, what),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
}

#[test]
fn damage_in_the_log_is_refused_and_says_where() {
    let flip = |memory: &Memory, number, chunk, at: usize| {
        let key = Key::commit(number, chunk);
        let mut bytes = memory.get(Table::Commit, key.as_ref()).unwrap().unwrap().to_vec();
        bytes[at] ^= 1;
        memory.insert(Table::Commit, key.as_ref(), &bytes).unwrap();
    };
    let memory = ten_commits();
    flip(&memory, 5, 0, 100);
    assert_eq!(refused(&memory), (5, "malformed commit body checksum".to_owned()));
    let memory = ten_commits();
    flip(&memory, 10, 1, 7);
    assert_eq!(refused(&memory).0, 10, "the last one as well, when all of it is there");
    let memory = ten_commits();
    flip(&memory, 4, 0, 9);
    assert_eq!(refused(&memory), (4, "malformed commit header checksum".to_owned()));

    let memory = ten_commits();
    for chunk in 0..2 {
        memory.remove(Table::Commit, Key::commit(6, chunk).as_ref()).unwrap();
    }
    assert_eq!(refused(&memory), (6, "the commits from 6 to 6 are missing".to_owned()));
    let memory = ten_commits();
    memory.remove(Table::Commit, Key::commit(6, 1).as_ref()).unwrap();
    assert_eq!(refused(&memory), (6, "chunks of it are missing".to_owned()));

    // A commit of another history, whole and with the right number.
    let memory = ten_commits();
    let (id, bytes) =
        crate::commit::encode(crate::CommitId { number: 6, chain: crate::ChainHash([1; 16]) }, 0, b"");
    assert_eq!(id.number, 7);
    memory.remove(Table::Commit, Key::commit(7, 1).as_ref()).unwrap();
    memory.insert(Table::Commit, Key::commit(7, 0).as_ref(), &bytes).unwrap();
    assert_eq!(refused(&memory), (7, "it does not follow the commit before it (chain hash)".to_owned()));
}

#[test]
fn a_log_that_ends_before_what_was_acknowledged_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tip = folder.path().join("tip");
    let memory = Arc::new(Memory::default());
    let mut open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, Some(&tip), &never_settles()).unwrap();
    for n in 1..=5 {
        open.commit(&[append(1, n, "x")]).unwrap();
    }
    let last = open.writer.last();
    open.abandon();
    memory.remove(Table::Commit, Key::commit(last.number, 0).as_ref()).unwrap();
    let error = Open::over(memory, Some(&tip), &never_settles()).err().unwrap();
    let text = error.to_string();
    assert!(text.contains(&format!("commit {} was acknowledged", last.number)), "{text}");
}

#[test]
fn damaged_records_and_rows_are_never_served() {
    let memory = Arc::new(Memory::default());
    let mut open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    for n in 1..=100 {
        open.commit(&[append(1, n, vec![n as u8; 400])]).unwrap();
    }
    let row = crate::Member { role: crate::Role::Owner, joined: seq(1), since: Default::default() };
    open.commit(&[Op::Member { conversation: conversation(1), user: super::user(5), row: Some(row) }])
        .unwrap();
    open.close().unwrap();

    let blocks = memory.scan(Table::Block, &[], None, Direction::Ascending, 999).unwrap();
    let (key, block) = &blocks[blocks.len() / 2];
    let first = crate::key::number_at(key, 1).unwrap();
    let mut bytes = block.to_vec();
    bytes[50] ^= 0x10;
    memory.insert(Table::Block, key, &bytes).unwrap();
    let open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    let read = open.reader.records(conversation(1), seq(1), seq(100), ALL);
    assert!(
        matches!(&read, Err(ReadError::Damaged { conversation: Some(c), seq: Some(s), .. }) if *c == conversation(1) && s.get() == first),
        "{read:?}"
    );
    assert_eq!(
        open.reader.records(conversation(1), seq(1), seq(first - 1), ALL).unwrap().len() as u64,
        first - 1
    );
    open.abandon();

    memory.remove(Table::Block, key).unwrap();
    let open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    let read = open.reader.records(conversation(1), seq(1), seq(100), ALL);
    assert!(matches!(&read, Err(ReadError::Damaged { seq: Some(s), .. }) if s.get() == first), "{read:?}");
    open.abandon();

    let key = Key::conversation_user(conversation(1), super::user(5));
    let mut bytes = memory.get(Table::Member, key.as_ref()).unwrap().unwrap().to_vec();
    bytes[1] = 0;
    memory.insert(Table::Member, key.as_ref(), &bytes).unwrap();
    let open = Open::over(Arc::clone(&memory) as Arc<dyn Engine>, None, &never_settles()).unwrap();
    let read = open.reader.member(conversation(1), super::user(5));
    assert!(matches!(&read, Err(ReadError::Damaged { .. })), "{read:?}");
    let listed = open.reader.members(conversation(1), None, 9);
    assert!(matches!(&listed, Err(ReadError::Damaged { .. })), "{listed:?}");
    open.abandon();
}
