//! Loops over the threads of the pool, many thousands a step: who has nothing to do looks for more for a while before it sleeps.
//!
//! rayon puts an idle thread to sleep after some microseconds and wakes it through the system, which takes longer than most loops of a
//! small model last. Here the pool's threads stay with the thread that hands out work, and go back to rayon when there was nothing for
//! `SPIN_TIMEOUT`. Each thread takes its own run of the items first, the same part of every loop, so that what it wrote in one loop is still in its
//! cache in the next, and then what others have left. Which thread takes which item is chance all the same; no result may depend on it.
//! `par_map` goes further: each thread has whole walks through a model to itself, and threads meet once for all of them.

use std::cell::{RefCell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread looks for more work before it leaves.
const SPIN_TIMEOUT: Duration = Duration::from_millis(1);
/// Looks between two looks at the clock, and between two offers of the processor to others.
const SPINS_PER_YIELD: usize = 256;
/// Most runs that a loop is cut into; more threads share them.
const MAX_CHUNKS: usize = 64;

/// Calls `work` once for each item, on all threads of the current pool; returns when all are done.
pub(super) fn par_for_each<I: Send>(items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
    let threads = num_threads();
    if threads == 1 {
        return items.for_each(work);
    }
    let items: Vec<ItemSlot<I>> = items.map(ItemSlot::new).collect();
    let take = |index: usize| {
        // SAFETY: every index is handed out once.
        if let Some(item) = unsafe { items[index].take() } {
            work(item);
        }
    };
    match items.len() {
        0 => {}
        1 => take(0),
        count => match WORKER_SLOT.with_borrow(Option::clone) {
            Some(WorkerSlot { all, own }) => all.teams[own].execute(threads, count, &take, || {}),
            None => SPIN_POOL.with(|team| {
                team.execute(threads, count, &take, || team.wake_workers(threads - 1))
            }),
        },
    }
}

/// Threads that a loop of this thread runs on.
pub(super) fn num_threads() -> usize {
    WORKER_SLOT.with_borrow(|lane| match lane {
        Some(lane) => 1 + lane.all.idle.load(Ordering::Relaxed),
        None => rayon::current_num_threads(),
    })
}

/// Calls `work` once for each item; returns the results in the items' order. Each thread of the current pool takes whole items, and runs their
/// loops itself: threads meet once for all, not in every loop. One that finds no item left helps the others in theirs.
pub fn par_map<I: Send, T: Send>(
    items: impl ExactSizeIterator<Item = I>,
    work: impl Fn(I) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<Option<T>> = std::iter::repeat_with(|| None).take(items.len()).collect();
    let slots: Vec<_> = items.zip(&mut results).map(ItemSlot::new).collect();
    let lanes = Arc::new(WorkerGroup::new(num_threads(), slots.len()));
    par_for_each(0..lanes.teams.len(), |own| {
        lanes.run(own, |index| {
            // SAFETY: every index is handed out once.
            if let Some((item, result)) = unsafe { slots[index].take() } {
                *result = Some(work(item));
            }
        });
    });
    drop(slots);
    results.into_iter().flatten().collect()
}

thread_local! {
    /// The threads that stay with this one.
    static SPIN_POOL: Arc<SpinPool> = Arc::new(SpinPool::new());
    /// Where this thread has items of its own, side by side with others.
    static WORKER_SLOT: RefCell<Option<WorkerSlot>> = const { RefCell::new(None) };
}

/// Threads side by side.
struct WorkerGroup {
    /// Of each, those that help it.
    teams: Vec<SpinPool>,
    /// The next item.
    next: AtomicUsize,
    count: usize,
    /// Items that are not done.
    left: AtomicUsize,
    /// Threads that have no item and may help.
    idle: AtomicUsize,
}

/// One of them.
#[derive(Clone)]
struct WorkerSlot {
    all: Arc<WorkerGroup>,
    own: usize,
}

impl WorkerGroup {
    fn new(threads: usize, count: usize) -> Self {
        let (next, left, idle) = (
            AtomicUsize::new(0),
            AtomicUsize::new(count),
            AtomicUsize::new(0),
        );
        Self {
            teams: (0..threads).map(|_| SpinPool::new()).collect(),
            next,
            count,
            left,
            idle,
        }
    }

    /// Takes items until there are none, then helps others until all are done.
    fn run(self: &Arc<Self>, own: usize, task: impl Fn(usize)) {
        /// Puts back where the thread was when dropped, also when an item panics.
        struct RestoreSlot(Option<WorkerSlot>);
        impl Drop for RestoreSlot {
            fn drop(&mut self) {
                WORKER_SLOT.set(self.0.take());
            }
        }
        let within = RestoreSlot(WORKER_SLOT.replace(Some(WorkerSlot {
            all: Arc::clone(self),
            own,
        })));
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                break;
            }
            let _done = DecrementOnDrop(&self.left);
            task(index);
        }
        drop(within);
        self.idle.fetch_add(1, Ordering::Relaxed);
        let _idle = DecrementOnDrop(&self.idle);
        let mut looks = 0;
        let mut seen = vec![0; self.teams.len()];
        while self.left.load(Ordering::SeqCst) > 0 {
            for (team, seen) in self.teams.iter().zip(&mut seen) {
                team.try_join(seen);
            }
            backoff(&mut looks);
        }
    }
}

/// One less when dropped, also when an item panics.
struct DecrementOnDrop<'a>(&'a AtomicUsize);

impl Drop for DecrementOnDrop<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An item that one thread takes.
struct ItemSlot<I>(UnsafeCell<Option<I>>);

impl<I> ItemSlot<I> {
    fn new(item: I) -> Self {
        Self(UnsafeCell::new(Some(item)))
    }

    /// # Safety
    /// One thread calls it, once.
    unsafe fn take(&self) -> Option<I> {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.get()).take() }
    }
}

// SAFETY: a slot is touched by the one thread that its index was handed to.
unsafe impl<I: Send> Sync for ItemSlot<I> {}

/// What a thread shares with those that help it.
struct SpinPool {
    /// The number of the loop that others may join, an odd one; even while there is none.
    open: AtomicUsize,
    /// Threads that may look at the loop.
    inside: AtomicUsize,
    /// Threads that stay.
    helpers: AtomicUsize,
    /// The next item of each run.
    next: [Next; MAX_CHUNKS],
    /// Whether a helper's item panicked.
    failed: AtomicBool,
    work: UnsafeCell<Option<Job>>,
}

/// A run's next item, on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Next(AtomicUsize);

/// A loop on its owner's stack.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
    runs: usize,
}

impl Job {
    /// The items of a run.
    fn run(&self, index: usize) -> Range<usize> {
        self.count * index / self.runs..self.count * (index + 1) / self.runs
    }
}

// SAFETY: `work` is written while the loop is closed and nobody is inside, and points to a closure that is `Sync` and outlives the loop.
unsafe impl Sync for SpinPool {}
// SAFETY: as above.
unsafe impl Send for SpinPool {}

/// Closes the loop when dropped, and waits for those inside: also when the owner's own item panics.
struct CloseOnDrop<'a>(&'a SpinPool);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0;
        while self.0.inside.load(Ordering::SeqCst) != 0 {
            backoff(&mut looks);
        }
    }
}

/// Leaves the loop when dropped.
struct ActiveGuard<'a>(&'a SpinPool);

impl Drop for ActiveGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
        }
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SpinPool {
    fn new() -> Self {
        Self {
            open: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            helpers: AtomicUsize::new(0),
            next: std::array::from_fn(|_| Next::default()),
            failed: AtomicBool::new(false),
            work: UnsafeCell::new(None),
        }
    }

    /// Runs the loop with whoever joins; `summon` calls others once it is open. A loop inside an item of the owner's is the owner's alone.
    fn execute<'a>(
        &self,
        threads: usize,
        count: usize,
        task: &'a (dyn Fn(usize) + Sync + 'a),
        summon: impl FnOnce(),
    ) {
        if is_open(self.open.load(Ordering::Relaxed)) {
            return (0..count).for_each(task);
        }
        // SAFETY: only the lifetime is forgotten, and `CloseOnDrop` waits for every user before `task` goes.
        let task: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), _>(task) };
        let work = Job {
            task,
            count,
            runs: threads.min(MAX_CHUNKS),
        };
        // SAFETY: the loop before is closed and left, so that nobody reads.
        unsafe { *self.work.get() = Some(work) };
        (0..work.runs).for_each(|run| {
            self.next[run]
                .0
                .store(work.run(run).start, Ordering::SeqCst)
        });
        {
            let _open = CloseOnDrop(self);
            self.failed.store(false, Ordering::SeqCst);
            self.open.fetch_add(1, Ordering::SeqCst);
            summon();
            self.drain();
        }
        assert!(
            !self.failed.load(Ordering::SeqCst),
            "an item failed on another thread"
        );
    }

    /// Has as many threads of the pool come and stay.
    fn wake_workers(self: &Arc<Self>, helpers: usize) {
        while self.helpers.load(Ordering::SeqCst) < helpers {
            self.helpers.fetch_add(1, Ordering::SeqCst);
            let team = Arc::clone(self);
            rayon::spawn(move || {
                // Whoever owns the loop tells of an item that panicked.
                let _ = catch_unwind(AssertUnwindSafe(|| team.worker_loop()));
                team.helpers.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    /// Takes items until there are none: of this thread's run, then of the others.
    fn drain(&self) {
        // SAFETY: the caller is the owner or inside, and the loop is open: nobody writes.
        let Some(work) = (unsafe { *self.work.get() }) else {
            return;
        };
        let own = rayon::current_thread_index().unwrap_or(0);
        for run in (own..own + work.runs).map(|run| run % work.runs) {
            let (next, end) = (&self.next[run].0, work.run(run).end);
            while next.load(Ordering::Relaxed) < end {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                // SAFETY: the owner keeps the closure until everybody is out.
                unsafe { (*work.task)(index) };
            }
        }
    }

    /// Takes items of the loop, if one is open that is not `seen`: there are none left in one that was. Returns whether one is open.
    fn try_join(&self, seen: &mut usize) -> bool {
        let open = self.open.load(Ordering::Relaxed);
        if is_open(open) && open != *seen {
            self.inside.fetch_add(1, Ordering::SeqCst);
            let _inside = ActiveGuard(self);
            if self.open.load(Ordering::SeqCst) == open {
                *seen = open;
                self.drain();
            }
        }
        is_open(open)
    }

    /// Stays until there was nothing to do for a while.
    fn worker_loop(&self) {
        let (mut since, mut looks, mut seen) = (Instant::now(), 0, 0);
        loop {
            if self.try_join(&mut seen) {
                (since, looks) = (Instant::now(), 0);
            }
            backoff(&mut looks);
            if looks.is_multiple_of(SPINS_PER_YIELD) && since.elapsed() > SPIN_TIMEOUT {
                return;
            }
        }
    }
}

/// Whether `SpinPool::open` names a loop.
fn is_open(open: usize) -> bool {
    open % 2 == 1
}

/// A moment between two looks.
fn backoff(looks: &mut usize) {
    *looks += 1;
    match looks.is_multiple_of(SPINS_PER_YIELD) {
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
                    par_for_each(values.iter_mut().enumerate(), |(index, value)| {
                        *value += index + 1
                    });
                    assert!(
                        values
                            .iter()
                            .enumerate()
                            .all(|(index, value)| *value == index + 1),
                        "{count} on {threads}"
                    );
                }
            });
        }
    }

    #[test]
    fn a_thread_begins_with_its_own_run() {
        on(2, || {
            let (firsts, both) = (
                [const { AtomicUsize::new(usize::MAX) }; 2],
                std::sync::Barrier::new(2),
            );
            par_for_each(0..64, |item| {
                let first = &firsts[rayon::current_thread_index().unwrap()];
                if first
                    .compare_exchange(usize::MAX, item, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
                {
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
                par_for_each(0..4, |item| {
                    total.fetch_add(item, Ordering::Relaxed);
                });
                if round % 500 == 0 {
                    std::thread::sleep(3 * SPIN_TIMEOUT);
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
            par_for_each(0..64, |_| {
                std::thread::sleep(Duration::from_millis(1));
                others.fetch_add(
                    usize::from(std::thread::current().id() != main),
                    Ordering::Relaxed,
                );
            });
            assert!(others.into_inner() > 0, "all was done by one thread");
        });
    }

    #[test]
    fn a_failed_item_fails_the_loop_and_the_next_loop_works() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(2)
            .panic_handler(|_| {})
            .build()
            .unwrap();
        pool.install(|| {
            let failed = std::panic::catch_unwind(|| {
                par_for_each(0..64, |item| {
                    std::thread::sleep(Duration::from_millis(1));
                    assert_ne!(item, 40, "on purpose");
                });
            });
            assert!(failed.is_err());
            let total = AtomicUsize::new(0);
            par_for_each(0..10, |item| {
                total.fetch_add(item, Ordering::Relaxed);
            });
            assert_eq!(total.into_inner(), 45);
        });
    }

    #[test]
    fn where_every_item_fails_the_threads_stay() {
        // Without a handler of panics a pool ends the program at the first that reaches it.
        on(3, || {
            for _ in 0..20 {
                let failed = catch_unwind(|| par_for_each(0..64, |_| panic!("on purpose")));
                assert!(failed.is_err());
                let total = AtomicUsize::new(0);
                par_for_each(0..10, |item| {
                    total.fetch_add(item, Ordering::Relaxed);
                });
                assert_eq!(total.into_inner(), 45);
            }
            assert!(SPIN_POOL.with(|team| team.helpers.load(Ordering::SeqCst)) <= 2);
        });
    }

    #[test]
    fn a_loop_inside_an_item_is_done_whole() {
        for threads in [1, 2, 3] {
            on(threads, || {
                let total = AtomicUsize::new(0);
                par_for_each(0..20, |_| {
                    par_for_each(0..10, |item| {
                        total.fetch_add(item, Ordering::Relaxed);
                    });
                });
                assert_eq!(total.into_inner(), 20 * 45);
            });
        }
    }

    #[test]
    fn side_by_side_every_item_has_its_result_and_its_loops() {
        for threads in [1, 2, 3, 5] {
            on(threads, || {
                for count in [0, 1, 2, 7, 50] {
                    let results = par_map(0..count, |item| {
                        let mut values = vec![0; 20 * (item % 3)];
                        par_for_each(values.iter_mut().enumerate(), |(index, value)| {
                            *value = index * item
                        });
                        values.iter().sum::<usize>()
                    });
                    let sum = |length: usize| (0..length).sum::<usize>();
                    assert!(
                        results
                            .iter()
                            .enumerate()
                            .all(|(item, result)| *result == item * sum(20 * (item % 3)))
                    );
                    assert_eq!(results.len(), count);
                }
            });
        }
    }

    #[test]
    fn side_by_side_a_thread_runs_its_own_loops_until_others_are_idle() {
        on(2, || {
            let both = std::sync::Barrier::new(2);
            par_map(0..2, |item| {
                both.wait();
                let own = std::thread::current().id();
                par_for_each(0..64, |_| {
                    assert_eq!(
                        std::thread::current().id(),
                        own,
                        "the other has an item of its own"
                    )
                });
                both.wait();
                if item == 0 {
                    while num_threads() == 1 {
                        std::thread::yield_now();
                    }
                    let seen = std::sync::Mutex::new(std::collections::HashSet::new());
                    par_for_each(0..64, |_| {
                        if seen.lock().unwrap().insert(std::thread::current().id()) {
                            both.wait();
                        }
                    });
                    assert_eq!(seen.into_inner().unwrap().len(), 2);
                }
            });
        });
    }

    #[test]
    fn side_by_side_a_failed_item_fails_the_call_and_the_next_works() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .panic_handler(|_| {})
            .build()
            .unwrap();
        pool.install(|| {
            for failing in [0, 5, 9] {
                let failed = std::panic::catch_unwind(|| {
                    par_map(0..10, |item| assert_ne!(item, failing, "on purpose"))
                });
                assert!(failed.is_err(), "{failing}");
                assert_eq!(par_map(0..3, |item| item), [0, 1, 2]);
            }
        });
    }
}
