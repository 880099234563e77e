//! TLS sessions that phones may take up again with a ticket, each once.
//!
//! - At most as many as configured; beyond it those that were begun first are forgotten.
//! - Keeping one and taking one up cost the same however many there are. rustls' own `ServerSessionMemoryCache` looks through all of
//!   them whenever one is taken up, which at a hundred thousand is most of what a phone's return costs, and takes twice the memory.
//!
//! Not here: what is in a session (rustls), and how many tickets a phone gets (`tls`).

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustls::server::StoresServerSessions;

/// See the module's text.
pub(super) struct Sessions {
    most: usize,
    kept: Mutex<Kept>,
}

/// What a session is found by: the first bytes of rustls' key, which is 32 random ones. Nobody guesses half of them either.
type Key = [u8; 16];

fn short(key: &[u8]) -> Key {
    let mut short = Key::default();
    short.iter_mut().zip(key).for_each(|(short, key)| *short = *key);
    short
}

#[derive(Default)]
struct Kept {
    /// The number of each session, counted in the order of their beginnings.
    numbers: HashMap<Key, u64>,
    /// The sessions from number `first` on; nothing where one was taken up. The first one is there, unless there is none.
    values: VecDeque<Option<Value>>,
    first: u64,
}

struct Value {
    key: Key,
    session: Box<[u8]>,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Sessions are secrets.
        f.debug_struct("Sessions").field("most", &self.most).finish_non_exhaustive()
    }
}

impl Sessions {
    /// None yet, and never more than `most`.
    #[must_use]
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.max(1), kept: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Plain data whose invariants hold between any two statements that can panic.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn put(&mut self, key: Key, session: Vec<u8>, most: usize) {
        // A key that is used again: the older session is no more.
        self.take(&key);
        while self.numbers.len() >= most || self.values.len() >= most.saturating_mul(2) {
            self.forget_first();
        }
        let number = self.first + self.values.len() as u64;
        self.numbers.insert(key, number);
        self.values.push_back(Some(Value { key, session: session.into_boxed_slice() }));
    }

    fn forget_first(&mut self) {
        if let Some(value) = self.values.pop_front() {
            self.first += 1;
            if let Some(Value { key, .. }) = value {
                self.numbers.remove(&key);
            }
        }
        self.skip_taken();
    }

    fn skip_taken(&mut self) {
        while self.values.front().is_some_and(Option::is_none) {
            self.values.pop_front();
            self.first += 1;
        }
    }

    fn place(&self, number: u64) -> usize {
        // No number is below the first.
        usize::try_from(number.saturating_sub(self.first)).unwrap_or(usize::MAX)
    }

    fn get(&self, key: &Key) -> Option<&[u8]> {
        let place = self.place(*self.numbers.get(key)?);
        self.values.get(place)?.as_ref().map(|value| &*value.session)
    }

    fn take(&mut self, key: &Key) -> Option<Box<[u8]>> {
        let number = self.numbers.remove(key)?;
        let place = self.place(number);
        let taken = self.values.get_mut(place).and_then(Option::take);
        self.skip_taken();
        Some(taken?.session)
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.lock().put(short(&key), value, self.most);
        true
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.lock().get(&short(key)).map(<[u8]>::to_vec)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.lock().take(&short(key)).map(Vec::from)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Vec<u8> {
        n.to_be_bytes().to_vec()
    }

    #[test]
    fn a_session_is_taken_up_once_and_the_oldest_are_forgotten() {
        let sessions = Sessions::new(3);
        assert_eq!(sessions.take(&key(1)), None);
        for n in 1..=3 {
            assert!(sessions.put(key(n), key(n)));
        }
        assert_eq!(sessions.get(&key(2)), Some(key(2)), "looking takes nothing");
        assert_eq!(sessions.take(&key(2)), Some(key(2)));
        assert_eq!((sessions.take(&key(2)), sessions.get(&key(2))), (None, None));
        // One place is free, then the oldest goes.
        sessions.put(key(4), vec![4]);
        assert!(sessions.get(&key(1)).is_some());
        sessions.put(key(5), vec![5]);
        assert_eq!(sessions.get(&key(1)), None);
        sessions.put(key(5), vec![55]);
        assert_eq!(sessions.take(&key(5)), Some(vec![55]));
        assert_eq!([3, 4].map(|n| sessions.take(&key(n)).is_some()), [true, true]);
        let kept = sessions.lock();
        assert!(kept.numbers.is_empty() && kept.values.is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded_and_agrees_whatever_happens() {
        let most = 16;
        let sessions = Sessions::new(most);
        // The same each time: a congruential generator's upper bits.
        let mut state = 7u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        let mut kept: Vec<u32> = Vec::new();
        for _ in 0..20_000 {
            let n = random(60);
            if random(3) > 0 {
                sessions.put(key(n), key(n));
                kept.retain(|known| *known != n);
                kept.push(n);
            } else {
                let was_kept = sessions.take(&key(n)).is_some();
                assert!(!was_kept || kept.contains(&n));
                kept.retain(|known| *known != n);
            }
            if kept.len() > most {
                kept.remove(0);
            }
            let inner = sessions.lock();
            let there = inner.values.iter().flatten().count();
            assert_eq!(inner.numbers.len(), there);
            assert!(there <= most && inner.values.len() <= 2 * most, "{there}, {}", inner.values.len());
            assert!(inner.values.front().is_none_or(Option::is_some));
            // The last few are always there, whatever was taken up in between.
            assert!(kept.iter().rev().take(4).all(|n| inner.get(&short(&key(*n))) == Some(&key(*n)[..])));
        }
    }

    /// A phone that comes back: what it costs must not grow with those that are away. Looking through all of them would take
    /// 10^10 comparisons here, a quarter of an hour.
    #[test]
    fn a_hundred_thousand_sessions_are_taken_up_in_any_order() {
        let all = 100_000;
        let sessions = Sessions::new(all as usize);
        (0..all).for_each(|n| assert!(sessions.put(key(n), key(n))));
        // The younger half first: the first places stay taken all the time.
        for n in (0..all).rev() {
            assert_eq!(sessions.take(&key(n)), Some(key(n)));
        }
        assert!(sessions.lock().values.is_empty());
    }
}
