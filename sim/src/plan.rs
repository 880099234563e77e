//! What goes wrong in a world, drawn from its seed before anything happens.
//!
//! - Each seed turns on a random subset of the faults, so that some worlds know only loss and others only crashes: what
//!   hides behind the noise of all faults together is found where only two meet.
//! - A fault that begins ends: within the plan, or with the calm that follows it.
//!
//! Not here: carrying it out (`people`), whether it bit (`bite`).

use std::time::Duration;

use fulmar_badnet::net::{Burst, DarkSpells, Delay, Impairment, Loss, Path, Rate, Reorder};
use fulmar_badnet::{Rng, Share};

use crate::disk::DiskManner;
use crate::network::Direction;

/// People in a world.
const USERS_MIN: u64 = 2;
const USERS_MAX: u64 = 4;

/// Something that happens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Deed {
    BlackOut {
        phone: usize,
        lasts: Duration,
    },
    Cut {
        phone: usize,
        direction: Direction,
        cut: bool,
    },
    Rebind {
        phone: usize,
    },
    NatIdleMax {
        phone: usize,
        idle_max: Duration,
    },
    ChangeNetwork {
        phone: usize,
        path: Box<Path>,
        told: bool,
    },
    LoseNetwork {
        phone: usize,
    },
    Block {
        phone: usize,
        udp: bool,
        data: bool,
    },
    Freeze {
        phone: usize,
        frozen: bool,
    },
    SetClock {
        phone: usize,
        ahead_ms: i64,
    },
    KillApp {
        phone: usize,
    },
    StartApp {
        phone: usize,
    },
    RestartApp {
        phone: usize,
    },
    /// The business gives the phone's app no more tokens, or does so again.
    LogOut {
        phone: usize,
    },
    LogIn {
        phone: usize,
    },
    SocketRoom {
        phone: usize,
        bytes: usize,
    },
    MuteDisk,
    CrashGateway,
    DrainGateway,
    StartGateway,
    Disk(DiskManner),
}

/// A deed and its moment, counted from when everybody knows everybody.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) deed: Deed,
}

/// One world's fate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// Which user each phone belongs to.
    pub(crate) phones: Vec<usize>,
    /// Members of each group, by user; the first is its owner.
    pub(crate) groups: Vec<Vec<usize>>,
    /// Whether there is a broadcast, to which everybody may send.
    pub(crate) broadcast: bool,
    /// The network each phone is in once everybody knows everybody.
    pub(crate) paths: Vec<Path>,
    /// Phones whose sockets die with their network.
    pub(crate) sockets_die: Vec<bool>,
    /// Mean time between two things a phone's user does.
    pub(crate) pause: Duration,
    /// Whether members come and go.
    pub(crate) moves: bool,
    /// How long the gateway keeps what was said, if not for good.
    pub(crate) kept_for: Option<Duration>,
    /// How long the tokens of each phone are good, if not for as long as the world lasts.
    pub(crate) tokens: Vec<Option<Duration>>,
    /// How long people talk and things go wrong.
    pub(crate) length: Duration,
    /// In order of time.
    pub(crate) deeds: Vec<Planned>,
}

struct Draw {
    rng: Rng,
    length: Duration,
    phones: u64,
    deeds: Vec<Planned>,
}

impl Draw {
    fn on(&mut self) -> bool {
        self.rng.chance(Share::percent(30))
    }

    fn share(&mut self, low_percent: u64, high_percent: u64) -> Share {
        Share::percent(u32::try_from(self.rng.between(low_percent, high_percent)).unwrap_or(0))
    }

    fn ms(&mut self, low: u64, high: u64) -> Duration {
        self.rng.duration(Duration::from_millis(low), Duration::from_millis(high))
    }

    fn at(&mut self) -> Duration {
        self.rng.duration(Duration::ZERO, self.length)
    }

    fn phone(&mut self) -> usize {
        usize::try_from(self.rng.below(self.phones)).unwrap_or(0)
    }

    fn times(&mut self, max: u64) -> u64 {
        self.rng.between(1, max)
    }

    fn plan(&mut self, at: Duration, deed: Deed) {
        self.deeds.push(Planned { at, deed });
    }
}

/// Faults of links that a world knows, with their strength.
#[derive(Default)]
struct Links {
    jitter: Option<Duration>,
    loss: Share,
    burst: Option<Burst>,
    reorder: Reorder,
    duplicate: Share,
    corrupt: Share,
    rate: Option<Rate>,
    mtu: Option<usize>,
    dark: Option<DarkSpells>,
}

impl Links {
    fn draw(draw: &mut Draw) -> Self {
        let mut links = Self::default();
        if draw.on() {
            links.jitter = Some(draw.ms(5, 120));
        }
        if draw.on() {
            links.loss = draw.share(1, 15);
        }
        if draw.on() {
            let (enter, leave, loss) = (draw.share(1, 4), draw.share(10, 40), draw.share(50, 100));
            links.burst = Some(Burst { enter, leave, loss });
        }
        if draw.on() {
            links.reorder = Reorder { share: draw.share(1, 10), hold: draw.ms(5, 80) };
        }
        if draw.on() {
            links.duplicate = draw.share(1, 10);
        }
        if draw.on() {
            links.corrupt = draw.share(1, 5);
        }
        if draw.on() {
            links.rate = Some(Rate::kbit(draw.rng.between(64, 2_000), draw.rng.between(4_000, 64_000)));
        }
        if draw.on() {
            links.mtu = Some(usize::try_from(draw.rng.between(1_200, 1_440)).unwrap_or(1_200));
        }
        if draw.on() {
            links.dark = Some(DarkSpells { every: draw.ms(2_000, 20_000), lasts: draw.ms(100, 3_000) });
        }
        links
    }

    fn path(&self, draw: &mut Draw) -> Path {
        let one_way = draw.ms(2, 200);
        let way = |delay| Impairment {
            delay: Delay::fixed(delay).with_jitter(self.jitter.unwrap_or_default()),
            loss: Loss { random: self.loss, burst: self.burst },
            reorder: self.reorder,
            duplicate: self.duplicate,
            corrupt: self.corrupt,
            rate: self.rate,
            mtu: self.mtu,
            dark: self.dark,
        };
        Path { up: way(one_way), down: way(one_way) }
    }
}

/// A network in which nothing goes wrong, 20 ms away: what the calm is like.
pub(crate) fn calm_path() -> Path {
    Path::symmetric(Impairment { delay: Delay::fixed(Duration::from_millis(20)), ..Impairment::default() })
}

impl Plan {
    /// The fate of the world with this seed.
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed).fork(100);
        let users = rng.between(USERS_MIN, USERS_MAX);
        let mut phones: Vec<usize> = (0..users).filter_map(|user| usize::try_from(user).ok()).collect();
        if rng.chance(Share::percent(30)) {
            phones.push(usize::try_from(rng.below(users)).unwrap_or(0));
        }
        let mut groups = Vec::new();
        for _ in 0..rng.between(1, 2) {
            let mut members: Vec<usize> = phones.clone();
            members.sort_unstable();
            members.dedup();
            rng.shuffle(&mut members);
            let keep = usize::try_from(rng.between(2, users)).unwrap_or(2);
            members.truncate(keep);
            groups.push(members);
        }
        let length = rng.duration(Duration::from_secs(10), Duration::from_secs(30));
        let pause = rng.duration(Duration::from_millis(300), Duration::from_millis(2_500));
        let moves = rng.chance(Share::percent(30));
        let count = phones.len() as u64;
        let mut draw = Draw { rng, length, phones: count, deeds: Vec::new() };
        let links = Links::draw(&mut draw);
        let paths = phones.iter().map(|_| links.path(&mut draw)).collect();
        let die = draw.on();
        let sockets_die = phones.iter().map(|_| die && draw.rng.chance(Share::percent(50))).collect();
        draw_networks(&mut draw, &links);
        draw_phones(&mut draw);
        draw_gateway(&mut draw);
        // Chance of their own: what came to the plan later changes nothing of what a seed meant before.
        draw.rng = Rng::new(seed).fork(101);
        draw_later(&mut draw);
        let tokens = draw_sessions(&mut draw);
        let kept_for = draw.on().then(|| Duration::from_secs(draw.rng.between(4, 10)));
        draw.rng = Rng::new(seed).fork(102);
        let broadcast = draw.on();
        let mut deeds = draw.deeds;
        deeds.retain(|planned| planned.at <= length);
        // Stable, so that a beginning stays before its end.
        deeds.sort_by_key(|planned| planned.at);
        Self { phones, groups, broadcast, paths, sockets_die, pause, moves, kept_for, tokens, length, deeds }
    }
}

fn draw_networks(draw: &mut Draw, links: &Links) {
    if draw.on() {
        for _ in 0..draw.times(3) {
            let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(200, 12_000));
            draw.plan(at, Deed::BlackOut { phone, lasts });
        }
    }
    if draw.on() {
        for _ in 0..draw.times(2) {
            let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(200, 8_000));
            let direction = if draw.rng.chance(Share::percent(50)) { Direction::Up } else { Direction::Down };
            draw.plan(at, Deed::Cut { phone, direction, cut: true });
            draw.plan(at + lasts, Deed::Cut { phone, direction, cut: false });
        }
    }
    if draw.on() {
        for _ in 0..draw.times(4) {
            let (at, phone) = (draw.at(), draw.phone());
            draw.plan(at, Deed::Rebind { phone });
        }
    }
    if draw.on() {
        let (phone, idle_max) = (draw.phone(), draw.ms(500, 8_000));
        draw.plan(Duration::ZERO, Deed::NatIdleMax { phone, idle_max });
    }
    if draw.on() {
        for _ in 0..draw.times(3) {
            let (at, phone) = (draw.at(), draw.phone());
            let (path, told) = (Box::new(links.path(draw)), draw.rng.chance(Share::percent(50)));
            draw.plan(at, Deed::ChangeNetwork { phone, path, told });
        }
    }
    if draw.on() {
        let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(500, 10_000));
        let (path, told) = (Box::new(links.path(draw)), draw.rng.chance(Share::percent(50)));
        draw.plan(at, Deed::LoseNetwork { phone });
        draw.plan(at + lasts, Deed::ChangeNetwork { phone, path, told });
    }
    if draw.on() {
        let (phone, lasts) = (draw.phone(), draw.ms(2_000, 20_000));
        let from_start = draw.rng.chance(Share::percent(50));
        let at = if from_start { Duration::ZERO } else { draw.at() };
        if from_start {
            draw.plan(at, Deed::KillApp { phone });
        }
        draw.plan(at, Deed::Block { phone, udp: true, data: false });
        if from_start {
            draw.plan(at, Deed::StartApp { phone });
        }
        draw.plan(at + lasts, Deed::Block { phone, udp: false, data: false });
    }
    if draw.on() {
        let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(2_000, 20_000));
        draw.plan(at, Deed::Block { phone, udp: false, data: true });
        draw.plan(at + lasts, Deed::Block { phone, udp: false, data: false });
    }
}

fn draw_phones(draw: &mut Draw) {
    if draw.on() {
        for _ in 0..draw.times(3) {
            let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(100, 15_000));
            draw.plan(at, Deed::Freeze { phone, frozen: true });
            draw.plan(at + lasts, Deed::Freeze { phone, frozen: false });
        }
    }
    if draw.on() {
        for _ in 0..draw.times(2) {
            let (at, phone) = (draw.at(), draw.phone());
            let by = i64::try_from(draw.rng.below(86_400_000)).unwrap_or(0);
            let ahead_ms = if draw.rng.chance(Share::percent(50)) { by } else { -by };
            draw.plan(at, Deed::SetClock { phone, ahead_ms });
        }
    }
    if draw.on() {
        for _ in 0..draw.times(3) {
            let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(0, 5_000));
            draw.plan(at, Deed::KillApp { phone });
            draw.plan(at + lasts, Deed::StartApp { phone });
        }
    }
    if draw.on() {
        let (at, phone) = (draw.at(), draw.phone());
        draw.plan(at, Deed::RestartApp { phone });
    }
}

fn draw_gateway(draw: &mut Draw) {
    if draw.on() {
        for _ in 0..draw.times(3) {
            let (at, lasts) = (draw.at(), draw.ms(50, 6_000));
            draw.plan(at, Deed::CrashGateway);
            draw.plan(at + lasts, Deed::StartGateway);
        }
    }
    if draw.on() {
        let (at, lasts) = (draw.at(), draw.ms(50, 3_000));
        draw.plan(at, Deed::DrainGateway);
        draw.plan(at + lasts, Deed::StartGateway);
    }
    let (slow, failing, late) = (draw.on(), draw.on(), draw.on());
    if slow || failing || late {
        let mut manner = DiskManner::default();
        if slow {
            manner.slow = draw.share(2, 20);
            manner.slow_commit = draw.ms(50, 2_000);
        }
        if failing {
            manner.failing = draw.share(1, 10);
        }
        if late {
            manner.answer = draw.ms(1, 100);
        }
        draw.plan(Duration::ZERO, Deed::Disk(manner));
    }
}

fn draw_later(draw: &mut Draw) {
    if draw.on() {
        // Of a phone that is suspended while others write, a few packets fit.
        for _ in 0..draw.times(2) {
            let (at, phone, lasts) = (draw.at(), draw.phone(), draw.ms(2_000, 15_000));
            let bytes = usize::try_from(draw.rng.between(1_200, 4_000)).unwrap_or(1_200);
            draw.plan(at, Deed::SocketRoom { phone, bytes });
            draw.plan(at, Deed::Freeze { phone, frozen: true });
            draw.plan(at + lasts, Deed::Freeze { phone, frozen: false });
        }
    }
    if draw.on() {
        for _ in 0..draw.times(2) {
            let (at, mute, lasts) = (draw.at(), draw.ms(50, 1_500), draw.ms(50, 4_000));
            draw.plan(at, Deed::MuteDisk);
            draw.plan(at + mute, Deed::CrashGateway);
            draw.plan(at + mute + lasts, Deed::StartGateway);
        }
    }
}

/// Tokens of a few seconds, and a business that does not renew them for a while. An app that is killed is told once more what it had
/// not taken in, with or without a session: what it says then proves nothing. So only apps that live all the time are logged out.
fn draw_sessions(draw: &mut Draw) -> Vec<Option<Duration>> {
    let count = usize::try_from(draw.phones).unwrap_or(0);
    let mut tokens = vec![None; count];
    if !draw.on() {
        return tokens;
    }
    let phone = draw.phone();
    let killed = draw.deeds.iter().any(|planned| {
        matches!(planned.deed, Deed::KillApp { phone: of } | Deed::RestartApp { phone: of } if of == phone)
    });
    if let Some(good_for) = tokens.get_mut(phone) {
        *good_for = Some(Duration::from_secs(draw.rng.between(2, 8)));
    }
    if !killed {
        let (at, lasts) = (draw.at(), draw.ms(2_000, 15_000));
        draw.plan(at, Deed::LogOut { phone });
        draw.plan(at + lasts, Deed::LogIn { phone });
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_repeat_are_in_order_and_differ() {
        let mut deeds = 0;
        for seed in 0..200 {
            let plan = Plan::of(seed);
            assert_eq!(plan, Plan::of(seed));
            assert!(plan.deeds.windows(2).all(|pair| pair[0].at <= pair[1].at));
            assert!(plan.phones.len() >= 2 && plan.groups.iter().all(|group| group.len() >= 2));
            assert_eq!(plan.paths.len(), plan.phones.len());
            deeds += plan.deeds.len();
        }
        assert!(deeds > 1_000, "{deeds}");
    }
}
