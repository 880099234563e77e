//! What the database promises, table by table, and over crashes: a crash is a copy of the files taken while the
//! database is open, which is what a killed process leaves behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame::{ConversationClass, Deliver, OpenTarget, Opened, Origin, Receipt, RecordKind, WireTime},
    id::{ConversationId, DeviceId, Epoch, FolderId, Pseq, RequestId, Seq, UnixMillis, UserId},
    service::Roster,
};
use proptest::prelude::*;
use rusqlite::StatementStatus;

use super::{Db, Delivered, Draft, Marker, Outcome, Own, Store, schema};
use crate::{
    error::Error,
    options::{Database, Durability},
};

const OWN: Own = Own { user: user(1), device: device(1), epoch: epoch(1) };

const fn user(number: u64) -> UserId {
    UserId::new(number).unwrap()
}

const fn device(number: u64) -> DeviceId {
    DeviceId::new(number).unwrap()
}

const fn epoch(number: u64) -> Epoch {
    Epoch::new(number).unwrap()
}

fn c(number: u64) -> ConversationId {
    ConversationId::new(number).unwrap()
}

fn s(number: u64) -> Seq {
    Seq::new(number).unwrap()
}

fn p(number: u64) -> Pseq {
    Pseq::new(number).unwrap()
}

fn memory() -> Store {
    Store::open(&Database::Memory, Durability::PowerLoss).unwrap()
}

fn file(path: &Path) -> Store {
    let store = Store::open(&Database::File(path.to_owned()), Durability::PowerLoss).unwrap();
    // A killed process loses nothing that was written; only a power cut would, and there is none here.
    store.sql.pragma_update(None, "synchronous", "OFF").unwrap();
    store
}

/// What a killed process leaves: the database and its write-ahead log as they are at this moment.
fn crashed(from: &Path, to: &Path) -> Store {
    for suffix in ["", "-wal"] {
        let path = |path: &Path| format!("{}{suffix}", path.display());
        match std::fs::copy(path(from), path(to)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let _ = std::fs::remove_file(path(to));
            }
            copied => drop(copied.unwrap()),
        }
    }
    file(to)
}

fn draft(target: OpenTarget, text: &str) -> Draft {
    Draft {
        target,
        kind: RecordKind::Message,
        reference: None,
        ttl: None,
        silent: false,
        payload: Bytes::copy_from_slice(text.as_bytes()),
        piece: 4,
        created: 1_000,
    }
}

fn to(conversation: u64, text: &str) -> Draft {
    draft(OpenTarget::Number(c(conversation)), text)
}

fn bob() -> OpenTarget {
    OpenTarget::Direct("bob".to_owned())
}

fn opened(conversation: u64) -> Opened {
    Opened {
        id: RequestId::FIRST,
        conversation: c(conversation),
        class: ConversationClass::Direct,
        name: "bob".to_owned(),
        peer: user(2),
        head: Seq::ZERO,
        count: 0,
        low: Seq::ZERO,
        joined: Seq::ZERO,
        read: Seq::ZERO,
        last_pseq: Pseq::ZERO,
    }
}

fn record(conversation: u64, seq: u64, sender: u64, text: &str) -> Deliver {
    Deliver {
        kind: RecordKind::Message,
        conversation: c(conversation),
        seq: s(seq),
        sender: user(sender),
        time: WireTime::Full(UnixMillis::new(5_000 + seq).unwrap()),
        origin: None,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: Bytes::copy_from_slice(text.as_bytes()),
    }
}

/// A piece of what device `from` of a user sent under (epoch, pseq), the first or a later one, the last or not.
fn piece(at: (u64, u64), from: (u64, u64), lane: (u64, u64), order: (bool, bool), text: &str) -> Deliver {
    Deliver {
        origin: Some(Origin { device: device(from.1), epoch: epoch(lane.0), pseq: p(lane.1) }),
        continues: order.0,
        more: order.1,
        ..record(at.0, at.1, from.0, text)
    }
}

const FIRST: (bool, bool) = (false, true);
const MIDDLE: (bool, bool) = (true, true);
const LAST: (bool, bool) = (true, false);

fn texts(store: &Store) -> Vec<(u64, String)> {
    page(store).into_iter().map(|(_, seq, text)| (seq, text)).collect()
}

fn shown(texts: &[(u64, &str)]) -> Vec<(u64, String)> {
    texts.iter().map(|(seq, text)| (*seq, (*text).to_owned())).collect()
}

fn deliver(store: &Store, record: Deliver) -> Delivered {
    let mut delivered = Delivered::default();
    let now = UnixMillis::new(10_000).unwrap();
    store.deliver(&Marker::Record(Box::new(record)), now, OWN, &mut delivered).unwrap();
    delivered
}

fn lane(store: &Store, conversation: u64) -> Vec<(u64, String)> {
    let waiting = store.waiting(c(conversation), Pseq::ZERO, 1_000, 2_000).unwrap();
    waiting
        .into_iter()
        .map(|waiting| (waiting.send.pseq.get(), String::from_utf8(waiting.send.payload.to_vec()).unwrap()))
        .collect()
}

fn page(store: &Store) -> Vec<(u64, u64, String)> {
    let page = store.page(store.taken().unwrap(), 1_000).unwrap();
    page.into_iter().map(|m| (m.conversation.get(), m.seq.get(), m.text().into_owned())).collect()
}

#[test]
fn pseqs_are_contiguous_per_conversation() {
    let store = memory();
    for (conversation, text) in [(7, "a"), (9, "b"), (7, "c"), (7, "long body"), (9, "d")] {
        store.enqueue(&to(conversation, text)).unwrap();
    }
    let own = |lane: &[(u64, &str)]| lane.iter().map(|(p, t)| (*p, (*t).to_owned())).collect::<Vec<_>>();
    assert_eq!(lane(&store, 7), own(&[(1, "a"), (2, "c"), (3, "long"), (4, " bod"), (5, "y")]));
    assert_eq!(lane(&store, 9), own(&[(1, "b"), (2, "d")]));
    let order: Vec<_> = store.waiting(c(7), Pseq::ZERO, 10, 0).unwrap();
    let order: Vec<_> = order.iter().map(|waiting| (waiting.send.continues, waiting.send.more)).collect();
    assert_eq!(order, [(false, false), (false, false), FIRST, MIDDLE, LAST]);
    assert_eq!(store.oldest_waiting(3, 0).unwrap().len(), 3);
}

#[test]
fn a_send_that_is_handed_over_is_what_a_read_would_find() {
    let store = memory();
    deliver(&store, record(7, 1, 2, "seen"));
    for draft in [
        to(7, "a"),
        Draft { ttl: Some(9), silent: true, ..to(7, "b") },
        Draft { kind: RecordKind::Edit, reference: Some(s(1)), ..to(7, "") },
    ] {
        let queued = store.enqueue(&draft).unwrap().send.unwrap();
        let read = store.waiting(c(7), queued.send.pseq.prev(), 1, 2_000).unwrap().remove(0);
        assert_eq!((queued.id, queued.ends, &queued.send), (read.id, read.ends, &read.send));
    }
    assert!(store.enqueue(&to(7, "pieces")).unwrap().send.is_none());
    assert!(store.enqueue(&draft(bob(), "x")).unwrap().send.is_none());
}

#[test]
fn names_are_resolved_in_the_order_of_queueing_behind_what_has_numbers() {
    let store = memory();
    store.enqueue(&draft(bob(), "one")).unwrap();
    store.enqueue(&to(7, "nine")).unwrap();
    store.enqueue(&draft(bob(), "two")).unwrap();
    assert_eq!(store.unresolved().unwrap(), [bob()]);
    store.resolved(&bob(), &opened(7)).unwrap();
    store.resolved(&bob(), &opened(7)).unwrap();
    let texts: Vec<_> = lane(&store, 7).into_iter().map(|(p, t)| format!("{p} {t}")).collect();
    assert_eq!(texts, ["1 nine", "2 one", "3 two"]);
    assert_eq!(store.enqueue(&draft(bob(), "four")).unwrap().conversation, Some(c(7)));
    assert!(store.unresolved().unwrap().is_empty());
    assert_eq!(store.user_name(user(2)).unwrap().as_deref(), Some("bob"));
    assert_eq!(store.conversations().unwrap()[0].name, "bob");
}

#[test]
fn a_name_that_is_refused_ends_what_waits_for_it() {
    let store = memory();
    let id = store.enqueue(&draft(bob(), "a body of pieces")).unwrap().id;
    let settled = store.unresolvable(&bob(), RefusalCode::UnknownUser).unwrap();
    assert_eq!(settled.len(), 1);
    assert_eq!((settled[0].id, settled[0].outcome), (id, Outcome::Refused(RefusalCode::UnknownUser)));
    assert!(store.unresolved().unwrap().is_empty());
}

#[test]
fn a_body_in_pieces_is_taken_back_whole_or_not_at_all() {
    let store = memory();
    let one = store.enqueue(&to(7, "one")).unwrap().id;
    let pieces = store.enqueue(&to(7, "0123456789")).unwrap().id;
    let nameless = store.enqueue(&draft(bob(), "0123456789")).unwrap().id;
    let cancelled = store.cancel(one).unwrap();
    assert_eq!((cancelled.settled, cancelled.numbered), (None, vec![(c(7), p(1))]));
    // Its first piece may be stored: without the others, the next message would be taken for the end of it.
    let cancelled = store.cancel(pieces).unwrap();
    assert_eq!((cancelled.settled, cancelled.numbered), (None, vec![]));
    let cancels: Vec<bool> =
        store.waiting(c(7), Pseq::ZERO, 10, 0).unwrap().iter().map(|waiting| waiting.send.cancel).collect();
    assert_eq!(cancels, [true, false, false, false]);
    let cancelled = store.cancel(nameless).unwrap();
    assert_eq!(
        cancelled.settled.map(|settled| (settled.id, settled.outcome)),
        Some((nameless, Outcome::Expired))
    );
    store.resolved(&bob(), &opened(9)).unwrap();
    assert_eq!(lane(&store, 9), [], "no piece of it was left");
}

#[test]
fn a_body_is_shown_whole_until_its_last_piece_is_settled() {
    for refused in [false, true] {
        let store = memory();
        store.enqueue(&to(7, "before")).unwrap();
        let id = store.enqueue(&to(7, "0123456789")).unwrap().id;
        let shown = |store: &Store| {
            let list = store.unsettled(10).unwrap();
            let found = list.into_iter().find(|entry| entry.id == id).unwrap();
            (String::from_utf8(found.payload.to_vec()).unwrap(), found.outcome)
        };
        let payloads = |store: &Store| -> i64 {
            let count = "SELECT count(payload) FROM outbox WHERE id = ?1 OR body = ?1";
            store.sql.query_row(count, [super::store::int(id)], |row| row.get(0)).unwrap()
        };
        for pseq in 1..=4 {
            // "before" takes two numbers.
            store.acked(c(7), p(pseq), s(pseq)).unwrap();
            assert_eq!(shown(&store), ("0123456789".to_owned(), None), "{pseq} are settled");
        }
        assert_eq!(payloads(&store), 3);
        let (settled, outcome) = if refused {
            let code = RefusalCode::NotAMember;
            (store.refused(c(7), p(5), code).unwrap(), Outcome::Refused(code))
        } else {
            (store.acked(c(7), p(5), s(5)).unwrap(), Outcome::Acked(s(5)))
        };
        assert_eq!(settled.map(|settled| (settled.id, settled.outcome)), Some((id, outcome)));
        assert_eq!(shown(&store), (String::new(), Some(outcome)));
        assert_eq!(payloads(&store), 0, "nothing is kept for nobody");
    }
}

#[test]
fn a_send_is_settled_once_and_listed_until_the_app_was_told() {
    let store = memory();
    let id = store.enqueue(&to(7, "a")).unwrap().id;
    store.enqueue(&to(7, "b")).unwrap();
    let settled = store.acked(c(7), p(1), s(40)).unwrap().unwrap();
    assert_eq!((settled.id, settled.outcome), (id, Outcome::Acked(s(40))));
    assert_eq!(store.acked(c(7), p(1), s(41)).unwrap(), None);
    assert_eq!(store.refused(c(7), p(1), RefusalCode::NotAllowed).unwrap(), None);
    let list = |store: &Store| -> Vec<_> {
        store.unsettled(10).unwrap().into_iter().map(|entry| (entry.id, entry.outcome)).collect()
    };
    assert_eq!(list(&store), [(id, Some(Outcome::Acked(s(40)))), (id + 1, None)]);
    store.told(&[id, id + 1]).unwrap();
    assert_eq!(list(&store), [(id + 1, None)], "what is not settled can't be told");
}

#[test]
fn a_body_ends_with_its_last_piece_and_is_refused_with_any() {
    let store = memory();
    let whole = store.enqueue(&to(7, "12345678")).unwrap().id;
    assert_eq!(store.acked(c(7), p(1), s(1)).unwrap(), None);
    assert_eq!(store.acked(c(7), p(2), s(2)).unwrap().unwrap().id, whole);
    let broken = store.enqueue(&to(7, "12345678")).unwrap().id;
    assert_eq!(store.refused(c(7), p(3), RefusalCode::NotAMember).unwrap(), None);
    let settled = store.acked(c(7), p(4), s(3)).unwrap().unwrap();
    assert_eq!((settled.id, settled.outcome), (broken, Outcome::Refused(RefusalCode::NotAMember)));
    store.told(&[whole, broken]).unwrap();
    assert!(store.unsettled(10).unwrap().is_empty());
}

#[test]
fn what_expired_keeps_its_number_as_a_tombstone() {
    let store = memory();
    let numbered = Draft { ttl: Some(2), ..to(7, "abc") };
    let nameless = Draft { ttl: Some(2), ..draft(bob(), "abc") };
    store.enqueue(&numbered).unwrap();
    store.enqueue(&nameless).unwrap();
    let at = |now: u64| {
        let waiting = store.waiting(c(7), Pseq::ZERO, 10, now).unwrap();
        (waiting[0].send.cancel, waiting[0].send.payload.len(), waiting[0].ends)
    };
    assert_eq!(at(2_999), (false, 3, Some(3_000)));
    assert_eq!(at(3_000), (true, 0, Some(3_000)));
    assert!(store.expire_nameless(2_999).unwrap().is_empty());
    assert_eq!(store.expire_nameless(3_000).unwrap()[0].outcome, Outcome::Expired);
    let settled = store.refused(c(7), p(1), RefusalCode::Cancelled).unwrap().unwrap();
    assert_eq!(settled.outcome, Outcome::Expired);
}

#[test]
fn another_epoch_numbers_from_one_again_in_the_same_order() {
    let store = memory();
    for text in ["a", "b", "c"] {
        store.enqueue(&to(7, text)).unwrap();
    }
    store.enqueue(&to(9, "x")).unwrap();
    store.acked(c(7), p(1), s(1)).unwrap();
    store.acked(c(9), p(1), s(1)).unwrap();
    store.new_epoch(epoch(5)).unwrap();
    assert_eq!(store.identity().unwrap().epoch, epoch(5));
    assert_eq!(lane(&store, 7), [(1, "b".to_owned()), (2, "c".to_owned())]);
    store.enqueue(&to(7, "d")).unwrap();
    store.enqueue(&to(9, "y")).unwrap();
    assert_eq!(lane(&store, 7)[2], (3, "d".to_owned()));
    assert_eq!(lane(&store, 9), [(1, "y".to_owned())]);
}

#[test]
fn a_statement_is_prepared_once_whatever_it_is_asked() {
    let store = memory();
    for n in 1..=20 {
        deliver(&store, record(7, n, 2, "hello"));
    }
    for from in 0..20 {
        assert_eq!(store.page(from, 1).unwrap().len(), 1);
    }
    let page = store.sql.prepare_cached(super::inbox::PAGE).unwrap();
    assert_eq!(page.get_status(StatementStatus::Run), 20, "it is the one that was asked");
    assert_eq!(page.get_status(StatementStatus::RePrepare), 0);
}

#[test]
fn a_record_is_stored_once_and_moves_the_cursor_forward_only() {
    let store = memory();
    let first = deliver(&store, record(7, 1, 2, "a"));
    assert_eq!((first.fresh, first.nameless), (vec![c(7)], BTreeSet::from([user(2)])));
    deliver(&store, record(7, 2, 2, "b"));
    deliver(&store, record(7, 1, 2, "other"));
    assert_eq!(page(&store), [(7, 1, "a".to_owned()), (7, 2, "b".to_owned())]);
    assert_eq!(store.restore().unwrap().cursors, [(c(7), s(2))]);
    let raw = store.sql.execute(
        "INSERT INTO messages (conversation, seq, sender, time, kind, flags, payload) VALUES (7, 1, 2, 0, 0, 0, x'')",
        [],
    );
    assert!(raw.is_err(), "the table itself refuses duplicates");
    store.take(1).unwrap();
    store.take(0).unwrap();
    assert_eq!(page(&store), [(7, 2, "b".to_owned())]);
}

#[test]
fn an_own_echo_settles_its_send_under_its_epoch_only() {
    let store = memory();
    let id = store.enqueue(&to(7, "a")).unwrap().id;
    let echo = |seq, device, epoch| Deliver {
        origin: Some(Origin { device, epoch, pseq: p(1) }),
        ..record(7, seq, 1, "a")
    };
    assert!(deliver(&store, echo(1, device(2), epoch(1))).settled.is_empty(), "another device's");
    assert!(deliver(&store, echo(2, device(1), epoch(9))).settled.is_empty(), "another epoch's");
    let settled = deliver(&store, echo(3, device(1), epoch(1))).settled;
    assert_eq!((settled[0].id, settled[0].outcome), (id, Outcome::Acked(s(3))));
    let own: Vec<_> = store.page(0, 9).unwrap().iter().map(|m| (m.own, m.this_device)).collect();
    assert_eq!(own, [(true, false), (true, true), (true, true)]);
}

#[test]
fn pieces_are_put_together_also_between_messages_of_others() {
    let store = memory();
    deliver(&store, piece((7, 1), (2, 1), (1, 4), FIRST, "one "));
    deliver(&store, record(7, 2, 3, "between"));
    deliver(&store, piece((7, 3), (2, 1), (1, 5), MIDDLE, "two "));
    deliver(&store, piece((7, 3), (2, 1), (1, 5), MIDDLE, "two again "));
    assert_eq!(texts(&store), shown(&[(2, "between")]));
    let end = deliver(&store, piece((7, 4), (2, 1), (1, 6), LAST, "three"));
    deliver(&store, record(7, 5, 2, "alone"));
    assert_eq!(texts(&store), shown(&[(2, "between"), (4, "one two three"), (5, "alone")]));
    assert_eq!(store.history(c(7), Some(s(5)), 1).unwrap()[0].text(), "one two three");
    assert_eq!(end.strays, 0);
}

#[test]
fn two_devices_of_a_user_send_bodies_at_once() {
    let store = memory();
    deliver(&store, piece((7, 1), (2, 1), (1, 4), FIRST, "one "));
    deliver(&store, piece((7, 2), (2, 2), (1, 5), FIRST, "eins "));
    deliver(&store, piece((7, 3), (2, 2), (1, 6), MIDDLE, "zwei "));
    deliver(&store, piece((7, 4), (3, 1), (1, 5), FIRST, "another user's, "));
    deliver(&store, piece((7, 5), (2, 1), (1, 5), MIDDLE, "two "));
    deliver(&store, piece((7, 6), (2, 1), (1, 6), LAST, "three"));
    deliver(&store, piece((7, 7), (2, 2), (1, 7), LAST, "drei"));
    let last = deliver(&store, piece((7, 8), (3, 1), (1, 6), LAST, "to its end"));
    let want = [(6, "one two three"), (7, "eins zwei drei"), (8, "another user's, to its end")];
    assert_eq!(texts(&store), shown(&want));
    assert_eq!(last.strays, 0);
}

#[test]
fn a_body_that_was_left_in_the_middle_swallows_nothing_and_is_never_shown() {
    let store = memory();
    let mut strays = 0;
    for (record, why) in [
        (piece((7, 1), (2, 1), (1, 1), FIRST, "begun "), "and its device dies for good"),
        (record(7, 2, 2, "from the other device"), "whole"),
        (record(7, 3, 2, "from the new database"), "whole"),
        (piece((7, 4), (2, 1), (2, 2), FIRST, "a new "), "ends what was begun"),
        (piece((7, 5), (2, 1), (2, 3), LAST, "body"), "as ever"),
        (piece((7, 6), (2, 1), (2, 4), FIRST, "the next is refused, "), "5 is refused for good"),
        (piece((7, 7), (2, 1), (2, 6), MIDDLE, "does not follow "), "nor does what follows on it"),
        (piece((7, 8), (2, 1), (2, 7), LAST, "nor does this"), "not shown"),
        (record(7, 9, 2, "next"), "whole"),
        (piece((7, 10), (2, 1), (2, 9), FIRST, "begun "), "and numbered anew in the middle"),
        (piece((7, 11), (2, 1), (3, 10), LAST, "under another epoch"), "not shown"),
        (piece((7, 12), (2, 2), (1, 1), LAST, "whose beginning is gone"), "not shown"),
        (Deliver { continues: true, ..record(7, 13, 2, "of nobody knows whom") }, "not shown"),
    ] {
        let seq = record.seq;
        let delivered = deliver(&store, record);
        assert_eq!(delivered.cursors[&c(7)], seq, "{why}: the cursor moves");
        strays += delivered.strays;
    }
    let want = [(2, "from the other device"), (3, "from the new database"), (5, "a new body"), (9, "next")];
    assert_eq!(texts(&store), shown(&want));
    assert_eq!(strays, 8, "3 beginnings and 5 ends");
    let kept: i64 = store
        .sql
        .query_row(
            "SELECT coalesce(sum(length(payload)), 0) FROM messages WHERE seq NOT IN (2, 3, 4, 5, 9)",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(kept, 0, "what is never shown takes no room");
    assert_eq!(store.conversations().unwrap()[0].unread, 4);
}

#[test]
fn a_body_that_was_begun_is_sent_whole_under_another_epoch() {
    let store = memory();
    store.enqueue(&to(7, "gone")).unwrap();
    store.enqueue(&to(7, "0123456789")).unwrap();
    let spoiled = store.enqueue(&to(9, "0123456789")).unwrap().id;
    store.enqueue(&to(7, "after")).unwrap();
    store.acked(c(7), p(1), s(1)).unwrap();
    store.acked(c(7), p(2), s(2)).unwrap();
    store.acked(c(7), p(3), s(3)).unwrap();
    store.acked(c(9), p(1), s(1)).unwrap();
    store.refused(c(9), p(2), RefusalCode::NotAMember).unwrap();
    store.new_epoch(epoch(5)).unwrap();
    let all = |lane: &[(u64, &str)]| lane.iter().map(|(p, t)| (*p, (*t).to_owned())).collect::<Vec<_>>();
    assert_eq!(lane(&store, 7), all(&[(1, "0123"), (2, "4567"), (3, "89"), (4, "afte"), (5, "r")]));
    assert_eq!(lane(&store, 9), all(&[(1, "89")]), "that one is lost, and is said to be");
    let end = store.acked(c(9), p(1), s(9)).unwrap().unwrap();
    assert_eq!((end.id, end.outcome), (spoiled, Outcome::Refused(RefusalCode::NotAMember)));
}

#[test]
fn who_leaves_in_the_middle_of_a_body_leaves_no_trace_of_it() {
    let store = memory();
    deliver(&store, piece((7, 1), (2, 1), (1, 1), FIRST, "begun"));
    let roster = Roster { users: vec![(user(2), "bob".to_owned())] };
    let payload = fulmar_protocol::service::encode(&roster).unwrap();
    let left = deliver(&store, Deliver { kind: RecordKind::Left, payload, ..record(7, 2, 3, "") });
    deliver(&store, piece((7, 3), (2, 1), (1, 2), LAST, "and back"));
    deliver(&store, record(7, 4, 2, "back"));
    assert_eq!(texts(&store).last().unwrap(), &(4, "back".to_owned()));
    assert_eq!(page(&store).len(), 2);
    assert_eq!(left.strays, 1);
    assert_eq!(store.user_name(user(2)).unwrap().as_deref(), Some("bob"));
}

#[test]
fn a_body_over_the_limit_is_cut_and_says_so() {
    let store = memory();
    let text = "x".repeat(16 * 1024);
    let pieces = fulmar_protocol::limit::BODY_BYTES_MAX / text.len();
    for seq in 1..=pieces as u64 + 3 {
        deliver(&store, piece((7, seq), (2, 1), (1, seq), (seq > 1, true), &text));
    }
    let end = pieces as u64 + 4;
    deliver(&store, piece((7, end), (2, 1), (1, end), LAST, "end"));
    let received = store.page(0, 1).unwrap().remove(0);
    assert!(received.truncated);
    assert_eq!(received.payload.len(), fulmar_protocol::limit::BODY_BYTES_MAX);
}

#[test]
fn unread_counts_complete_messages_of_others() {
    let store = memory();
    deliver(&store, record(7, 1, 2, "counts"));
    deliver(&store, piece((7, 2), (2, 1), (1, 1), FIRST, "piece"));
    deliver(&store, piece((7, 3), (2, 1), (1, 2), LAST, "counts with its piece"));
    deliver(&store, record(7, 4, 1, "own"));
    deliver(&store, Deliver { silent: true, ..record(7, 5, 2, "silent") });
    deliver(&store, Deliver { kind: RecordKind::Notice, ..record(7, 6, 2, "notice") });
    let unread = |store: &Store| store.conversations().unwrap()[0].unread;
    assert_eq!(unread(&store), 2);
    assert!(store.mark_read(c(7), s(1)).unwrap());
    assert!(!store.mark_read(c(7), s(1)).unwrap(), "marks move forward only");
    assert_eq!(unread(&store), 1);
    assert_eq!(store.restore().unwrap().marks, [(c(7), s(1))]);
    let receipt = Receipt { conversation: c(7), user: user(1), recv: s(6), read: s(3) };
    assert_eq!(store.receipts(&[receipt], Some(user(1))).unwrap(), [receipt]);
    let earlier = Receipt { recv: s(1), read: s(1), ..receipt };
    assert_eq!(store.receipts(&[earlier], Some(user(1))).unwrap(), [receipt], "receipts don't go back");
    assert!(store.restore().unwrap().marks.is_empty(), "the gateway has it");
    assert_eq!(unread(&store), 0);
    assert_eq!(store.receipts_of(c(7)).unwrap(), [receipt]);
}

#[test]
fn a_database_belongs_to_one_user() {
    let store = memory();
    store.welcomed(user(1), device(1), b"ticket", "server").unwrap();
    store.welcomed(user(1), device(1), b"another", "server").unwrap();
    let foreign = store.welcomed(user(2), device(1), b"ticket", "server");
    assert!(matches!(foreign, Err(Error::DatabaseForeign(_))));
    let identity = store.identity().unwrap();
    assert_eq!((identity.user, identity.ticket), (Some(user(1)), Some(b"another".to_vec())));
    store.forget_ticket().unwrap();
    assert_eq!(store.identity().unwrap().ticket, None);
}

#[test]
fn what_was_killed_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a.db"), folder.path().join("b.db"));
    let store = file(&first);
    let uid = store.uid().unwrap();
    store.enqueue(&to(7, "out")).unwrap();
    deliver(&store, record(7, 1, 2, "in"));
    store.take(1).unwrap();
    deliver(&store, record(7, 2, 2, "not taken"));
    let found = crashed(&first, &second);
    assert_eq!(found.uid().unwrap(), uid);
    assert_eq!(lane(&found, 7), [(1, "out".to_owned())]);
    assert_eq!(found.restore().unwrap().cursors, [(c(7), s(2))]);
    assert_eq!(page(&found), [(7, 2, "not taken".to_owned())]);
}

/// A file that the version with format 1 wrote (and SQLite's VACUUM made small): every table that had a row then.
const FORMAT_1: &[u8] = include_bytes!("format-1.db");

#[test]
fn a_database_of_format_1_is_brought_up_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.db");
    std::fs::write(&path, FORMAT_1).unwrap();
    // Bodies in pieces did not say which body a piece was of, and one of them is not finished.
    rusqlite::Connection::open(&path)
        .unwrap()
        .execute_batch(
            "INSERT INTO messages (conversation, seq, sender, time, kind, flags, first, payload) VALUES
                 (7, 3, 2, 0, 0, 1, NULL, x'6f6c'), (7, 4, 3, 0, 0, 0, NULL, x'6f'), (7, 5, 2, 0, 0, 0, 3, x'64'),
                 (7, 6, 2, 0, 0, 1, NULL, x'6f6c');
             INSERT INTO chains VALUES (7, 2, 6, 2);",
        )
        .unwrap();
    for _ in 0..2 {
        let store = file(&path);
        let version: i64 = store.sql.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        assert_eq!(version, schema::VERSION);
        assert_eq!(store.uid().unwrap().0[..4], *b"z\xa0\x04l");
        let identity = store.identity().unwrap();
        assert_eq!(
            (identity.user, identity.device, identity.epoch),
            (Some(user(1)), Some(device(1)), epoch(1))
        );
        assert_eq!(
            (identity.ticket, identity.server.as_str()),
            (Some(b"a ticket".to_vec()), "gateway.example")
        );
        let own = |lane: &[(u64, &str)]| lane.iter().map(|(p, t)| (*p, (*t).to_owned())).collect::<Vec<_>>();
        assert_eq!(lane(&store, 7), own(&[(1, "one"), (2, "two")]));
        assert_eq!(lane(&store, 8), own(&[(1, "thre"), (2, "e")]));
        assert_eq!(texts(&store), shown(&[(2, "not taken"), (4, "o"), (5, "old")]));
        let restore = store.restore().unwrap();
        assert_eq!((restore.cursors, restore.marks), (vec![(c(7), s(2))], vec![(c(7), s(1))]));
        assert_eq!(store.user_name(user(2)).unwrap().as_deref(), Some("bob"));
        // What format 2 added is not known yet.
        assert_eq!((store.folder().unwrap(), store.networks().unwrap()), (None, None));
    }
    file(&path).belongs_to(&FolderId([7; 16])).unwrap();
    assert_eq!(file(&path).folder().unwrap(), Some(FolderId([7; 16])));
}

#[test]
fn a_database_belongs_to_one_data_folder() {
    let store = memory();
    store.belongs_to(&FolderId([1; 16])).unwrap();
    store.belongs_to(&FolderId([1; 16])).unwrap();
    assert!(matches!(store.belongs_to(&FolderId([2; 16])), Err(Error::DatabaseForeign(_))));
    assert_eq!(store.identity().unwrap().folder, Some(FolderId([1; 16])));
    store.sql.execute("UPDATE device SET folder = x'00'", []).unwrap();
    assert!(matches!(store.belongs_to(&FolderId([1; 16])), Err(Error::DatabaseForeign(_))), "damaged");
}

#[test]
fn what_is_known_of_networks_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a.db"), folder.path().join("b.db"));
    let store = file(&first);
    for blob in [&[1, 2, 3][..], &[][..]] {
        store.keep_networks(blob).unwrap();
        assert_eq!(store.networks().unwrap().as_deref(), Some(blob));
    }
    assert_eq!(crashed(&first, &second).networks().unwrap(), Some(Vec::new()));
}

#[test]
fn newer_foreign_and_used_databases_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let store = file(&path);
    let open = |path: &Path| Store::open(&Database::File(path.to_owned()), Durability::PowerLoss);
    assert!(matches!(open(&path), Err(Error::DatabaseInUse)));
    store.sql.pragma_update(None, "user_version", schema::VERSION + 1).unwrap();
    drop(store);
    let before = std::fs::read(&path).unwrap();
    match open(&path) {
        Err(Error::DatabaseNewer { found, known }) => {
            assert_eq!((found, known), (schema::VERSION + 1, schema::VERSION));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let other = folder.path().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    assert!(matches!(open(&other), Err(Error::DatabaseForeign(_))));
    std::fs::write(&other, vec![7; 8192]).unwrap();
    assert!(matches!(open(&other), Err(Error::Database(_))));
}

#[tokio::test]
async fn a_job_that_fails_takes_nothing_of_its_group_with_it() {
    for in_place in [false, true] {
        let db = Db::open(Database::Memory, Durability::PowerLoss, in_place).await.unwrap();
        a_group_with_a_bad_job(&db).await;
    }
}

async fn a_group_with_a_bad_job(db: &Db) {
    let good = |text: &'static str| db.run(true, move |store| store.enqueue(&to(7, text)));
    let bad = db.run(true, |store| {
        store.enqueue(&to(7, "never"))?;
        Err::<(), _>(Error::BadName)
    });
    let (first, failed, second) = tokio::join!(good("a"), bad, good("b"));
    assert!(first.is_ok() && second.is_ok() && matches!(failed, Err(Error::BadName)));
    let lane = db.run(false, |store| Ok(lane(store, 7))).await.unwrap();
    assert_eq!(lane, [(1, "a".to_owned()), (2, "b".to_owned())]);
}

/// One thing that happens to a database.
#[derive(Clone, Debug)]
enum Op {
    Send(u64, usize),
    Settle(u64),
    Receive(u64),
    ReceiveAgain(u64, u64),
    Take,
    NewEpoch,
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    let conversation = 1..4u64;
    prop_oneof![
        4 => (conversation.clone(), 0..12usize).prop_map(|(c, len)| Op::Send(c, len)),
        3 => conversation.clone().prop_map(Op::Settle),
        4 => conversation.clone().prop_map(Op::Receive),
        1 => (conversation, 1..5u64).prop_map(|(c, back)| Op::ReceiveAgain(c, back)),
        2 => Just(Op::Take),
        1 => Just(Op::NewEpoch),
        1 => Just(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Against a model of plain vectors: lanes have no holes and keep their order, every record is handed out once and
    /// in order, whatever is repeated and wherever the process dies.
    #[test]
    fn the_database_is_a_set_of_queues(ops in proptest::collection::vec(op(), 1..60)) {
        let folder = tempfile::tempdir().unwrap();
        let mut path = folder.path().join("0.db");
        let mut store = file(&path);
        // What waits in each lane, by body; and the pieces of its last body that were settled.
        let mut lanes: BTreeMap<u64, Vec<(usize, String)>> = BTreeMap::new();
        let mut begun: BTreeMap<u64, Vec<(usize, String)>> = BTreeMap::new();
        let mut received: BTreeMap<u64, u64> = BTreeMap::new();
        let mut arrived: Vec<(u64, u64)> = Vec::new();
        let mut seen: Vec<(u64, u64)> = Vec::new();
        let mut acked = 0;
        for (step, op) in ops.into_iter().enumerate() {
            match op {
                Op::Send(conversation, len) => {
                    let text: String = format!("{step}").chars().cycle().take(len).collect();
                    store.enqueue(&to(conversation, &text)).unwrap();
                    let piece = |piece: &[u8]| (step, String::from_utf8(piece.to_vec()).unwrap());
                    let lane = lanes.entry(conversation).or_default();
                    if text.is_empty() { lane.push(piece(b"")) } else { lane.extend(text.as_bytes().chunks(4).map(piece)) }
                }
                Op::Settle(conversation) => {
                    let first = lane(&store, conversation).first().map(|(pseq, _)| *pseq);
                    if let Some(pseq) = first {
                        acked += 1;
                        store.acked(c(conversation), p(pseq), s(acked)).unwrap();
                        let piece = lanes.get_mut(&conversation).unwrap().remove(0);
                        let begun = begun.entry(conversation).or_default();
                        begun.retain(|(body, _)| *body == piece.0);
                        begun.push(piece);
                    }
                }
                Op::Receive(conversation) => {
                    let seq = received.entry(conversation).or_default();
                    *seq += 1;
                    arrived.push((conversation, *seq));
                    deliver(&store, record(conversation, *seq, 2, "x"));
                }
                Op::ReceiveAgain(conversation, back) => {
                    let seq = received.get(&conversation).map_or(0, |seq| seq.saturating_sub(back));
                    if seq > 0 {
                        deliver(&store, record(conversation, seq, 2, "again"));
                    }
                }
                Op::Take => {
                    for message in store.page(store.taken().unwrap(), 3).unwrap() {
                        prop_assert_eq!(message.text(), "x");
                        seen.push((message.conversation.get(), message.seq.get()));
                        store.take(message.arrival).unwrap();
                    }
                }
                Op::NewEpoch => {
                    store.new_epoch(epoch(step as u64 + 2)).unwrap();
                    // A body that was begun begins anew.
                    for (conversation, mut begun) in std::mem::take(&mut begun) {
                        let lane = lanes.get_mut(&conversation).unwrap();
                        begun.retain(|(body, _)| lane.first().is_some_and(|(next, _)| next == body));
                        lane.splice(0..0, begun);
                    }
                }
                Op::Crash => {
                    let next = folder.path().join(format!("{}.db", step + 1));
                    store = crashed(&path, &next);
                    path = next;
                }
            }
            for (conversation, want) in &lanes {
                let have = lane(&store, *conversation);
                let texts: Vec<&String> = have.iter().map(|(_, text)| text).collect();
                prop_assert_eq!(texts, want.iter().map(|(_, text)| text).collect::<Vec<_>>());
                prop_assert!(have.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0), "{have:?}");
            }
            let cursors: BTreeMap<u64, u64> =
                store.restore().unwrap().cursors.iter().map(|(c, s)| (c.get(), s.get())).collect();
            prop_assert_eq!(&cursors, &received);
        }
        seen.extend(page(&store).into_iter().map(|(conversation, seq, _)| (conversation, seq)));
        prop_assert_eq!(seen, arrived);
    }
}
