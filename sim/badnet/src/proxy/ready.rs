//! Which flows have something to read.
//!
//! - Each flow's socket wakes through a waker of its own, which notes the flow here and wakes the one task: the
//!   task looks at the flows that are noted, not at all of them.
//! - A flow is noted at most once at a time, so the list is never longer than there are flows (and those that
//!   have just gone).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use crate::fault::FlowId;

/// The flows that are noted, and the task that wants to know.
#[derive(Debug, Default)]
pub(super) struct Ready {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    flows: Vec<FlowId>,
    task: Option<Waker>,
}

impl Ready {
    /// Wakes `task` when a flow is noted from now on.
    pub(super) fn watch(&self, task: &Waker) {
        let mut state = self.state();
        if !state.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            state.task = Some(task.clone());
        }
    }

    /// Moves the noted flows to `into`, which is emptied first.
    pub(super) fn take(&self, into: &mut Vec<FlowId>) {
        into.clear();
        std::mem::swap(&mut self.state().flows, into);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A list of numbers and a waker: nothing a panic could leave half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes one flow.
#[derive(Debug)]
pub(super) struct Bell {
    flow: FlowId,
    noted: AtomicBool,
    ready: Arc<Ready>,
}

impl Bell {
    pub(super) fn new(flow: FlowId, ready: Arc<Ready>) -> Arc<Self> {
        Arc::new(Self { flow, noted: AtomicBool::new(false), ready })
    }

    /// To be called before the flow's socket is read: what comes in from now on notes the flow again.
    pub(super) fn answered(&self) {
        self.noted.store(false, Ordering::Release);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.noted.swap(true, Ordering::AcqRel) {
            return;
        }
        let task = {
            let mut state = self.ready.state();
            state.flows.push(self.flow);
            state.task.clone()
        };
        if let Some(task) = task {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_noted_once_until_it_is_answered() {
        let ready = Arc::new(Ready::default());
        let (one, two) = (Bell::new(FlowId(1), Arc::clone(&ready)), Bell::new(FlowId(2), Arc::clone(&ready)));
        let mut noted = Vec::new();
        for _ in 0..3 {
            Waker::from(Arc::clone(&one)).wake_by_ref();
        }
        Waker::from(Arc::clone(&two)).wake();
        ready.take(&mut noted);
        assert_eq!(noted, [FlowId(1), FlowId(2)]);
        Waker::from(Arc::clone(&one)).wake_by_ref();
        ready.take(&mut noted);
        assert!(noted.is_empty());
        one.answered();
        Waker::from(one).wake_by_ref();
        ready.take(&mut noted);
        assert_eq!(noted, [FlowId(1)]);
    }
}
