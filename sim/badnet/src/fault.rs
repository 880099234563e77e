//! What goes wrong at a moment, drawn from a seed beforehand.
//!
//! - A [`FaultPlan`] is a list in order of time, complete before the run starts: equal seeds and rates give equal
//!   plans, whatever the run does.
//! - A plan names a flow by number or by lot, as the flows of a run are not known beforehand; a fault that meets no
//!   flow does nothing and is counted by whoever plays the plan.
//!
//! Not here: what a link does all the time (`net`), playing the plan (`proxy`).

use std::time::Duration;

use crate::net::Path;
use crate::rng::Rng;
use crate::time::SimTime;

/// Which flow of a proxy or world: numbered from 0 in the order of their first packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub u32);

impl std::fmt::Display for FlowId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "flow {}", self.0)
    }
}

/// Whom a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Every flow there is, and for a path also every flow to come.
    All,
    /// One flow.
    Flow(FlowId),
    /// One of the flows there are at that moment: the number modulo their count picks it, lowest flow first.
    Lot(u64),
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The NAT forgets the mapping: the gateway sees a new source port.
    Rebind,
    /// Nothing gets through, either way, for this long.
    Blackout(Duration),
    /// The path changes for good.
    Path(Box<Path>),
}

/// A fault and its moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// When, counted from the start of the plan.
    pub at: SimTime,
    /// Whom.
    pub target: Target,
    /// What.
    pub fault: Fault,
}

/// How often what goes wrong, over all flows together. The default is: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// Mean time between two rebindings of some flow (exponential); `None` for none.
    pub rebind_every: Option<Duration>,
    /// Mean time between two blackouts of some flow (exponential); `None` for none.
    pub blackout_every: Option<Duration>,
    /// Shortest blackout.
    pub blackout_min: Duration,
    /// Longest blackout.
    pub blackout_max: Duration,
}

/// Faults in order of time.
///
/// ```
/// use std::time::Duration;
/// use fulmar_badnet::fault::{FaultPlan, FaultRates};
/// let rates = FaultRates { rebind_every: Some(Duration::from_millis(500)), ..FaultRates::default() };
/// let plan = FaultPlan::seeded(42, Duration::from_secs(30), &rates);
/// assert_eq!(plan, FaultPlan::seeded(42, Duration::from_secs(30), &rates));
/// assert!(plan.faults().len() > 30);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    faults: Vec<Planned>,
}

/// Faults one plan may hold; drawing stops there.
pub const PLAN_MAX: usize = 100_000;

impl FaultPlan {
    /// Draws the faults of a run that lasts `length`.
    #[must_use]
    pub fn seeded(seed: u64, length: Duration, rates: &FaultRates) -> Self {
        let root = Rng::new(seed);
        let end = SimTime::START + length;
        let mut faults = Vec::new();
        let kinds = [(0, rates.rebind_every), (1, rates.blackout_every)];
        for (kind, every) in kinds {
            let Some(every) = every else { continue };
            let mut rng = root.fork(kind);
            let mut at = SimTime::START + rng.exponential(every);
            while at < end && faults.len() < PLAN_MAX {
                let target = Target::Lot(rng.next_u64());
                let fault = if kind == 0 {
                    Fault::Rebind
                } else {
                    Fault::Blackout(rng.duration(rates.blackout_min, rates.blackout_max))
                };
                faults.push(Planned { at, target, fault });
                // At least a microsecond: a mean of zero must not stand still.
                at = at + rng.exponential(every).max(Duration::from_micros(1));
            }
        }
        Self::new(faults)
    }

    /// A plan from faults in any order; those past [`PLAN_MAX`] (latest first) are left out.
    #[must_use]
    pub fn new(mut faults: Vec<Planned>) -> Self {
        faults.sort_by_key(|planned| planned.at);
        faults.truncate(PLAN_MAX);
        Self { faults }
    }

    /// The faults, earliest first.
    #[must_use]
    pub fn faults(&self) -> &[Planned] {
        &self.faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_ordered_bounded_and_near_their_rates() {
        let rates = FaultRates {
            rebind_every: Some(Duration::from_secs(1)),
            blackout_every: Some(Duration::from_secs(2)),
            blackout_min: Duration::from_millis(100),
            blackout_max: Duration::from_millis(900),
        };
        let plan = FaultPlan::seeded(1, Duration::from_secs(1_000), &rates);
        assert!(plan.faults().windows(2).all(|pair| pair[0].at <= pair[1].at));
        let rebinds = plan.faults().iter().filter(|planned| planned.fault == Fault::Rebind).count();
        let blackouts = plan.faults().len() - rebinds;
        assert!((900..1_100).contains(&rebinds), "{rebinds}");
        assert!((430..570).contains(&blackouts), "{blackouts}");
        for planned in plan.faults() {
            if let Fault::Blackout(lasts) = planned.fault {
                assert!(lasts >= rates.blackout_min && lasts <= rates.blackout_max);
            }
        }
        let zero = FaultRates { rebind_every: Some(Duration::ZERO), ..FaultRates::default() };
        assert_eq!(FaultPlan::seeded(1, Duration::from_secs(1), &zero).faults().len(), PLAN_MAX);
        assert!(FaultPlan::seeded(1, Duration::from_secs(1), &FaultRates::default()).faults().is_empty());
    }
}
