//! What an app's own tests look like: its code, a bad world, and no waiting.

use std::time::Duration;

use fulmar_sim::{Ended, Profile, World};

fn chat(seed: u64) -> Ended<Vec<String>> {
    World::new(seed).profile(Profile::Wifi).keep_log(true).run(async |sim| {
        let alice = sim.phone("alice").connect().await?;
        let bob = sim.phone("bob").connect().await?;
        let mut inbox = bob.messages();
        let to_bob = alice.direct("bob").await?;
        for text in ["one", "two", "three"] {
            to_bob.send(text).await?;
            sim.sleep(Duration::from_secs(1)).await;
        }
        let mut got = Vec::new();
        while got.len() < 3 {
            let message = inbox.next().await.expect("bob's client runs");
            if !message.payload.is_empty() {
                got.push(message.text().into_owned());
            }
        }
        Ok(got)
    })
}

#[test]
fn a_chat_is_the_same_twice() {
    let (one, two) = (chat(1), chat(1));
    assert_eq!(one.value.unwrap(), ["one", "two", "three"]);
    assert_eq!(two.value.unwrap(), ["one", "two", "three"]);
    let (one, two) = (one.log.unwrap(), two.log.unwrap());
    for (line, other) in String::from_utf8_lossy(&one).lines().zip(String::from_utf8_lossy(&two).lines()) {
        assert_eq!(line, other);
    }
    assert_eq!(one.len(), two.len());
    assert_ne!(chat(2).log.unwrap(), one);
}
