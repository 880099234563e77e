//! CPU, disk and spread: what is read from the kernel and how samples become one number.

use std::{io, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use rustix::time::{ClockId, clock_gettime};

fn clock(id: ClockId) -> Duration {
    let time = clock_gettime(id);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// CPU time of this thread, user and kernel.
#[must_use]
pub fn thread_cpu() -> Duration {
    clock(ClockId::ThreadCPUTime)
}

/// CPU time of this process, user and kernel, all threads.
#[must_use]
pub fn process_cpu() -> Duration {
    clock(ClockId::ProcessCPUTime)
}

/// CPU time of another process, user and kernel, all threads that are and were. Counted in ticks of (mostly) 10 ms:
/// measure over seconds.
///
/// # Errors
/// There is no such process.
pub fn cpu_of(process: u32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name in parentheses may hold anything; fields are counted from its end. 14 and 15 are utime and stime.
    let bad = || io::Error::other("unexpected /proc/PID/stat");
    let (_, fields) = stat.rsplit_once(')').ok_or_else(bad)?;
    let mut times = fields.split_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    let (user, kernel) = (times.next().ok_or_else(bad)?, times.next().ok_or_else(bad)?);
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    Ok(Duration::from_nanos((user + kernel).saturating_mul(1_000_000_000 / ticks)))
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// There is no such process.
pub fn resident_of(process: u32) -> io::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib =
        kib.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmRSS"))
}

/// Bytes the files below `path` take on the disk.
///
/// # Errors
/// A folder can't be read.
pub fn disk_bytes(path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { disk_bytes(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

/// Samples of one figure.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// Adds a time, in microseconds.
    pub fn add_us(&mut self, time: Duration) {
        self.add(time.as_secs_f64() * 1e6);
    }

    /// Adds those of another.
    pub fn append(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sample below which `share` (0 to 1) of them lie; not a number when there is none.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a length is an index"
    )]
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        let index = (share * last as f64).round() as usize;
        sorted.get(index.min(last)).copied().unwrap_or(f64::NAN)
    }

    /// The middle one.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan());
        (1..=101).rev().for_each(|n| samples.add(f64::from(n)));
        assert_eq!((samples.quantile(0.0), samples.median(), samples.quantile(1.0)), (1.0, 51.0, 101.0));
        assert_eq!(samples.quantile(0.99), 100.0);
    }

    #[test]
    fn work_takes_cpu_and_the_kernel_says_the_same_of_us() {
        let before = (thread_cpu(), process_cpu());
        let mut sum = 0u64;
        while thread_cpu() - before.0 < Duration::from_millis(100) {
            sum = (0..10_000).fold(sum, |sum, n| std::hint::black_box(sum ^ n));
        }
        // The kernel counts in ticks, for the process more coarsely than for a thread.
        assert!(process_cpu() - before.1 >= Duration::from_millis(50));
        assert!(cpu_of(std::process::id()).unwrap() >= Duration::from_millis(10));
        assert!(resident_of(std::process::id()).unwrap() > 100_000);
    }
}
