//! Examples to start from: what an app promises its users, tried where it is hardest to keep.

#![expect(clippy::expect_used, reason = "helpers of tests")]

use std::time::Duration;

use fulmar_client::{Client, Messages, NetworkKind};
use fulmar_sim::{Bite, Phone, Profile, World};

/// The next message that is somebody's text.
async fn text(inbox: &mut Messages) -> String {
    loop {
        let message = inbox.next().await.expect("the client runs");
        if message.kind == fulmar_client::RecordKind::Message {
            return message.text().into_owned();
        }
    }
}

async fn live(client: &Client) {
    assert!(client.state().live().await, "the client stays open");
}

#[test]
fn what_was_written_in_the_lift_arrives_after_the_ride() {
    let ended = World::new(11).profile(Profile::Wifi).run(async |sim| {
        let phone = sim.phone("alice");
        let (alice, bob) = (phone.connect().await?, sim.phone("bob").connect().await?);
        let mut inbox = bob.messages();
        live(&alice).await;
        live(&bob).await;
        let to_bob = alice.direct("bob").await?;
        to_bob.resolved().await?;
        phone.black_out(Duration::from_secs(30));
        for text in ["first", "second"] {
            to_bob.send(text).await?;
        }
        let entered = sim.now();
        let got = [text(&mut inbox).await, text(&mut inbox).await];
        Ok((got, sim.now().since(entered), sim.bites().of(Bite::Blackout)))
    });
    let (got, took, lost) = ended.value.unwrap();
    assert_eq!(got, ["first", "second"], "in order, and each once");
    assert!(took >= Duration::from_secs(30) && lost > 0);
}

#[test]
fn an_app_that_is_killed_sends_what_it_had_queued() {
    let ended = World::new(12).limit(Duration::from_secs(7_200)).run(async |sim| {
        let phone = sim.phone("alice");
        let bob = sim.phone("bob").connect().await?;
        let mut inbox = bob.messages();
        live(&bob).await;
        let alice = phone.connect().await?;
        live(&alice).await;
        let to_bob = alice.direct("bob").await?;
        to_bob.resolved().await?;
        phone.lose_network();
        let id = to_bob.send("before the end").await?.id();
        drop((to_bob, alice));
        phone.kill_app();
        sim.sleep(Duration::from_secs(3_600)).await;
        phone.change_network(Profile::Lossy);
        let alice = phone.connect().await?;
        let waiting = alice.outbox().await?;
        anyhow::ensure!(waiting.first().is_some_and(|entry| entry.handle.id() == id), "it waits");
        Ok(text(&mut inbox).await)
    });
    assert_eq!(ended.value.unwrap(), "before the end");
    assert_eq!(ended.bites.of(Bite::AppKilled), 1);
}

#[test]
fn a_gateway_that_was_killed_has_everything_it_acked() {
    let ended = World::new(13).profile(Profile::Metro).run(async |sim| {
        let alice = sim.phone("alice").connect().await?;
        let bob_phone = sim.phone("bob");
        let bob = bob_phone.connect().await?;
        live(&bob).await;
        let handle = alice.direct("bob").await?.send("written down").await?;
        let seq = handle.acked().await?;
        sim.gateway().crash().await;
        sim.sleep(Duration::from_secs(5)).await;
        sim.gateway().start().await?;
        // Bob walks out of the building meanwhile, and his phone is told.
        bob_phone.change_network(Profile::MobileTail);
        bob.network_changed(Phone::hint(NetworkKind::Cellular)).await?;
        let got = text(&mut bob.messages()).await;
        Ok((got, seq.get()))
    });
    let (got, seq) = ended.value.unwrap();
    assert_eq!(got, "written down");
    assert!(seq >= 1);
}

#[test]
fn where_udp_is_blocked_nobody_notices() {
    let ended = World::new(14).run(async |sim| {
        let phone = sim.phone("alice");
        phone.block(true, false);
        let bob = sim.phone("bob").connect().await?;
        live(&bob).await;
        let alice = phone.connect().await?;
        alice.direct("bob").await?.send("through the proxy of the hotel").await?;
        Ok(text(&mut bob.messages()).await)
    });
    assert_eq!(ended.value.unwrap(), "through the proxy of the hotel");
    assert!(ended.lasted < Duration::from_secs(5), "{:?}", ended.lasted);
}
