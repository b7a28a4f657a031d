//! The hardware counters of one run, read together.
//!
//! Takes sensors, each device once; returns the energy between two snapshots, or why it is unknown.
//! A reading that fails inside a window has no effect; a counter reset, a wrap-around that went
//! unnoticed or a suspend of the machine makes the energy of the window unknown. Independent of
//! work, profiles and the way gaps are filled.
//!
//! A background thread reads sensors with a `max_read_interval` (power that must be sampled, a
//! counter that may wrap within a step). It sleeps until it has used at most 1/`MIN_IDLE_RATIO` of
//! the time since it started: less than a thousandth of a core. Without such a sensor no thread
//! starts.

use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::sensor::{Gap, Sensor};
use crate::units::{MicroJoules, Watts};

/// Minimum ratio of elapsed time to CPU time of the sampling thread: half a thousandth of a core.
const MIN_IDLE_RATIO: u32 = 2000;
/// Name of the sampling thread.
const THREAD_NAME: &str = "wattune-sampler";
/// How far the wall clock may advance beyond the monotonic clock, which stops while the machine is
/// suspended.
const MAX_CLOCK_DRIFT: Duration = Duration::from_secs(2);

/// Simultaneous readings of two clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    /// Since some start; stops while the machine is suspended.
    pub monotonic: Duration,
    /// Since 1970; continues while suspended, and can be set.
    pub wall: Duration,
}

/// Reads both clocks.
pub type Clock = Box<dyn FnMut() -> ClockReading + Send>;

/// The sensors of one run.
pub struct Counters {
    sensors: Arc<Mutex<SensorSet>>,
    sampler: Option<Sampler>,
}

/// The counters at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Sum over the sensors since they were opened.
    energy: Result<MicroJoules, Gap>,
    /// Losses so far: another number later means that energy in between is unknown.
    losses: u64,
}

/// The sensors, and the energy losses since they were opened.
struct SensorSet {
    sensors: Vec<Box<dyn Sensor>>,
    clock: Clock,
    last_reading: ClockReading,
    /// Number of times energy was lost.
    losses: u64,
    /// Reason of the last loss.
    loss_reason: String,
}

/// The background thread that reads sensors with a `max_read_interval`.
struct Sampler {
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Counters {
    /// The counters of `sensors`; further sensors of the same device are dropped.
    pub fn new(sensors: Vec<Box<dyn Sensor>>) -> Counters {
        let start = Instant::now();
        let clock = move || ClockReading {
            monotonic: start.elapsed(),
            wall: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default(),
        };
        Self::with_clock(sensors, Box::new(clock))
    }

    /// As `new`, with a given clock.
    pub fn with_clock(mut sensors: Vec<Box<dyn Sensor>>, mut clock: Clock) -> Counters {
        let mut devices = BTreeSet::new();
        sensors.retain(|sensor| devices.insert(sensor.device().to_string()));
        let last_reading = clock();
        let set = SensorSet {
            sensors,
            clock,
            last_reading,
            losses: 0,
            loss_reason: String::new(),
        };
        Counters {
            sensors: Arc::new(Mutex::new(set)),
            sampler: None,
        }
    }

    /// Whether there is no sensor.
    pub fn is_empty(&self) -> bool {
        lock(&self.sensors).sensors.is_empty()
    }

    /// The sensors' names with the parts they sum: "rapl (package-0, dram of package-0)".
    pub fn names(&self) -> Vec<String> {
        let set = lock(&self.sensors);
        let name = |sensor: &dyn Sensor| match sensor.covers() {
            covers if covers.is_empty() => sensor.name().to_string(),
            covers => format!("{} ({covers})", sensor.name()),
        };
        set.sensors
            .iter()
            .map(|sensor| name(sensor.as_ref()))
            .collect()
    }

    /// Power that the sensors together never exceed; `None` if unknown of any.
    pub fn max_power(&self) -> Option<Watts> {
        let set = lock(&self.sensors);
        set.sensors.iter().map(|sensor| sensor.max_power()).sum()
    }

    /// Reads every counter. The first snapshot starts the sampling thread if a sensor needs it.
    pub fn snapshot(&mut self) -> Snapshot {
        if self.sampler.is_none() {
            self.sampler = Sampler::start(&self.sensors);
        }
        let mut set = lock(&self.sensors);
        let energy = set.read();
        // Counted after the read: earlier losses do not affect a window that starts here.
        let losses = set.losses;
        Snapshot { energy, losses }
    }

    /// The energy since `start`, or why it is unknown.
    pub fn energy_since(&mut self, start: &Snapshot) -> Result<MicroJoules, Gap> {
        let mut set = lock(&self.sensors);
        let now = set.read();
        if set.losses > start.losses {
            return Err(Gap::lost(set.loss_reason.clone()));
        }
        Ok(now?.saturating_sub(start.energy.clone()?))
    }
}

impl SensorSet {
    /// The sum over every sensor. Reads all of them even if one fails, and retries a failed one
    /// once: after a loss it counts from there, and other failures may be transient.
    fn read(&mut self) -> Result<MicroJoules, Gap> {
        self.detect_suspend();
        let mut readings = Vec::new();
        for i in 0..self.sensors.len() {
            readings.push(self.read_sensor(i).or_else(|_| self.read_sensor(i)));
        }
        readings.into_iter().sum()
    }

    /// Reads the sensors with a `max_read_interval`, for their side effects.
    fn sample(&mut self) {
        self.detect_suspend();
        for i in 0..self.sensors.len() {
            if self.sensors[i].max_read_interval().is_some() {
                let _ = self.read_sensor(i);
            }
        }
    }

    /// Reads one sensor and records a loss; a gap's reason starts with the sensor's name.
    fn read_sensor(&mut self, index: usize) -> Result<MicroJoules, Gap> {
        let sensor = &mut self.sensors[index];
        let reading = sensor.read().map_err(|gap| Gap {
            reason: format!("{}: {}", sensor.name(), gap.reason),
            ..gap
        });
        if let Err(gap) = &reading
            && gap.lost
        {
            self.record_loss(gap.reason.clone());
        }
        reading
    }

    /// Records a loss if the wall clock advanced beyond the monotonic clock: the machine was
    /// suspended, and its consumption meanwhile does not belong to this run.
    fn detect_suspend(&mut self) {
        let now = (self.clock)();
        let last = std::mem::replace(&mut self.last_reading, now);
        let monotonic = now.monotonic.saturating_sub(last.monotonic);
        let wall = now.wall.saturating_sub(last.wall);
        let drift = wall.saturating_sub(monotonic);
        if drift > MAX_CLOCK_DRIFT.max(monotonic / 100) {
            let seconds = drift.as_secs();
            self.record_loss(format!(
                "the machine slept for {seconds} s, or its clock was set forward by that"
            ));
        }
    }

    fn record_loss(&mut self, reason: String) {
        self.losses += 1;
        self.loss_reason = reason;
    }

    /// Period of the sampling thread: a third of the shortest `max_read_interval`.
    fn sampling_period(&self) -> Option<Duration> {
        let intervals = self
            .sensors
            .iter()
            .filter_map(|sensor| sensor.max_read_interval());
        intervals.min().map(|shortest| shortest / 3)
    }
}

impl Sampler {
    /// Starts the thread if a sensor needs it. If the thread cannot be spawned, the sensors report
    /// the exceeded read interval.
    fn start(sensors: &Arc<Mutex<SensorSet>>) -> Option<Sampler> {
        let period = lock(sensors).sampling_period()?;
        let (stop, stopped) = channel();
        let sensors = Arc::clone(sensors);
        let work = move || {
            let start = Instant::now();
            let mut pause = period;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let sample_start = Instant::now();
                lock(&sensors).sample();
                // Waking up costs as much as reading a file: only the thread's CPU clock includes
                // it.
                let idle = match thread_cpu_time() {
                    Some(cpu) => (cpu * MIN_IDLE_RATIO).saturating_sub(start.elapsed()),
                    None => sample_start.elapsed() * MIN_IDLE_RATIO,
                };
                pause = period.max(idle);
            }
        };
        let builder = std::thread::Builder::new().name(THREAD_NAME.to_string());
        let thread = Some(builder.spawn(work).ok()?);
        Some(Sampler { stop, thread })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // Fails only if the thread has ended already.
        let _ = self.stop.send(());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// CPU time of this thread; `None` if the system does not provide it.
fn thread_cpu_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes to the one struct that it is given, which lives until it returns.
        let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        let cpu = Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.max(0) as u32);
        (status == 0).then_some(cpu)
    }
    #[cfg(not(unix))]
    None
}

/// Ignores poisoning: every update of the set is a single write.
fn lock(sensors: &Mutex<SensorSet>) -> MutexGuard<'_, SensorSet> {
    sensors.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    type Reading = Result<u64, Gap>;

    /// Returns these readings one after another, the last for ever; second: the device.
    struct Scripted(Vec<Reading>, &'static str);

    impl Sensor for Scripted {
        fn name(&self) -> &str {
            "scripted"
        }

        fn device(&self) -> &str {
            self.1
        }

        fn read(&mut self) -> Result<MicroJoules, Gap> {
            let reading = if self.0.len() > 1 {
                self.0.remove(0)
            } else {
                self.0[0].clone()
            };
            reading.map(MicroJoules)
        }
    }

    fn clock_at(monotonic: u64, wall: u64) -> ClockReading {
        ClockReading {
            monotonic: Duration::from_secs(monotonic),
            wall: Duration::from_secs(wall),
        }
    }

    fn stopped_clock() -> Clock {
        Box::new(|| clock_at(0, 0))
    }

    fn counters(script: Vec<Reading>) -> Counters {
        Counters::with_clock(vec![Box::new(Scripted(script, "a"))], stopped_clock())
    }

    /// The energy of consecutive windows.
    fn windows(counters: &mut Counters, count: usize) -> Vec<Reading> {
        let mut window = || {
            let start = counters.snapshot();
            counters.energy_since(&start).map(|energy| energy.0)
        };
        (0..count).map(|_| window()).collect()
    }

    #[test]
    fn a_window_is_the_difference_of_two_snapshots() {
        let mut counters = counters(vec![Ok(100), Ok(350), Ok(350), Ok(360)]);
        assert_eq!(windows(&mut counters, 2), [Ok(250), Ok(10)]);
    }

    #[test]
    fn two_sensors_of_a_device_are_counted_once() {
        let sensor = |device| Box::new(Scripted(vec![Ok(0), Ok(7)], device)) as Box<dyn Sensor>;
        let sensors = ["GPU-1", "GPU-1", "GPU-2", "GPU-1"].map(sensor);
        let mut two = Counters::with_clock(sensors.into(), stopped_clock());
        assert_eq!(windows(&mut two, 1), [Ok(14)]);
        assert_eq!(two.names().len(), 2);
    }

    #[test]
    fn a_failed_reading_is_retried_once() {
        let failed = || Err(Gap::unread("told to fail"));
        let mut once = counters(vec![Ok(5), failed(), Ok(25)]);
        assert_eq!(windows(&mut once, 1), [Ok(20)]);
        // A second failure leaves the window unknown, and the next one known.
        let mut twice = counters(vec![Ok(5), failed(), failed(), Ok(25), Ok(26)]);
        let gap = Gap::unread("scripted: told to fail");
        assert_eq!(windows(&mut twice, 2), [Err(gap), Ok(1)]);
        // A permanent failure never reads as zero.
        let mut dead = counters(vec![Ok(5), failed()]);
        assert!(windows(&mut dead, 3).iter().all(Result::is_err));
    }

    #[test]
    fn a_loss_affects_only_the_window_it_is_in() {
        let lost = || Err(Gap::lost("reset"));
        let mut inside = counters(vec![Ok(5), lost(), Ok(9), Ok(9), Ok(10)]);
        let gap = Gap::lost("scripted: reset");
        assert_eq!(windows(&mut inside, 2), [Err(gap), Ok(1)]);
        let mut before = counters(vec![lost(), Ok(9), Ok(10)]);
        assert_eq!(windows(&mut before, 1), [Ok(1)]);
    }

    #[test]
    fn a_suspended_machine_is_detected() {
        // 3601 s of wall time during one second; then both clocks agree; then the wall clock is set
        // back, which loses nothing.
        let readings = [
            (0, 0),
            (1, 1),
            (2, 3602),
            (3, 3603),
            (4, 3604),
            (5, 100),
            (6, 101),
        ];
        let mut readings = readings.into_iter();
        let mut last = (6, 101);
        let clock = move || {
            last = readings.next().unwrap_or(last);
            clock_at(last.0, last.1)
        };
        let script = (0..8).map(|n| Ok(n * 10)).collect();
        let mut counters =
            Counters::with_clock(vec![Box::new(Scripted(script, "a"))], Box::new(clock));
        let found = windows(&mut counters, 3);
        let gap = found[0].as_ref().unwrap_err();
        assert!(gap.reason.contains("slept for 3600 s"), "{found:?}");
        assert_eq!(found[1..], [Ok(10), Ok(10)]);
    }

    /// Spins for 20 us at every reading, counts its readings, and must be read every 0.1 s.
    struct Busy(Arc<AtomicU64>);

    impl Sensor for Busy {
        fn name(&self) -> &str {
            "busy"
        }

        fn read(&mut self) -> Result<MicroJoules, Gap> {
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(20) {
                std::hint::spin_loop();
            }
            Ok(MicroJoules(self.0.fetch_add(1, Ordering::Relaxed)))
        }

        fn max_read_interval(&self) -> Option<Duration> {
            Some(Duration::from_millis(100))
        }
    }

    #[test]
    fn the_thread_reads_only_sensors_with_a_read_interval() {
        let readings = Arc::new(AtomicU64::new(0));
        let count = || readings.load(Ordering::Relaxed);
        let mut counters = Counters::new(vec![Box::new(Busy(Arc::clone(&readings)))]);
        counters.snapshot();
        let deadline = Instant::now() + Duration::from_secs(20);
        while count() < 4 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(
            count() >= 4,
            "one reading by the snapshot, the others by the thread"
        );
        drop(counters);
        let after = count();
        std::thread::sleep(Duration::from_millis(120));
        assert_eq!(count(), after, "the thread ends with the counters");
        let mut without = Counters::new(vec![Box::new(Scripted(vec![Ok(0)], "a"))]);
        without.snapshot();
        assert!(without.sampler.is_none());
    }
}
