//! Congestion control of a client: CUBIC, with a floor under its window.
//!
//! - What is asked of a dark network is never acknowledged, and so fills the window until nothing may be asked any more; after the
//!   first loss of all packets CUBIC allows two (RFC 9002 section 7.6.2), which is half a minute of small questions. Then
//!   the end of the dark is found when the transport's own probes find it, which come ever more rarely.
//! - The floor is what every new connection may send at once (RFC 9002 section 7.2): a connection that was tried again would have as
//!   much. What the session asks of a silent network is far below it.
//!
//! Not here: how often a silent network is asked (`state`).

use std::{any::Any, sync::Arc, time::Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// Makes the controllers.
#[derive(Debug)]
pub(super) struct Floored;

/// See the module's text.
struct FlooredCubic(Box<dyn Controller>);

impl ControllerFactory for Floored {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(FlooredCubic(Arc::new(CubicConfig::default()).build(now, current_mtu)))
    }
}

impl Controller for FlooredCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.0.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.0.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.0.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.0.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.0.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.0.window().max(self.0.initial_window())
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self(self.0.clone_box()))
    }

    fn initial_window(&self) -> u64 {
        self.0.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_network_never_closes_the_window() {
        let now = Instant::now();
        let mut controller = Arc::new(Floored).build(now, 1_200);
        let floor = controller.initial_window();
        assert!(floor >= 10 * 1_200);
        controller.on_sent(now, 1_200, 1);
        controller.on_congestion_event(now, now, true, 1_200);
        assert_eq!(controller.window(), floor);
        assert_eq!(controller.clone_box().window(), floor, "after a change of path as well");
    }
}
