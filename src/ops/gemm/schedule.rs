//! Partition of a result into parallel tasks.

use std::ops::Range;

use crate::ops::parallel::{num_threads, par_for_each};

/// Minimum strips of rows of a task: fewer do not repay packing its panels again.
const MIN_STRIPS: usize = 4;

/// Runs `task(panels, strips)` over the result in parallel: ranges of at most `max_panels` panels
/// (of columns), and of strips (of rows), of nearly equal size, with the same number of tasks for
/// each thread. A thread's rows are split into up to `tasks_per_pack` consecutive tasks on the same
/// panels, so that other threads can take over the remaining tasks of a delayed one.
pub(super) fn par_for_each_task(
    panels: usize,
    max_panels: usize,
    strips: usize,
    tasks_per_pack: usize,
    task: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let threads = num_threads();
    // Each part of the rows packs the panels again. It pays if threads cannot share few panels
    // evenly, or if panels are no more than strips, which their writer then reads.
    let uneven = panels < 8 * threads && !panels.is_multiple_of(threads);
    let by_rows = uneven || panels <= strips && strips >= MIN_STRIPS * threads;
    let row_parts = if by_rows {
        threads.min(strips.div_ceil(MIN_STRIPS)).max(1)
    } else {
        1
    };
    let groups = panels
        .div_ceil(max_panels)
        .next_multiple_of(threads.div_ceil(row_parts))
        .min(panels);
    let repeats = if row_parts > 1 {
        tasks_per_pack.min(strips / row_parts / MIN_STRIPS).max(1)
    } else {
        1
    };
    let run = |index: usize| {
        let group = index / repeats % groups;
        let row_part = index / repeats / groups * repeats + index % repeats;
        let strip = |part: usize| strips * part / (row_parts * repeats);
        task(
            panels * group / groups..panels * (group + 1) / groups,
            strip(row_part)..strip(row_part + 1),
        );
    };
    match groups * row_parts * repeats {
        1 => run(0),
        count => par_for_each(0..count, run),
    }
}

/// Splits `range` into blocks of `size` elements; the last may be shorter.
pub(super) fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(size)
        .map(move |start| start..(start + size).min(end))
}

/// Splits `range` into the fewest parts of at most `max` elements, of nearly equal length.
pub(in crate::ops) fn even_parts(
    range: Range<usize>,
    max: usize,
) -> impl Iterator<Item = Range<usize>> + Clone {
    let start = range.start;
    let length = range.len();
    let parts = length.div_ceil(max);
    (0..parts).map(move |part| start + part * length / parts..start + (part + 1) * length / parts)
}
