//! The proxy between real sockets on loopback.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "helpers of tests")]

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use fulmar_badnet::fault::{Fault, Planned, Target};
use fulmar_badnet::net::{Impairment, Loss, Reorder};
use fulmar_badnet::proxy::{Config, Error, Proxy, Totals};
use fulmar_badnet::{FaultPlan, Path, Profile, Share, SimTime};

/// Long enough for any machine; a test that meets it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 2_048];
    let (len, from) = socket.recv_from(&mut buffer).expect("a packet in time");
    (buffer[..len].to_vec(), from)
}

/// A packet that is there or comes in a moment.
fn receive_now(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 2_048];
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let got = socket.recv_from(&mut buffer).ok();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    got.map(|(len, _)| buffer[..len].to_vec())
}

/// Until the counters say so.
fn wait_for(proxy: &Proxy, what: &str, reached: impl Fn(&Totals) -> bool) -> Totals {
    let until = Instant::now() + PATIENCE;
    loop {
        let totals = proxy.totals();
        if reached(&totals) {
            return totals;
        }
        assert!(Instant::now() < until, "{what} did not come: {totals:?}");
        std::thread::yield_now();
    }
}

#[test]
fn packets_pass_both_ways_and_are_counted() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    let phone = socket();
    phone.send_to(b"ping", proxy.addr()).unwrap();
    let (packet, seen_as) = receive(&gateway);
    assert_eq!(packet, b"ping");
    assert_ne!(seen_as, phone.local_addr().unwrap());
    gateway.send_to(b"answer", seen_as).unwrap();
    assert_eq!(receive(&phone), (b"answer".to_vec(), proxy.addr()));
    let flows = proxy.flows();
    assert_eq!(flows.len(), 1);
    assert_eq!(flows[0].client, phone.local_addr().unwrap());
    assert_eq!(flows[0].gateway_side_port, seen_as.port());
    let totals = proxy.stop();
    assert_eq!((totals.up.packets, totals.up.bytes, totals.up.delivered), (1, 4, 1));
    assert_eq!((totals.down.packets, totals.down.bytes, totals.down.delivered), (1, 6, 1));
    assert_eq!(totals.wire_bytes(), 10);
}

#[test]
fn each_client_is_a_flow_of_its_own() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap()).seed(1)).unwrap();
    let phones: Vec<UdpSocket> = (0..100).map(|_| socket()).collect();
    let mut ports = HashSet::new();
    for (n, phone) in phones.iter().enumerate() {
        phone.send_to(&[u8::try_from(n).unwrap()], proxy.addr()).unwrap();
        let (packet, seen_as) = receive(&gateway);
        assert_eq!(usize::from(packet[0]), n);
        assert!(ports.insert(seen_as.port()));
        gateway.send_to(&packet, seen_as).unwrap();
    }
    for (n, phone) in phones.iter().enumerate() {
        assert_eq!(usize::from(receive(phone).0[0]), n);
        let flow = proxy.flow_of_port(phone.local_addr().unwrap().port()).unwrap();
        assert_eq!(usize::try_from(flow.0).unwrap(), n);
    }
    assert_eq!(proxy.stop().flows_ever, 100);
}

#[test]
fn a_rebinding_shows_the_gateway_a_new_port() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    let before = receive(&gateway).1;
    let flow = proxy.flow_of_port(phone.local_addr().unwrap().port()).unwrap();
    proxy.rebind(flow).unwrap();
    wait_for(&proxy, "the rebinding", |totals| totals.rebinds == 1);
    phone.send_to(b"2", proxy.addr()).unwrap();
    let after = receive(&gateway).1;
    assert_ne!(before.port(), after.port());
    gateway.send_to(b"to the old port", before).unwrap();
    gateway.send_to(b"to the new port", after).unwrap();
    assert_eq!(receive(&phone).0, b"to the new port");
    assert_eq!(proxy.flow_of_port(phone.local_addr().unwrap().port()), Some(flow));
}

#[test]
fn a_blackout_meets_one_flow_and_ends() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    let (dark, light) = (socket(), socket());
    for phone in [&dark, &light] {
        phone.send_to(b"hello", proxy.addr()).unwrap();
        receive(&gateway);
    }
    let flow = proxy.flow_of_port(dark.local_addr().unwrap().port()).unwrap();
    proxy.blackout(flow, Duration::from_secs(3_600)).unwrap();
    wait_for(&proxy, "the blackout", |totals| totals.blackouts == 1);
    dark.send_to(b"lost", proxy.addr()).unwrap();
    wait_for(&proxy, "the drop", |totals| totals.up.dark == 1);
    light.send_to(b"through", proxy.addr()).unwrap();
    assert_eq!(receive(&gateway).0, b"through");
    // A new address of the same phone is a new flow, as after a change of network.
    let moved = socket();
    moved.send_to(b"elsewhere", proxy.addr()).unwrap();
    assert_eq!(receive(&gateway).0, b"elsewhere");
}

#[test]
fn a_gateway_that_dies_and_comes_back_is_met_again() {
    let gateway = socket();
    let addr = gateway.local_addr().unwrap();
    let proxy = Proxy::start(Config::towards(addr)).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    let seen_as = receive(&gateway).1;
    drop(gateway);
    let until = Instant::now() + PATIENCE;
    while proxy.totals().up.refused < 3 {
        phone.send_to(b"into the void", proxy.addr()).unwrap();
        assert!(Instant::now() < until, "nothing was refused: {:?}", proxy.totals());
        std::thread::yield_now();
    }
    let sent = proxy.totals().up.packets;
    wait_for(&proxy, "the rest", |totals| totals.up.packets >= sent);
    let gateway = UdpSocket::bind(addr).unwrap();
    gateway.set_read_timeout(Some(PATIENCE)).unwrap();
    let until = Instant::now() + PATIENCE;
    // The first packet may still be answered by the last refusal.
    gateway.set_nonblocking(true).unwrap();
    let again = loop {
        phone.send_to(b"2", proxy.addr()).unwrap();
        let mut buffer = [0; 64];
        match gateway.recv_from(&mut buffer) {
            Ok((_, from)) => break from,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < until, "not met again");
        std::thread::yield_now();
    };
    assert_eq!(again, seen_as, "the flow kept its port");
}

#[test]
fn a_gateway_that_moves_is_followed() {
    let (old, new) = (socket(), socket());
    let proxy = Proxy::start(Config::towards(old.local_addr().unwrap())).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    receive(&old);
    proxy.set_gateway(new.local_addr().unwrap()).unwrap();
    wait_for(&proxy, "the move", |totals| totals.rebinds == 1);
    phone.send_to(b"2", proxy.addr()).unwrap();
    assert_eq!(receive(&new).0, b"2");
}

#[test]
fn a_path_changes_live() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    receive(&gateway);
    let broken = Impairment { loss: Loss::random(Share::ALL), ..Impairment::default() };
    proxy.set_path(Path { up: broken, down: Impairment::default() }).unwrap();
    let until = Instant::now() + PATIENCE;
    while proxy.totals().up.lost == 0 {
        phone.send_to(b"maybe", proxy.addr()).unwrap();
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
    // New flows meet the new path, too; one flow can be set apart from the others.
    let other = socket();
    other.send_to(b"lost", proxy.addr()).unwrap();
    wait_for(&proxy, "the loss", |_| {
        proxy.flows().last().is_some_and(|flow| flow.flow.0 == 1 && flow.up.lost == 1)
    });
    let flow = proxy.flow_of_port(other.local_addr().unwrap().port()).unwrap();
    proxy.set_flow_path(flow, Profile::Clean).unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        other.send_to(b"through", proxy.addr()).unwrap();
        while let Some(packet) = receive_now(&gateway) {
            if packet == b"through" {
                return;
            }
        }
        assert!(Instant::now() < until);
    }
}

#[test]
fn order_is_kept_without_reordering_and_lost_with_it() {
    for (share, ordered) in [(Share::NONE, true), (Share::percent(30), false)] {
        let gateway = socket();
        let direction = Impairment {
            delay: fulmar_badnet::net::Delay::fixed(Duration::from_millis(5))
                .with_jitter(Duration::from_millis(20)),
            reorder: Reorder { share, hold: Duration::from_millis(40) },
            ..Impairment::default()
        };
        let config = Config::towards(gateway.local_addr().unwrap()).seed(9).path(Path::symmetric(direction));
        let proxy = Proxy::start(config).unwrap();
        let phone = socket();
        for n in 0..200u16 {
            phone.send_to(&n.to_be_bytes(), proxy.addr()).unwrap();
        }
        let got: Vec<u16> =
            (0..200).map(|_| u16::from_be_bytes(receive(&gateway).0.try_into().unwrap())).collect();
        assert_eq!(got.is_sorted(), ordered, "{got:?}");
        let distinct: HashSet<u16> = got.into_iter().collect();
        assert_eq!(distinct.len(), 200);
    }
}

#[test]
fn second_copies_and_damage_come_through() {
    let gateway = socket();
    let both = Impairment { duplicate: Share::ALL, corrupt: Share::ALL, ..Impairment::default() };
    let config = Config::towards(gateway.local_addr().unwrap()).seed(3).path(Path::symmetric(both));
    let proxy = Proxy::start(config).unwrap();
    let phone = socket();
    phone.send_to(b"payload", proxy.addr()).unwrap();
    let (one, two) = (receive(&gateway).0, receive(&gateway).0);
    assert_eq!(one, two);
    let turned: u32 = one.iter().zip(b"payload").map(|(got, sent)| (got ^ sent).count_ones()).sum();
    assert_eq!((one.len(), turned), (7, 1));
    let totals = proxy.stop();
    assert_eq!((totals.up.packets, totals.up.bytes, totals.up.delivered), (1, 7, 2));
}

#[test]
fn bounds_hold() {
    let gateway = socket();
    let slow = Impairment {
        delay: fulmar_badnet::net::Delay::fixed(Duration::from_secs(3_600)),
        ..Impairment::default()
    };
    let mut config = Config::towards(gateway.local_addr().unwrap()).path(Path::symmetric(slow));
    config.flows_max = 2;
    config.flow_packets_max = 3;
    config.packets_max = 5;
    let proxy = Proxy::start(config).unwrap();
    let phones = [socket(), socket(), socket()];
    for phone in &phones {
        for _ in 0..4 {
            phone.send_to(b"x", proxy.addr()).unwrap();
        }
    }
    // Four each: the first keeps 3 under way, the second 2 (5 in all), the third finds no room for a flow.
    let totals = wait_for(&proxy, "all packets", |totals| totals.up.packets + totals.refused_flows == 12);
    assert_eq!((totals.flows, totals.refused_flows, totals.up.overflow), (2, 4, 3));
}

#[test]
fn an_idle_flow_makes_room_for_a_new_one() {
    let gateway = socket();
    let mut config = Config::towards(gateway.local_addr().unwrap());
    config.flows_max = 1;
    config.evict_after = Duration::ZERO;
    let proxy = Proxy::start(config).unwrap();
    for _ in 0..3 {
        let phone = socket();
        phone.send_to(b"hello", proxy.addr()).unwrap();
        receive(&gateway);
    }
    let totals = proxy.stop();
    assert_eq!((totals.flows, totals.flows_ever, totals.up.packets), (1, 3, 3));
}

#[test]
fn a_mapping_expires() {
    let gateway = socket();
    let mut config = Config::towards(gateway.local_addr().unwrap());
    config.nat_timeout = Some(Duration::ZERO);
    let proxy = Proxy::start(config).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    let before = receive(&gateway).1;
    gateway.send_to(b"too late", before).unwrap();
    wait_for(&proxy, "the late packet", |totals| totals.down.dark == 1);
    phone.send_to(b"2", proxy.addr()).unwrap();
    assert_ne!(receive(&gateway).1.port(), before.port());
    assert_eq!(receive_now(&phone), None);
}

#[test]
fn a_plan_is_played() {
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    let phone = socket();
    phone.send_to(b"1", proxy.addr()).unwrap();
    receive(&gateway);
    let at = SimTime::from_millis;
    let plan = FaultPlan::new(vec![
        Planned { at: at(30), target: Target::Lot(77), fault: Fault::Blackout(Duration::from_secs(60)) },
        Planned { at: at(10), target: Target::Lot(5), fault: Fault::Rebind },
        Planned { at: at(20), target: Target::Flow(fulmar_badnet::FlowId(99)), fault: Fault::Rebind },
    ]);
    proxy.play(plan).unwrap();
    let totals = wait_for(&proxy, "the plan's end", |totals| totals.blackouts == 1);
    assert_eq!((totals.rebinds, totals.faults_missed), (1, 1));
}

#[test]
fn other_machines_are_refused() {
    let elsewhere: SocketAddr = "192.0.2.1:443".parse().unwrap();
    assert!(
        matches!(Proxy::start(Config::towards(elsewhere)), Err(Error::NotLoopback(addr)) if addr == elsewhere)
    );
    let gateway = socket();
    let proxy = Proxy::start(Config::towards(gateway.local_addr().unwrap())).unwrap();
    assert!(matches!(proxy.set_gateway(elsewhere), Err(Error::NotLoopback(_))));
    let mut taken = Config::towards(gateway.local_addr().unwrap());
    taken.listen = proxy.addr();
    assert!(matches!(Proxy::start(taken), Err(Error::Listen { .. })));
}
