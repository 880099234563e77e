//! The wire between the two namespaces: it takes IP packets from one interface, lets them wait or vanish, and gives the
//! rest to the other.
//!
//! - What happens to a packet is decided by [`fulmar_badnet::net::Link`], one per direction, from the seed.
//! - Until [`Wire::turn_bad`] the wire only takes its time, so that everybody connects the same way.
//! - Dark spells hit both directions at the same moments, as when a phone is in a tunnel.
//! - At most [`WAITING_MAX`] packets wait per direction; what comes on top is dropped and counted.
//! - The wire says how late it was itself: a figure taken on a wire that is often late is the machine's.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fulmar_badnet::{
    Rng, SimTime,
    net::{DropCause, Impairment, Link, Verdict},
};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use crate::plan::{self, Condition, Spells};

/// Packets that may wait in one direction: some 6 MB, far above what the work keeps in flight.
const WAITING_MAX: usize = 4_096;

/// Largest packet an interface hands over.
const PACKET_BYTES_MAX: usize = 65_535;

/// Packets that are read before those that are due are looked at again.
const READS_MAX: usize = 64;

/// How often an idle direction looks whether it shall stop or turn bad.
const LOOK_UP: Duration = Duration::from_millis(20);

/// What one direction did to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Packets that came in and were not blocked.
    pub(crate) packets: u64,
    /// Their bytes, IP headers included.
    pub(crate) bytes: u64,
    /// Dropped at random.
    pub(crate) lost: u64,
    /// Dropped in a dark spell.
    pub(crate) dark: u64,
    /// Dropped because they were UDP.
    pub(crate) blocked: u64,
    /// Dropped because too many waited, or because the interface took no more: never on purpose.
    pub(crate) overflow: u64,
}

impl Counts {
    /// What was added since `before`.
    pub(crate) const fn since(self, before: Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            bytes: self.bytes - before.bytes,
            lost: self.lost - before.lost,
            dark: self.dark - before.dark,
            blocked: self.blocked - before.blocked,
            overflow: self.overflow - before.overflow,
        }
    }
}

/// A packet on its way; the earliest first, in the order they came.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    at: SimTime,
    number: u64,
    packet: Vec<u8>,
}

/// One direction, without sockets and clock.
#[derive(Debug)]
struct Direction {
    link: Link,
    rng: Rng,
    udp: bool,
    /// When it turned bad, and the spells from then on.
    bad: Option<(SimTime, Spells)>,
    next_spell: Option<(SimTime, SimTime)>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    offered: u64,
    counts: Counts,
}

impl Direction {
    fn new(impairment: Impairment, rng: Rng, udp: bool) -> Self {
        Self {
            link: Link::new(impairment),
            rng,
            udp,
            bad: None,
            next_spell: None,
            waiting: BinaryHeap::new(),
            offered: 0,
            counts: Counts::default(),
        }
    }

    fn turn_bad(&mut self, from: SimTime, impairment: Impairment, spells: Spells) {
        self.link.set(impairment);
        self.bad = Some((from, spells));
        self.next_spell = self.draw_spell();
    }

    fn draw_spell(&mut self) -> Option<(SimTime, SimTime)> {
        let (begin, spells) = self.bad.as_mut()?;
        spells.next().map(|(from, to)| (*begin + from, *begin + to))
    }

    /// Takes a packet in and says in a word what becomes of it.
    fn offer(&mut self, now: SimTime, mut packet: Vec<u8>) -> &'static str {
        while let Some((from, to)) = self.next_spell
            && from <= now
        {
            self.link.black_out(to);
            self.next_spell = self.draw_spell();
        }
        if !self.udp && is_udp(&packet) {
            self.counts.blocked += 1;
            return "blocked";
        }
        self.counts.packets += 1;
        self.counts.bytes += u64::try_from(packet.len()).unwrap_or_default();
        match self.link.offer(now, packet.len(), &mut self.rng) {
            Verdict::Drop(DropCause::Dark) => {
                self.counts.dark += 1;
                "dark"
            }
            Verdict::Drop(_) => {
                self.counts.lost += 1;
                "lost"
            }
            Verdict::Deliver(arrival) => {
                if let Some(bit) = arrival.flipped_bit
                    && let Ok(byte) = usize::try_from(bit / 8)
                    && let Some(byte) = packet.get_mut(byte)
                {
                    *byte ^= 1 << (bit % 8);
                }
                if let Some(again) = arrival.again_at {
                    self.wait(again, packet.clone());
                }
                self.wait(arrival.at, packet);
                "carried"
            }
        }
    }

    fn wait(&mut self, at: SimTime, packet: Vec<u8>) {
        if self.waiting.len() >= WAITING_MAX {
            self.counts.overflow += 1;
            return;
        }
        self.offered += 1;
        self.waiting.push(Reverse(Waiting { at, number: self.offered, packet }));
    }

    fn next_at(&self) -> Option<SimTime> {
        self.waiting.peek().map(|Reverse(waiting)| waiting.at)
    }

    /// A packet that has arrived by `now`, and when it should have.
    fn arrived(&mut self, now: SimTime) -> Option<(SimTime, Vec<u8>)> {
        if self.next_at()? > now {
            return None;
        }
        self.waiting.pop().map(|Reverse(waiting)| (waiting.at, waiting.packet))
    }
}

/// Whether this is an IPv4 packet with UDP in it.
fn is_udp(packet: &[u8]) -> bool {
    const UDP: u8 = 17;
    packet.first().is_some_and(|first| first >> 4 == 4) && packet.get(9) == Some(&UDP)
}

/// The larger of the two ports of an IPv4 packet without options: the client's, which the kernel chose.
fn client_port(packet: &[u8]) -> Option<u16> {
    let ports = packet.get(20..24)?.as_chunks().0.iter().map(|port: &[u8; 2]| u16::from_be_bytes(*port));
    ports.max()
}

/// What a direction tells the rest of the program.
#[derive(Debug)]
struct Shared {
    counts: Counts,
    /// How much later than they should packets were handed over, µs.
    late: Histogram<u64>,
}

/// Both directions, each in a thread of its own.
#[derive(Debug)]
pub(crate) struct Wire {
    stop: Arc<AtomicBool>,
    bad_from: Arc<OnceLock<Instant>>,
    up: Arc<Mutex<Shared>>,
    down: Arc<Mutex<Shared>>,
    threads: Vec<JoinHandle<()>>,
}

/// What becomes of the wire when it turns bad.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// The round trip.
    pub(crate) rtt: Duration,
    /// What else it does.
    pub(crate) condition: Condition,
    /// Where its chance comes from.
    pub(crate) seed: u64,
    /// UDP gets through; else it is dropped from the start, as where a firewall does it.
    pub(crate) udp: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counters only: nothing is left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// Joins the clients' interface `near` to the server's, `far`.
    ///
    /// # Errors
    /// No thread can be had.
    pub(crate) fn start(near: OwnedFd, far: OwnedFd, weather: Weather) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let bad_from = Arc::new(OnceLock::new());
        let (near, far) = (Arc::new(near), Arc::new(far));
        let begin = Instant::now();
        let mut threads = Vec::new();
        let mut start = |way: &'static str, number: u64, from: &Arc<OwnedFd>, to: &Arc<OwnedFd>| {
            let late = Histogram::new_with_bounds(1, 60_000_000, 3)?;
            let shared = Arc::new(Mutex::new(Shared { counts: Counts::default(), late }));
            let carrier = Carrier {
                way,
                from: Arc::clone(from),
                to: Arc::clone(to),
                begin,
                weather,
                direction: Direction::new(
                    plan::calm(weather.rtt),
                    plan::link_rng(weather.seed, number),
                    weather.udp,
                ),
                stop: Arc::clone(&stop),
                bad_from: Arc::clone(&bad_from),
                shared: Arc::clone(&shared),
            };
            threads
                .push(std::thread::Builder::new().name(format!("wire-{way}")).spawn(move || carrier.run())?);
            anyhow::Ok(shared)
        };
        let up = start("up", 0, &near, &far)?;
        let down = start("down", 1, &far, &near)?;
        Ok(Self { stop, bad_from, up, down, threads })
    }

    /// From `from` on the wire is as bad as its weather. Once.
    pub(crate) fn turn_bad(&self, from: Instant) {
        self.bad_from.get_or_init(|| from);
    }

    /// What it has done to packets so far: towards the server, from the server.
    pub(crate) fn counts(&self) -> [Counts; 2] {
        [lock(&self.up).counts, lock(&self.down).counts]
    }

    /// How late it handed packets over, µs.
    pub(crate) fn late(&self) -> Histogram<u64> {
        let mut late = lock(&self.up).late.clone();
        // Equal bounds: adding can't fail.
        let _ = late.add(&lock(&self.down).late);
        late
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The thread of one direction.
struct Carrier {
    way: &'static str,
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    begin: Instant,
    weather: Weather,
    direction: Direction,
    stop: Arc<AtomicBool>,
    bad_from: Arc<OnceLock<Instant>>,
    shared: Arc<Mutex<Shared>>,
}

impl Carrier {
    fn run(mut self) {
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        let mut bad = false;
        while !self.stop.load(Ordering::Acquire) {
            if !bad && let Some(from) = self.bad_from.get().filter(|from| Instant::now() >= **from) {
                bad = true;
                let Weather { rtt, condition, seed, .. } = self.weather;
                let from = self.moment(*from);
                self.direction.turn_bad(from, condition.impairment(rtt), condition.spells(seed));
            }
            self.sleep();
            for _ in 0..READS_MAX {
                // Whatever the error is: there is nothing to read now, and an end is told by `stop`.
                let Ok(length @ 1..) = rustix::io::read(&self.from, &mut buffer) else { break };
                let packet = buffer.get(..length).unwrap_or_default().to_vec();
                let now = self.moment(Instant::now());
                if tracing::enabled!(tracing::Level::TRACE) {
                    let (bytes, port) = (packet.len(), client_port(&packet));
                    let fate = self.direction.offer(now, packet);
                    tracing::trace!(way = self.way, ?port, bytes, fate, "packet");
                } else {
                    self.direction.offer(now, packet);
                }
            }
            self.hand_over();
        }
    }

    /// Until there is something to read or to hand over.
    fn sleep(&self) {
        let now = self.moment(Instant::now());
        let wait = self.direction.next_at().map_or(LOOK_UP, |at| at.since(now).min(LOOK_UP));
        let timeout =
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut readable = [PollFd::from_borrowed_fd(self.from.as_fd(), PollFlags::IN)];
        // Woken too early it looks around and sleeps again.
        let _ = rustix::event::poll(&mut readable, Some(&timeout));
    }

    fn hand_over(&mut self) {
        let now = self.moment(Instant::now());
        let mut shared = lock(&self.shared);
        while let Some((due, packet)) = self.direction.arrived(now) {
            shared.late.saturating_record(u64::try_from(now.since(due).as_micros()).unwrap_or(u64::MAX));
            if rustix::io::write(&self.to, &packet).is_err() {
                self.direction.counts.overflow += 1;
            }
        }
        shared.counts = self.direction.counts;
    }

    fn moment(&self, at: Instant) -> SimTime {
        SimTime::START + at.saturating_duration_since(self.begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);

    fn direction() -> Direction {
        Direction::new(plan::calm(RTT), plan::link_rng(1, 0), true)
    }

    #[test]
    fn packets_arrive_half_a_round_trip_later_in_their_order() {
        let mut direction = direction();
        for number in 0..10u8 {
            direction.offer(SimTime::from_millis(number.into()), vec![number; 10]);
        }
        assert_eq!(direction.arrived(SimTime::from_millis(49)), None);
        for number in 0..10u8 {
            let at = SimTime::from_millis(50 + u64::from(number));
            assert_eq!(direction.next_at(), Some(at));
            assert_eq!(direction.arrived(at), Some((at, vec![number; 10])));
        }
        assert_eq!(direction.next_at(), None);
        assert_eq!(direction.counts, Counts { packets: 10, bytes: 100, ..Counts::default() });
    }

    #[test]
    fn both_directions_are_dark_at_the_same_moments() {
        let condition = Condition::named("dark-10").unwrap();
        let dark = |number: u64| {
            let mut direction = Direction::new(plan::calm(RTT), plan::link_rng(5, number), true);
            direction.turn_bad(SimTime::from_millis(1_000), condition.impairment(RTT), condition.spells(5));
            (0..60_000u64)
                .filter(|ms| {
                    let before = direction.counts.dark;
                    let now = SimTime::from_millis(*ms);
                    direction.offer(now, vec![0; 1]);
                    while direction.arrived(now).is_some() {}
                    direction.counts.dark > before
                })
                .collect::<Vec<_>>()
        };
        let (up, down) = (dark(0), dark(1));
        assert_eq!(up, down);
        assert!((3_000..9_000).contains(&up.len()), "{} ms of a minute", up.len());
        assert!(up.iter().all(|ms| *ms >= 1_000), "it was calm until then");
        assert!(up.windows(2).filter(|two| two[1] != two[0] + 1).count() < up.len() / 150, "in spells");
    }

    #[test]
    fn loss_begins_when_it_turns_bad() {
        let condition = Condition::named("loss-10").unwrap();
        let mut direction = direction();
        let offer_all = |direction: &mut Direction, from: u64| {
            for ms in from..from + 10_000 {
                direction.offer(SimTime::from_millis(ms), vec![0; 1]);
                while direction.arrived(SimTime::from_millis(ms)).is_some() {}
            }
            direction.counts.lost
        };
        assert_eq!(offer_all(&mut direction, 0), 0);
        direction.turn_bad(SimTime::from_millis(10_000), condition.impairment(RTT), condition.spells(1));
        let lost = offer_all(&mut direction, 10_000);
        assert!((900..1_100).contains(&lost), "{lost}");
    }

    #[test]
    fn udp_alone_is_blocked() {
        let packet = |first: u8, protocol: u8| {
            let mut packet = vec![0; 28];
            (packet[0], packet[9]) = (first, protocol);
            packet
        };
        let mut direction = Direction::new(plan::calm(RTT), plan::link_rng(1, 0), false);
        // UDP, TCP, ICMP, IPv6 with something at that place, and what is no packet.
        for packet in [packet(0x45, 17), packet(0x45, 6), packet(0x45, 1), packet(0x60, 17), vec![0x45]] {
            direction.offer(SimTime::START, packet);
        }
        assert_eq!((direction.counts.blocked, direction.counts.packets), (1, 4));
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut direction = direction();
        for _ in 0..WAITING_MAX + 5 {
            direction.offer(SimTime::START, vec![0; 1]);
        }
        assert_eq!((direction.waiting.len(), direction.counts.overflow), (WAITING_MAX, 5));
    }
}
