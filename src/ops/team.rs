//! Loops over the threads of the pool, many thousands a step: who has nothing to do looks for more for a while before it sleeps.
//!
//! rayon puts an idle thread to sleep after some microseconds and wakes it through the system, which takes longer than most loops of a
//! small model last. Here the pool's threads stay with the thread that hands out work, and go back to rayon when there was nothing for
//! `PATIENCE`. Each thread takes its own run of the items first, the same part of every loop, so that what it wrote in one loop is still in its
//! cache in the next, and then what others have left. Which thread takes which item is chance all the same; no result may depend on it.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread looks for more work before it leaves.
const PATIENCE: Duration = Duration::from_millis(1);
/// Looks between two looks at the clock, and between two offers of the processor to others.
const LOOKS: usize = 256;
/// Most runs that a loop is cut into; more threads share them.
const MOST_RUNS: usize = 64;

/// Calls `work` once for each item, on all threads of the current pool; returns when all are done.
pub(super) fn each<I: Send>(items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
    let threads = rayon::current_num_threads();
    if threads == 1 {
        return items.for_each(work);
    }
    let items: Vec<Slot<I>> = items.map(|item| Slot(UnsafeCell::new(Some(item)))).collect();
    let take = |index: usize| {
        // SAFETY: every index is handed out once.
        if let Some(item) = unsafe { (*items[index].0.get()).take() } {
            work(item);
        }
    };
    match items.len() {
        0 => {}
        1 => take(0),
        count => TEAM.with(|team| Team::run(team, threads, count, &take)),
    }
}

/// An item that one thread takes.
struct Slot<I>(UnsafeCell<Option<I>>);

// SAFETY: a slot is touched by the one thread that its index was handed to.
unsafe impl<I: Send> Sync for Slot<I> {}

thread_local! {
    /// The threads that stay with this one.
    static TEAM: Arc<Team> = Arc::new(Team::new());
}

/// What a thread shares with those that help it.
struct Team {
    /// Whether there is a loop to join.
    open: AtomicBool,
    /// Threads that may look at the loop.
    inside: AtomicUsize,
    /// Threads that stay.
    helpers: AtomicUsize,
    /// The next item of each run.
    next: [Next; MOST_RUNS],
    /// Whether a helper's item panicked.
    failed: AtomicBool,
    work: UnsafeCell<Option<Loop>>,
}

/// A run's next item, on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Next(AtomicUsize);

/// A loop on its owner's stack.
#[derive(Clone, Copy)]
struct Loop {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
    runs: usize,
}

impl Loop {
    /// The items of a run.
    fn run(&self, index: usize) -> Range<usize> {
        self.count * index / self.runs..self.count * (index + 1) / self.runs
    }
}

// SAFETY: `work` is written while the loop is closed and nobody is inside, and points to a closure that is `Sync` and outlives the loop.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

/// Closes the loop when dropped, and waits for those inside: also when the owner's own item panics.
struct Open<'a>(&'a Team);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, Ordering::SeqCst);
        let mut looks = 0;
        while self.0.inside.load(Ordering::SeqCst) != 0 {
            look(&mut looks);
        }
    }
}

/// Leaves the loop when dropped.
struct Inside<'a>(&'a Team);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
        }
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Team {
    fn new() -> Self {
        Self {
            open: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            helpers: AtomicUsize::new(0),
            next: std::array::from_fn(|_| Next::default()),
            failed: AtomicBool::new(false),
            work: UnsafeCell::new(None),
        }
    }

    fn run<'a>(team: &Arc<Self>, threads: usize, count: usize, task: &'a (dyn Fn(usize) + Sync + 'a)) {
        // SAFETY: only the lifetime is forgotten, and `Open` waits for every user before `task` goes.
        let task: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), _>(task) };
        let work = Loop { task, count, runs: threads.min(MOST_RUNS) };
        // SAFETY: the loop before is closed and left, so that nobody reads.
        unsafe { *team.work.get() = Some(work) };
        (0..work.runs).for_each(|run| team.next[run].0.store(work.run(run).start, Ordering::SeqCst));
        {
            let _open = Open(team);
            team.open.store(true, Ordering::SeqCst);
            while team.helpers.load(Ordering::SeqCst) < threads - 1 {
                team.helpers.fetch_add(1, Ordering::SeqCst);
                let team = Arc::clone(team);
                rayon::spawn(move || team.help());
            }
            team.take();
        }
        assert!(!team.failed.swap(false, Ordering::SeqCst), "an item failed on another thread");
    }

    /// Takes items until there are none: of this thread's run, then of the others.
    fn take(&self) {
        // SAFETY: the caller is the owner or inside, and the loop is open: nobody writes.
        let Some(work) = (unsafe { *self.work.get() }) else { return };
        let own = rayon::current_thread_index().unwrap_or(0);
        for run in (own..own + work.runs).map(|run| run % work.runs) {
            let (next, end) = (&self.next[run].0, work.run(run).end);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                // SAFETY: the owner keeps the closure until everybody is out.
                unsafe { (*work.task)(index) };
            }
        }
    }

    /// Stays until there was nothing to do for a while.
    fn help(&self) {
        let (mut since, mut looks) = (Instant::now(), 0);
        loop {
            if self.open.load(Ordering::Relaxed) {
                self.inside.fetch_add(1, Ordering::SeqCst);
                let inside = Inside(self);
                if self.open.load(Ordering::SeqCst) {
                    self.take();
                }
                drop(inside);
                (since, looks) = (Instant::now(), 0);
            }
            look(&mut looks);
            if looks.is_multiple_of(LOOKS) && since.elapsed() > PATIENCE {
                self.helpers.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

/// A moment between two looks.
fn look(looks: &mut usize) {
    *looks += 1;
    match looks.is_multiple_of(LOOKS) {
        true => std::thread::yield_now(),
        false => std::hint::spin_loop(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::ops::tests::on;

    #[test]
    fn every_item_is_taken_once_by_any_number_of_threads() {
        for threads in [1, 2, 3, 5] {
            on(threads, || {
                for count in [0, 1, 2, 3, 7, 100, 1000] {
                    let mut values = vec![0usize; count];
                    each(values.iter_mut().enumerate(), |(index, value)| *value += index + 1);
                    assert!(values.iter().enumerate().all(|(index, value)| *value == index + 1), "{count} on {threads}");
                }
            });
        }
    }

    #[test]
    fn a_thread_begins_with_its_own_run() {
        on(2, || {
            let (firsts, both) = ([const { AtomicUsize::new(usize::MAX) }; 2], std::sync::Barrier::new(2));
            each(0..64, |item| {
                let first = &firsts[rayon::current_thread_index().unwrap()];
                if first.compare_exchange(usize::MAX, item, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    both.wait();
                }
            });
            assert_eq!(firsts.map(AtomicUsize::into_inner), [0, 32]);
        });
    }

    #[test]
    fn loops_follow_each_other_and_pauses() {
        on(3, || {
            let total = AtomicUsize::new(0);
            for round in 0..2000 {
                each(0..4, |item| {
                    total.fetch_add(item, Ordering::Relaxed);
                });
                if round % 500 == 0 {
                    std::thread::sleep(3 * PATIENCE);
                }
            }
            assert_eq!(total.into_inner(), 2000 * 6);
        });
    }

    #[test]
    fn other_threads_take_part() {
        on(2, || {
            let main = std::thread::current().id();
            let others = AtomicUsize::new(0);
            each(0..64, |_| {
                std::thread::sleep(Duration::from_millis(1));
                others.fetch_add(usize::from(std::thread::current().id() != main), Ordering::Relaxed);
            });
            assert!(others.into_inner() > 0, "all was done by one thread");
        });
    }

    #[test]
    fn a_failed_item_fails_the_loop_and_the_next_loop_works() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).panic_handler(|_| {}).build().unwrap();
        pool.install(|| {
            let failed = std::panic::catch_unwind(|| {
                each(0..64, |item| {
                    std::thread::sleep(Duration::from_millis(1));
                    assert_ne!(item, 40, "on purpose");
                });
            });
            assert!(failed.is_err());
            let total = AtomicUsize::new(0);
            each(0..10, |item| {
                total.fetch_add(item, Ordering::Relaxed);
            });
            assert_eq!(total.into_inner(), 45);
        });
    }
}
