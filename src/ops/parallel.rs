//! Fork-join parallel loops on the rayon pool, with spinning workers.
//!
//! rayon parks an idle worker within microseconds, and waking one takes longer than most loops of a
//! small model. Here workers of the current rayon pool stay assigned to the thread that starts the
//! loops and spin for `SPIN_TIMEOUT` before they return to rayon. Each worker takes its own chunk
//! of the items first, the same part of every loop, so that it finds in its cache what it wrote in
//! the loop before, and then steals from the other chunks. Which worker takes an item is chance: no
//! result may depend on it.
//!
//! `par_map` is data parallelism: each worker runs one item at a time with all loops in it, and
//! workers without items join the others' loops.

use std::cell::{RefCell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it returns to rayon.
const SPIN_TIMEOUT: Duration = Duration::from_millis(1);
/// Spins between two yields, at which the timeout is checked.
const SPINS_PER_YIELD: usize = 256;
/// Maximum number of chunks of a loop; workers beyond it share them.
const MAX_CHUNKS: usize = 64;

/// Calls `work` once for each item, on all threads of the current pool; returns when all are done.
pub(super) fn par_for_each<I: Send>(items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
    let threads = num_threads();
    if threads == 1 {
        return items.for_each(work);
    }
    let items: Vec<ItemSlot<I>> = items.map(ItemSlot::new).collect();
    let task = |index: usize| {
        // SAFETY: every index is given to one thread, once.
        if let Some(item) = unsafe { items[index].take() } {
            work(item);
        }
    };
    match items.len() {
        0 => {}
        1 => task(0),
        count => match WORKER_SLOT.with_borrow(Option::clone) {
            Some(slot) => slot.pool().execute(threads, count, &task, || {}),
            None => SPIN_POOL.with(|pool| {
                pool.execute(threads, count, &task, || pool.wake_workers(threads - 1));
            }),
        },
    }
}

/// Threads that a loop started here runs on.
pub(super) fn num_threads() -> usize {
    WORKER_SLOT.with_borrow(|slot| match slot {
        Some(slot) => 1 + slot.group.idle.load(Ordering::Relaxed),
        None => rayon::current_num_threads(),
    })
}

/// Maps items in parallel; the results are in the items' order.
///
/// Each thread of the current pool runs one item at a time, with the loops in it, so that threads
/// synchronise once and not in every loop. Threads without an item help with the others' loops.
///
/// ```
/// use wattune::ops::par_map;
/// assert_eq!(par_map([1, 2, 3].iter(), |x| x * x), [1, 4, 9]);
/// ```
pub fn par_map<I: Send, T: Send>(
    items: impl ExactSizeIterator<Item = I>,
    work: impl Fn(I) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<Option<T>> = std::iter::repeat_with(|| None).take(items.len()).collect();
    let slots: Vec<_> = items.zip(&mut results).map(ItemSlot::new).collect();
    let group = Arc::new(WorkerGroup::new(num_threads(), slots.len()));
    par_for_each(0..group.pools.len(), |worker| {
        group.run(worker, |index| {
            // SAFETY: every index is given to one thread, once.
            if let Some((item, result)) = unsafe { slots[index].take() } {
                *result = Some(work(item));
            }
        });
    });
    drop(slots);
    results.into_iter().flatten().collect()
}

thread_local! {
    /// The loops that this thread starts, and the workers assigned to it.
    static SPIN_POOL: Arc<SpinPool> = Arc::new(SpinPool::new());
    /// Set while this thread runs an item of a `par_map`.
    static WORKER_SLOT: RefCell<Option<WorkerSlot>> = const { RefCell::new(None) };
}

/// The workers of one `par_map`.
struct WorkerGroup {
    /// For each worker, its loops, which idle workers join.
    pools: Vec<SpinPool>,
    /// The next item.
    next: AtomicUsize,
    count: usize,
    /// Items not done.
    pending: AtomicUsize,
    /// Workers without an item.
    idle: AtomicUsize,
}

/// A `par_map`, and the index of this thread's worker in it.
#[derive(Clone)]
struct WorkerSlot {
    group: Arc<WorkerGroup>,
    worker: usize,
}

impl WorkerSlot {
    fn pool(&self) -> &SpinPool {
        &self.group.pools[self.worker]
    }
}

impl WorkerGroup {
    fn new(threads: usize, count: usize) -> Self {
        Self {
            pools: (0..threads).map(|_| SpinPool::new()).collect(),
            next: AtomicUsize::new(0),
            count,
            pending: AtomicUsize::new(count),
            idle: AtomicUsize::new(0),
        }
    }

    /// Runs items until none is left, then joins the others' loops until all items are done.
    fn run(self: &Arc<Self>, worker: usize, task: impl Fn(usize)) {
        let slot = WorkerSlot {
            group: Arc::clone(self),
            worker,
        };
        let restore = RestoreSlot(WORKER_SLOT.replace(Some(slot)));
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                break;
            }
            let _done = DecrementOnDrop(&self.pending);
            task(index);
        }
        drop(restore);
        self.idle.fetch_add(1, Ordering::Relaxed);
        let _idle = DecrementOnDrop(&self.idle);
        let mut spins = 0;
        let mut seen = vec![0; self.pools.len()];
        while self.pending.load(Ordering::SeqCst) > 0 {
            for (pool, seen) in self.pools.iter().zip(&mut seen) {
                pool.try_join(seen);
            }
            backoff(&mut spins);
        }
    }
}

/// Restores the thread's previous slot, also when an item panics.
struct RestoreSlot(Option<WorkerSlot>);

impl Drop for RestoreSlot {
    fn drop(&mut self) {
        WORKER_SLOT.set(self.0.take());
    }
}

/// Decrements on drop, also when an item panics.
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
    /// Called by one thread, once.
    unsafe fn take(&self) -> Option<I> {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.get()).take() }
    }
}

// SAFETY: a slot is accessed by the one thread that its index is given to.
unsafe impl<I: Send> Sync for ItemSlot<I> {}

/// The loops of one thread, and the workers that join them.
struct SpinPool {
    /// Odd while a loop is open: the loop's number. Even while none is.
    epoch: AtomicUsize,
    /// Workers that may access the open loop.
    active: AtomicUsize,
    /// Workers that spin for a loop.
    workers: AtomicUsize,
    /// The next item of each chunk.
    next: [NextItem; MAX_CHUNKS],
    /// Whether an item panicked on a worker.
    panicked: AtomicBool,
    job: UnsafeCell<Option<Job>>,
}

/// Padded to a cache line.
#[derive(Default)]
#[repr(align(64))]
struct NextItem(AtomicUsize);

/// A loop; its closure is on the stack of the thread that started it.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
    chunks: usize,
}

impl Job {
    fn chunk(&self, index: usize) -> Range<usize> {
        self.count * index / self.chunks..self.count * (index + 1) / self.chunks
    }
}

// SAFETY: `job` is written while the loop is closed and no worker is active; its closure is `Sync`
// and outlives the loop.
unsafe impl Sync for SpinPool {}
// SAFETY: as above.
unsafe impl Send for SpinPool {}

/// Closes the loop on drop and waits for its active workers, also when an item of its own thread
/// panics.
struct CloseOnDrop<'a>(&'a SpinPool);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.epoch.fetch_add(1, Ordering::SeqCst);
        let mut spins = 0;
        while self.0.active.load(Ordering::SeqCst) != 0 {
            backoff(&mut spins);
        }
    }
}

/// Leaves the loop on drop and records a panic.
struct ActiveGuard<'a>(&'a SpinPool);

impl Drop for ActiveGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::SeqCst);
        }
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SpinPool {
    fn new() -> Self {
        Self {
            epoch: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            next: std::array::from_fn(|_| NextItem::default()),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(None),
        }
    }

    /// Runs a loop with the workers that join it; `wake` is called once it is open. A loop nested
    /// in an item runs on this thread alone.
    fn execute<'a>(
        &self,
        threads: usize,
        count: usize,
        task: &'a (dyn Fn(usize) + Sync + 'a),
        wake: impl FnOnce(),
    ) {
        if is_open(self.epoch.load(Ordering::Relaxed)) {
            return (0..count).for_each(task);
        }
        // SAFETY: this erases the lifetime alone; `CloseOnDrop` waits for every user before `task`
        // is dropped.
        let task: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), _>(task) };
        let job = Job {
            task,
            count,
            chunks: threads.min(MAX_CHUNKS),
        };
        // SAFETY: the previous loop is closed and has no active worker, so nobody reads.
        unsafe { *self.job.get() = Some(job) };
        for (index, next) in self.next[..job.chunks].iter().enumerate() {
            next.0.store(job.chunk(index).start, Ordering::SeqCst);
        }
        {
            let _close = CloseOnDrop(self);
            self.panicked.store(false, Ordering::SeqCst);
            self.epoch.fetch_add(1, Ordering::SeqCst);
            wake();
            self.drain();
        }
        assert!(
            !self.panicked.load(Ordering::SeqCst),
            "an item failed on another thread"
        );
    }

    /// Spawns rayon tasks until `count` workers spin for this thread's loops.
    fn wake_workers(self: &Arc<Self>, count: usize) {
        while self.workers.load(Ordering::SeqCst) < count {
            self.workers.fetch_add(1, Ordering::SeqCst);
            let pool = Arc::clone(self);
            rayon::spawn(move || {
                // The thread that started the loop reports the panic.
                let _ = catch_unwind(AssertUnwindSafe(|| pool.worker_loop()));
                pool.workers.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    /// Runs items until none is left: of this thread's chunk, then of the others.
    fn drain(&self) {
        // SAFETY: this thread started the open loop or is active in it, so nobody writes.
        let Some(job) = (unsafe { *self.job.get() }) else {
            return;
        };
        let first = rayon::current_thread_index().unwrap_or(0);
        for chunk in (first..first + job.chunks).map(|chunk| chunk % job.chunks) {
            let next = &self.next[chunk].0;
            let end = job.chunk(chunk).end;
            while next.load(Ordering::Relaxed) < end {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                // SAFETY: the closure outlives the loop's last active worker.
                unsafe { (*job.task)(index) };
            }
        }
    }

    /// Runs items of the open loop, unless it is `seen`: one that was drained before. Returns
    /// whether a loop is open.
    fn try_join(&self, seen: &mut usize) -> bool {
        let epoch = self.epoch.load(Ordering::Relaxed);
        if is_open(epoch) && epoch != *seen {
            self.active.fetch_add(1, Ordering::SeqCst);
            let _active = ActiveGuard(self);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                *seen = epoch;
                self.drain();
            }
        }
        is_open(epoch)
    }

    /// Joins loops until there was none for `SPIN_TIMEOUT`.
    fn worker_loop(&self) {
        let mut idle_since = Instant::now();
        let mut spins = 0;
        let mut seen = 0;
        loop {
            if self.try_join(&mut seen) {
                idle_since = Instant::now();
                spins = 0;
            }
            backoff(&mut spins);
            if spins.is_multiple_of(SPINS_PER_YIELD) && idle_since.elapsed() > SPIN_TIMEOUT {
                return;
            }
        }
    }
}

fn is_open(epoch: usize) -> bool {
    epoch % 2 == 1
}

/// One spin; every `SPINS_PER_YIELD`th yields the core.
fn backoff(spins: &mut usize) {
    *spins += 1;
    if spins.is_multiple_of(SPINS_PER_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::ops::tests::on;

    #[test]
    fn every_item_runs_once_on_any_number_of_threads() {
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
    fn a_worker_starts_with_its_chunk() {
        on(2, || {
            let firsts = [const { AtomicUsize::new(usize::MAX) }; 2];
            let both = std::sync::Barrier::new(2);
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
    fn loops_run_after_each_other_and_after_pauses() {
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
    fn other_threads_join() {
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
            assert!(others.into_inner() > 0, "one thread ran every item");
        });
    }

    #[test]
    fn a_panic_fails_the_loop_and_not_the_next() {
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
    fn panics_do_not_lose_workers() {
        // Without a panic handler, rayon aborts at the first panic that reaches it.
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
            assert!(SPIN_POOL.with(|pool| pool.workers.load(Ordering::SeqCst)) <= 2);
        });
    }

    #[test]
    fn nested_loops_complete() {
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
    fn par_map_keeps_order_and_runs_loops() {
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
    fn par_map_loops_get_idle_workers_only() {
        on(2, || {
            let both = std::sync::Barrier::new(2);
            par_map(0..2, |item| {
                both.wait();
                let this = std::thread::current().id();
                par_for_each(0..64, |_| {
                    assert_eq!(
                        std::thread::current().id(),
                        this,
                        "the other worker has an item"
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
    fn par_map_a_panic_fails_the_call_and_not_the_next() {
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
