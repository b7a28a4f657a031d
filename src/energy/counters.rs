//! The counters of one run, read together.
//!
//! Owns every sensor of a run, each device once, and the memory of what was lost. Takes sensors, returns the joules between two marks, or
//! the reason why nobody knows them. A reading that fails inside a window does no harm; a reset, an unseen wrap-around or a sleep of the
//! machine inside it makes the whole window unknown. Knows nothing of work, profiles or what fills a gap.
//!
//! Where a sensor may not be left alone (power that must be sampled, a counter that may wrap within a step) a thread reads it. It sleeps
//! until it has taken no more than a `REST`th of the time since it began, so that it never takes a thousandth of a core, and no thread starts
//! where no sensor asks.

use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::sensor::{Gap, Sensor};
use crate::units::MicroJoules;

/// The sampling thread rests until this many times its own processor time has passed: at most half a thousandth of a core.
const REST: u32 = 2000;
/// The name of the thread, as the system lists it.
const THREAD: &str = "wattune-sampler";
/// How far the clock on the wall may run ahead of the running clock, which stands still while the machine sleeps.
const DRIFT: Duration = Duration::from_secs(2);

/// What the two clocks showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Since some start; stands still while the machine sleeps.
    pub running: Duration,
    /// Since 1970; goes on, and can be set.
    pub wall: Duration,
}

/// Shows the time.
pub type Clock = Box<dyn FnMut() -> Moment + Send>;

/// The sensors of one run.
pub struct Counters {
    bank: Arc<Mutex<Bank>>,
    sampler: Option<Sampler>,
}

/// Where the counters stood.
#[derive(Debug, Clone)]
pub struct Mark {
    energy: Result<MicroJoules, Gap>,
    losses: u64,
}

struct Bank {
    sensors: Vec<Box<dyn Sensor>>,
    clock: Clock,
    last: Moment,
    /// How often energy was lost, and why it was the last time.
    losses: u64,
    reason: String,
}

struct Sampler {
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Counters {
    /// The sensors, and no second one of a device.
    pub fn new(sensors: Vec<Box<dyn Sensor>>) -> Counters {
        let start = Instant::now();
        let clock = move || Moment {
            running: start.elapsed(),
            wall: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default(),
        };
        Self::with_clock(sensors, Box::new(clock))
    }

    /// The same with a clock of one's own.
    pub fn with_clock(sensors: Vec<Box<dyn Sensor>>, mut clock: Clock) -> Counters {
        let mut known = BTreeSet::new();
        let sensors = sensors
            .into_iter()
            .filter(|sensor| known.insert(sensor.device().to_string()))
            .collect();
        let last = clock();
        let bank = Bank {
            sensors,
            clock,
            last,
            losses: 0,
            reason: String::new(),
        };
        Counters {
            bank: Arc::new(Mutex::new(bank)),
            sampler: None,
        }
    }

    /// Whether there is no sensor at all.
    pub fn is_empty(&self) -> bool {
        lock(&self.bank).sensors.is_empty()
    }

    /// The sensors' names, each with what it covers: "rapl (package-0, dram of package-0)".
    pub fn names(&self) -> Vec<String> {
        let name = |sensor: &dyn Sensor| match sensor.covers() {
            covers if covers.is_empty() => sensor.name().to_string(),
            covers => format!("{} ({covers})", sensor.name()),
        };
        lock(&self.bank)
            .sensors
            .iter()
            .map(|sensor| name(sensor.as_ref()))
            .collect()
    }

    /// Where the counters stand now. The first mark starts the sampling thread where a sensor needs one.
    pub fn mark(&mut self) -> Mark {
        if self.sampler.is_none() {
            self.sampler = Sampler::start(&self.bank);
        }
        let mut bank = lock(&self.bank);
        // What was lost before the mark is no matter of the window that it opens.
        let energy = bank.read();
        Mark {
            energy,
            losses: bank.losses,
        }
    }

    /// The joules since `mark`, or why they are unknown.
    pub fn since(&mut self, mark: &Mark) -> Result<MicroJoules, Gap> {
        let mut bank = lock(&self.bank);
        let now = bank.read();
        if bank.losses > mark.losses {
            return Err(Gap::lost(bank.reason.clone()));
        }
        Ok(now?.saturating_sub(mark.energy.clone()?))
    }
}

impl Bank {
    /// The sum over every sensor. Each is read even where another failed, and once more where it failed itself: after a loss it counts
    /// again from there, and a reading that failed may succeed a moment later.
    fn read(&mut self) -> Result<MicroJoules, Gap> {
        self.notice_sleep();
        let mut lost = Vec::new();
        let mut once = |sensor: &mut Box<dyn Sensor>| {
            let reading = named(sensor);
            lost.extend(
                reading
                    .as_ref()
                    .err()
                    .filter(|gap| gap.lost)
                    .map(|gap| gap.reason.clone()),
            );
            reading
        };
        let readings: Vec<_> = self
            .sensors
            .iter_mut()
            .map(|sensor| once(sensor).or_else(|_| once(sensor)))
            .collect();
        lost.into_iter().for_each(|reason| self.lose(reason));
        readings.into_iter().sum()
    }

    /// Reads the sensors that may not be left alone; what is lost thereby is remembered.
    fn sample(&mut self) {
        self.notice_sleep();
        let mut lost = Vec::new();
        for sensor in self
            .sensors
            .iter_mut()
            .filter(|sensor| sensor.unread_at_most().is_some())
        {
            lost.extend(
                named(sensor)
                    .err()
                    .filter(|gap| gap.lost)
                    .map(|gap| gap.reason),
            );
        }
        lost.into_iter().for_each(|reason| self.lose(reason));
    }

    /// A wall clock that ran ahead: the machine slept, and what its counters did meanwhile is not this run's work.
    fn notice_sleep(&mut self) {
        let (now, last) = ((self.clock)(), self.last);
        self.last = now;
        let (ran, passed) = (
            now.running.saturating_sub(last.running),
            now.wall.saturating_sub(last.wall),
        );
        let ahead = passed.saturating_sub(ran);
        if ahead > DRIFT.max(ran / 100) {
            self.lose(format!(
                "the machine slept for {} s, or its clock was set forward by that",
                ahead.as_secs()
            ));
        }
    }

    fn lose(&mut self, reason: String) {
        self.losses += 1;
        self.reason = reason;
    }

    /// How often the thread must read: three times within the shortest silence that a sensor bears.
    fn period(&self) -> Option<Duration> {
        self.sensors
            .iter()
            .filter_map(|sensor| sensor.unread_at_most())
            .min()
            .map(|silence| silence / 3)
    }
}

/// A reading; a gap says whose it is.
fn named(sensor: &mut Box<dyn Sensor>) -> Result<MicroJoules, Gap> {
    sensor.read().map_err(|gap| Gap {
        reason: format!("{}: {}", sensor.name(), gap.reason),
        ..gap
    })
}

impl Sampler {
    /// Starts the thread where a sensor needs it. Where the system gives no thread, the sensors themselves notice the silence.
    fn start(bank: &Arc<Mutex<Bank>>) -> Option<Sampler> {
        let period = lock(bank).period()?;
        let (stop, stopped) = channel();
        let bank = Arc::clone(bank);
        let work = move || {
            let (begun, mut rest) = (Instant::now(), period);
            while stopped.recv_timeout(rest) == Err(RecvTimeoutError::Timeout) {
                let started = Instant::now();
                lock(&bank).sample();
                // Waking and going to sleep cost as much as a reading of a file: the thread's own clock sees them, ours does not.
                let own = thread_time().map_or(started.elapsed() * REST, |own| {
                    (own * REST).saturating_sub(begun.elapsed())
                });
                rest = period.max(own);
            }
        };
        let thread = std::thread::Builder::new()
            .name(THREAD.to_string())
            .spawn(work)
            .ok()?;
        Some(Sampler {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // A thread that is gone already has nobody to tell.
        let _ = self.stop.send(());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The processor time of this thread; `None` where the system does not tell.
fn thread_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes to the one struct that it is given, which lives until it returns.
        let told =
            unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } == 0;
        told.then(|| Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.max(0) as u32))
    }
    #[cfg(not(unix))]
    None
}

/// The bank, also after a sensor's thread died in it: its numbers are whole, each is written at once.
fn lock(bank: &Mutex<Bank>) -> MutexGuard<'_, Bank> {
    bank.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A counter that gives what it is told, the last for ever; it belongs to a device.
    struct Scripted(Vec<Result<u64, Gap>>, &'static str);

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

    fn still() -> Clock {
        Box::new(|| Moment {
            running: Duration::ZERO,
            wall: Duration::ZERO,
        })
    }

    fn counters(script: Vec<Result<u64, Gap>>) -> Counters {
        Counters::with_clock(vec![Box::new(Scripted(script, "a"))], still())
    }

    /// The joules of one window after another.
    fn windows(counters: &mut Counters, count: usize) -> Vec<Result<u64, Gap>> {
        let mut window = || {
            let mark = counters.mark();
            counters.since(&mark).map(|energy| energy.0)
        };
        (0..count).map(|_| window()).collect()
    }

    #[test]
    fn a_window_is_the_difference_of_its_ends() {
        assert_eq!(
            windows(&mut counters(vec![Ok(100), Ok(350), Ok(350), Ok(360)]), 2),
            [Ok(250), Ok(10)]
        );
    }

    #[test]
    fn a_device_is_counted_once_however_many_handles_it_has() {
        let handle = |device| Box::new(Scripted(vec![Ok(0), Ok(7)], device)) as Box<dyn Sensor>;
        let mut two = Counters::with_clock(
            vec![
                handle("GPU-1"),
                handle("GPU-1"),
                handle("GPU-2"),
                handle("GPU-1"),
            ],
            still(),
        );
        assert_eq!(windows(&mut two, 1), [Ok(14)]);
        assert_eq!(two.names().len(), 2);
    }

    #[test]
    fn a_reading_that_fails_once_is_tried_again_and_one_that_fails_twice_is_a_gap() {
        let bad = || Err(Gap::unread("told to fail"));
        assert_eq!(
            windows(&mut counters(vec![Ok(5), bad(), Ok(25)]), 1),
            [Ok(20)]
        );
        // The window that could not be closed is unknown; the next one is whole.
        assert_eq!(
            windows(&mut counters(vec![Ok(5), bad(), bad(), Ok(25), Ok(26)]), 2),
            [Err(Gap::unread("scripted: told to fail")), Ok(1)]
        );
        // A sensor that is gone for good gives no window, and no zero.
        assert!(
            windows(&mut counters(vec![Ok(5), bad()]), 3)
                .iter()
                .all(Result::is_err)
        );
    }

    #[test]
    fn what_is_lost_inside_a_window_makes_it_unknown_and_before_it_does_not() {
        let lost = || Err(Gap::lost("reset"));
        let inside = windows(&mut counters(vec![Ok(5), lost(), Ok(9), Ok(9), Ok(10)]), 2);
        assert_eq!(inside, [Err(Gap::lost("scripted: reset")), Ok(1)]);
        assert_eq!(
            windows(&mut counters(vec![lost(), Ok(9), Ok(10)]), 1),
            [Ok(1)]
        );
    }

    #[test]
    fn a_sleeping_machine_is_noticed() {
        // One second runs while 3601 pass on the wall; then both run alike; then the wall clock is set back, which loses nothing.
        let mut moments = [
            (0, 0),
            (1, 1),
            (2, 3602),
            (3, 3603),
            (4, 3604),
            (5, 100),
            (6, 101),
        ]
        .into_iter();
        let mut last = (6, 101);
        let clock = move || {
            last = moments.next().unwrap_or(last);
            Moment {
                running: Duration::from_secs(last.0),
                wall: Duration::from_secs(last.1),
            }
        };
        let script = (0..8).map(|n| Ok(n * 10)).collect();
        let mut counters =
            Counters::with_clock(vec![Box::new(Scripted(script, "a"))], Box::new(clock));
        let found = windows(&mut counters, 3);
        assert!(
            found[0]
                .as_ref()
                .unwrap_err()
                .reason
                .contains("slept for 3600 s"),
            "{found:?}"
        );
        assert_eq!(found[1..], [Ok(10), Ok(10)]);
    }

    /// A meter of 1 W and a tenth of a second's patience, which burns 20 us at every reading and counts them.
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

        fn unread_at_most(&self) -> Option<Duration> {
            Some(Duration::from_millis(100))
        }
    }

    #[test]
    fn the_thread_reads_what_may_not_be_left_alone_and_nothing_else() {
        let readings = Arc::new(AtomicU64::new(0));
        let mut counters = Counters::new(vec![Box::new(Busy(Arc::clone(&readings)))]);
        counters.mark();
        let deadline = Instant::now() + Duration::from_secs(20);
        while readings.load(Ordering::Relaxed) < 4 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(
            readings.load(Ordering::Relaxed) >= 4,
            "one reading by the mark, the others by the thread"
        );
        drop(counters);
        let after = readings.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(120));
        assert_eq!(
            readings.load(Ordering::Relaxed),
            after,
            "it ends with the counters"
        );
        let mut patient = Counters::new(vec![Box::new(Scripted(vec![Ok(0)], "a"))]);
        patient.mark();
        assert!(patient.sampler.is_none());
    }
}
