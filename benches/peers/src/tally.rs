//! What came of messages, and what a message carries so that this can be known.
//!
//! - Times count from when a message was due (in an open loop) or posted (where the sender waits for room).
//! - Only messages that were due within the measured time count for times; deliveries are counted whenever they come.
//! - A line is a sender and its readers; its messages are numbered from 1.
//!
//! Not here: what the kernel says of processes (`drive`).

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use fulmar_benches::times::Times;

use crate::plan::PAYLOAD_BYTES;

/// What a message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Its number on its line, from 1.
    pub(crate) number: u64,
    /// When it was due, nanoseconds after the beginning.
    pub(crate) due: u64,
}

impl Stamp {
    /// The message: the stamp, and `filler` up to its length.
    pub(crate) fn message(self, filler: &[u8]) -> Bytes {
        let mut message = BytesMut::with_capacity(PAYLOAD_BYTES);
        message.put_u64(self.number);
        message.put_u64(self.due);
        message.extend_from_slice(filler.get(message.len()..PAYLOAD_BYTES).unwrap_or_default());
        message.freeze()
    }

    /// Read off a message; `None`: it is none of ours.
    pub(crate) fn of(message: &[u8]) -> Option<Self> {
        let (number, rest) = message.split_first_chunk::<8>()?;
        let due = rest.first_chunk::<8>()?;
        Some(Self { number: u64::from_be_bytes(*number), due: u64::from_be_bytes(*due) })
    }
}

/// Which numbers one reader has had.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// All up to this one, except those in `gaps`.
    last: u64,
    gaps: Vec<u64>,
}

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The next one, or a later one.
    InOrder,
    /// After one that was sent later.
    Late,
    /// A second time.
    Again,
}

impl Seen {
    /// A message came.
    pub(crate) fn take(&mut self, number: u64) -> Arrival {
        if number > self.last {
            self.gaps.extend(self.last + 1..number);
            self.last = number;
            return Arrival::InOrder;
        }
        match self.gaps.iter().position(|gap| *gap == number) {
            Some(at) => {
                self.gaps.swap_remove(at);
                Arrival::Late
            }
            None => Arrival::Again,
        }
    }

    /// How many came, each counted once.
    pub(crate) fn count(&self) -> u64 {
        self.last - u64::try_from(self.gaps.len()).unwrap_or(self.last)
    }
}

/// The counts of one measurement.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Messages posted since the beginning of the measurement, the warm-up included.
    pub(crate) posted: u64,
    /// Messages acked.
    pub(crate) acked: u64,
    /// Deliveries, each counted once.
    pub(crate) delivered: u64,
    /// Deliveries after a later one.
    pub(crate) late: u64,
    /// Deliveries that came a second time.
    pub(crate) again: u64,
    /// From due to acked.
    pub(crate) ack: Times,
    /// From due to each reader.
    pub(crate) delivery: Times,
    /// How late a message was handed over.
    pub(crate) handed: Times,
}

impl Tally {
    /// A message came to a reader, `took` after it was due; `None`: its time does not count.
    pub(crate) fn came(&mut self, arrival: Arrival, took: Option<Duration>) {
        match arrival {
            Arrival::Again => {
                self.again += 1;
                return;
            }
            Arrival::Late => self.late += 1,
            Arrival::InOrder => {}
        }
        self.delivered += 1;
        if let Some(took) = took {
            self.delivery.add(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_comes_back_from_the_message() {
        let stamp = Stamp { number: 7, due: u64::MAX };
        let message = stamp.message(&[1; PAYLOAD_BYTES]);
        assert_eq!((message.len(), Stamp::of(&message)), (PAYLOAD_BYTES, Some(stamp)));
        assert_eq!(Stamp::of(&[0; 15]), None);
    }

    #[test]
    fn what_comes_late_or_twice_is_told_apart() {
        let mut seen = Seen::default();
        let arrivals = [1, 2, 5, 4, 4, 5, 6, 3].map(|number| seen.take(number));
        use Arrival::{Again, InOrder, Late};
        assert_eq!(arrivals, [InOrder, InOrder, InOrder, Late, Again, Again, InOrder, Late]);
        assert_eq!(seen.count(), 6);
        seen.take(9);
        assert_eq!(seen.count(), 7);
    }

    #[test]
    fn what_comes_twice_is_no_delivery() {
        let mut tally = Tally::default();
        let took = Some(Duration::from_millis(1));
        for arrival in [Arrival::InOrder, Arrival::Late, Arrival::Again] {
            tally.came(arrival, took);
        }
        tally.came(Arrival::InOrder, None);
        assert_eq!((tally.delivered, tally.late, tally.again, tally.delivery.len()), (3, 1, 1, 2));
    }
}
