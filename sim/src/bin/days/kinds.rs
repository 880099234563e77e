//! Typical days as data: which hours they are made of, and what each hour is like.
//!
//! Round figures of our own, chosen to be told apart; what an app and its users really do is for them to put in.
//!
//! Not here: living through them (`live`).

use fulmar_client::NetworkKind;
use fulmar_sim::Profile;
use fulmar_sim::net::Path;

/// A network of a day.
#[derive(Debug)]
pub(crate) struct Network {
    /// What the operating system calls it.
    pub(crate) name: &'static str,
    pub(crate) kind: NetworkKind,
    pub(crate) path: fn() -> Path,
    /// Seconds after which its NAT forgets a silent flow.
    pub(crate) nat_s: u64,
}

/// What the app does while nobody looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Background {
    /// It is suspended; a push of the vendor wakes it for a moment.
    Pushed,
    /// It stays connected.
    Connected,
}

/// What an hour is like.
#[derive(Debug)]
pub(crate) struct Hour {
    pub(crate) name: &'static str,
    /// The networks of the hour; it changes from one to the next so often that each comes once, or `moves` times in all.
    pub(crate) networks: &'static [&'static Network],
    /// Changes of network within the hour.
    pub(crate) moves: u64,
    pub(crate) background: Background,
    /// Times somebody looks at the phone.
    pub(crate) sessions: u64,
    /// Seconds each of them lasts.
    pub(crate) session_s: u64,
    /// Messages that are sent.
    pub(crate) sent: u64,
    /// Messages that come from one other person.
    pub(crate) direct: u64,
    /// Messages that come from a group of [`GROUP`] others.
    pub(crate) group: u64,
    /// Messages come in bursts of about so many.
    pub(crate) burst: u64,
}

/// A day: hours and how many of each, in their order.
#[derive(Debug)]
pub(crate) struct Day {
    pub(crate) name: &'static str,
    pub(crate) hours: &'static [(&'static Hour, u64)],
}

/// Others in the group.
pub(crate) const GROUP: usize = 12;

fn wifi() -> Path {
    Profile::Wifi.path()
}

/// A good cell: 60 ms, little jitter, little loss.
fn cell() -> Path {
    use fulmar_sim::net::{Delay, Impairment, Loss};
    use std::time::Duration;
    Path::symmetric(Impairment {
        delay: Delay::fixed(Duration::from_millis(25)).with_jitter(Duration::from_millis(10)),
        loss: Loss::random(fulmar_sim::Share::millionths(3_000)),
        ..Impairment::default()
    })
}

fn metro() -> Path {
    Profile::Metro.path()
}

fn edge() -> Path {
    Profile::RuralEdge.path()
}

fn roaming() -> Path {
    Profile::MobileTail.path()
}

fn hotel() -> Path {
    Profile::WifiWalkout.path()
}

const HOME: Network = Network { name: "home", kind: NetworkKind::Wifi, path: wifi, nat_s: 180 };
const OFFICE: Network = Network { name: "office", kind: NetworkKind::Wifi, path: wifi, nat_s: 120 };
const CELL: Network = Network { name: "cell", kind: NetworkKind::Cellular, path: cell, nat_s: 60 };
const METRO: Network = Network { name: "cell", kind: NetworkKind::Cellular, path: metro, nat_s: 60 };
const EDGE: Network = Network { name: "cell", kind: NetworkKind::Cellular, path: edge, nat_s: 60 };
const ROAMING: Network = Network { name: "abroad", kind: NetworkKind::Cellular, path: roaming, nat_s: 30 };
const HOTEL: Network = Network { name: "hotel", kind: NetworkKind::Wifi, path: hotel, nat_s: 60 };

const QUIET: Hour = Hour {
    name: "",
    networks: &[&HOME],
    moves: 0,
    background: Background::Pushed,
    sessions: 0,
    session_s: 0,
    sent: 0,
    direct: 0,
    group: 0,
    burst: 1,
};

const NIGHT: Hour = Hour { name: "night, suspended, nothing comes", ..QUIET };
const POCKET: Hour =
    Hour { name: "pocket, cell, 4 pushes", networks: &[&CELL], direct: 2, group: 2, ..QUIET };
const POCKET_CONNECTED: Hour = Hour {
    name: "the same, app stays connected",
    background: Background::Connected,
    networks: &[&CELL],
    direct: 2,
    group: 2,
    ..QUIET
};
const FRONT_IDLE: Hour = Hour {
    name: "on screen, cell, nothing said",
    background: Background::Connected,
    networks: &[&CELL],
    sessions: 1,
    session_s: 3_600,
    ..QUIET
};
const METRO_RIDE: Hour = Hour {
    name: "metro, 20 min on screen",
    networks: &[&METRO],
    sessions: 4,
    session_s: 300,
    sent: 6,
    direct: 12,
    group: 8,
    burst: 4,
    ..QUIET
};
const AT_WORK: Hour = Hour {
    name: "office Wi-Fi, 5 min on screen",
    networks: &[&OFFICE],
    sessions: 5,
    session_s: 60,
    sent: 2,
    direct: 4,
    group: 4,
    burst: 3,
    ..QUIET
};
const EVENING: Hour = Hour {
    name: "home Wi-Fi, 20 min on screen",
    sessions: 4,
    session_s: 300,
    sent: 6,
    direct: 10,
    group: 5,
    burst: 5,
    ..QUIET
};
const GROUP_CHAT: Hour = Hour {
    name: "group of 13, Wi-Fi, 30 min on screen",
    sessions: 6,
    session_s: 300,
    sent: 15,
    direct: 5,
    group: 150,
    burst: 15,
    ..QUIET
};
const GROUP_CONNECTED: Hour =
    Hour { name: "the same, app stays connected", background: Background::Connected, ..GROUP_CHAT };
const VILLAGE: Hour = Hour {
    name: "village on EDGE, 10 min on screen",
    networks: &[&EDGE],
    sessions: 4,
    session_s: 150,
    sent: 4,
    direct: 6,
    group: 4,
    burst: 3,
    ..QUIET
};
const ABROAD: Hour = Hour { name: "abroad, long tail, 10 min on screen", networks: &[&ROAMING], ..VILLAGE };
const STATION: Hour =
    Hour { name: "hotel and station, 6 changes, 10 min", networks: &[&HOTEL, &METRO], moves: 6, ..VILLAGE };

/// The days, the quietest first.
pub(crate) const DAYS: &[Day] = &[
    Day { name: "quiet", hours: &[(&NIGHT, 8), (&POCKET, 16)] },
    Day {
        name: "normal",
        hours: &[(&NIGHT, 8), (&METRO_RIDE, 1), (&AT_WORK, 8), (&METRO_RIDE, 1), (&EVENING, 2), (&POCKET, 4)],
    },
    Day { name: "heavy group chat", hours: &[(&NIGHT, 8), (&GROUP_CHAT, 16)] },
    Day { name: "travelling", hours: &[(&NIGHT, 6), (&VILLAGE, 6), (&STATION, 6), (&ABROAD, 6)] },
    Day {
        name: "never suspended",
        hours: &[(&FRONT_IDLE, 4), (&POCKET_CONNECTED, 12), (&GROUP_CONNECTED, 8)],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_24_hours_and_the_normal_one_its_messages() {
        for day in DAYS {
            assert_eq!(day.hours.iter().map(|(_, hours)| hours).sum::<u64>(), 24, "{}", day.name);
            for (hour, _) in day.hours {
                assert!(hour.sessions * hour.session_s <= 3_600, "{}", hour.name);
                assert!(hour.sent == 0 || hour.sessions > 0, "{}: who sends looks at the phone", hour.name);
                assert!(hour.burst > 0 && !hour.networks.is_empty(), "{}", hour.name);
            }
        }
        let normal = &DAYS[1];
        let sum = |count: fn(&Hour) -> u64| {
            normal.hours.iter().map(|(hour, hours)| count(hour) * hours).sum::<u64>()
        };
        assert_eq!(sum(|hour| hour.sent), 40);
        assert_eq!(sum(|hour| hour.direct + hour.group), 150);
        assert_eq!(sum(|hour| hour.sessions * hour.session_s), 7_200);
    }
}
