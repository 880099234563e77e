//! What an app's own tests look like: its code, a bad world, and no waiting.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::process::Command;
use std::time::Duration;

use fulmar_sim::{Ended, Profile, World};

/// Set for the process that is to be the world of the second test.
const SEED: &str = "FULMAR_SIM_TEST_SEED";

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
            if message.kind == fulmar_client::RecordKind::Message {
                got.push(message.text().into_owned());
            }
        }
        Ok(got)
    })
}

#[test]
fn messages_arrive_in_order() {
    let ended = chat(3);
    assert_eq!(ended.value.unwrap(), ["one", "two", "three"]);
    assert!(ended.log_count > 100 && ended.lasted < Duration::from_secs(30));
}

/// The log of the world with this seed, which has a process of its own.
fn log_of(seed: u64) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_chat_is_the_same_twice", "--nocapture"]).env(SEED, seed.to_string());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().filter(|line| line.contains(" udp ")).collect()
}

#[test]
fn a_chat_is_the_same_twice() {
    if let Ok(seed) = std::env::var(SEED) {
        println!("{}", String::from_utf8(chat(seed.parse().unwrap()).log.unwrap()).unwrap());
        return;
    }
    let one = log_of(1);
    assert!(one.len() > 1_000);
    assert_eq!(one, log_of(1));
    assert_ne!(one, log_of(2));
}
