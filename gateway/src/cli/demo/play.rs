//! Playing the plan: every lane on its own, every line when it is its turn.
//!
//! - A line is handed to the SDK once the lines before it that the other one said have reached the speaker; nobody
//!   waits for acks.
//! - Acks are awaited beside; how each line ended goes to the board.

use std::collections::HashMap;
use std::sync::Arc;

use fulmar_client::Conversation;
use tokio::task::JoinSet;

use super::board::Board;
use super::plan::Plan;

/// (room, phone) → the conversation in the phone's hands, and its number.
pub(super) type Opened = HashMap<(usize, usize), (Conversation, u64)>;

/// Plays all lanes; ends when every line was acked or has failed. Dropping the set ends it at once.
pub(super) fn play(plan: &Arc<Plan>, board: &Arc<Board>, opened: &Arc<Opened>) -> JoinSet<()> {
    let mut lanes = JoinSet::new();
    for (room, laid) in plan.rooms.iter().enumerate() {
        for lane in 0..laid.lanes.len() {
            lanes.spawn(play_lane(Arc::clone(plan), Arc::clone(board), Arc::clone(opened), room, lane));
        }
    }
    lanes
}

async fn play_lane(plan: Arc<Plan>, board: Arc<Board>, opened: Arc<Opened>, room: usize, lane: usize) {
    let lines = plan.rooms.get(room).and_then(|room| room.lanes.get(lane)).map_or(&[][..], Vec::as_slice);
    let mut acks = JoinSet::new();
    // The last line said before by somebody else than the speaker.
    let mut last: Option<(usize, usize)> = None;
    let mut other: Option<usize> = None;
    for number in lines.iter().copied() {
        let Some(planned) = plan.lines.get(number) else { continue };
        if let Some((speaker, line)) = last
            && speaker != planned.speaker
        {
            other = Some(line);
        }
        last = Some((planned.speaker, number));
        if let Some(line) = other {
            board.heard(&plan, line).await;
        }
        board.passes_gate().await;
        let Some((conversation, at)) = opened.get(&(room, planned.speaker)) else { continue };
        board.sending(&plan, number, *at);
        match conversation.send(planned.payload(number)).await {
            Ok(handle) => {
                let (plan, board, at) = (Arc::clone(&plan), Arc::clone(&board), *at);
                acks.spawn(async move {
                    match handle.acked().await {
                        Ok(seq) => board.acked(&plan, number, at, seq.get()),
                        Err(error) => board.failed(&plan, number, &error.to_string()),
                    }
                });
            }
            Err(error) => board.failed(&plan, number, &format!("could not be sent: {error}")),
        }
        while acks.try_join_next().is_some() {}
    }
    while acks.join_next().await.is_some() {}
}
