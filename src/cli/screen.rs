//! Progress on standard error: a live line on a terminal, a line now and then in a log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::note;
use crate::run::{Progress, Screen, StepRecord, StepView};
use crate::text::printable;
use crate::units::{Joules, Seconds};

/// In a log, a progress line at most this often.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// The live line, for [`announce`].
static LIVE: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Sets the live line, or takes it away.
fn set_live(bar: Option<ProgressBar>) {
    *LIVE.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Writes a line above the live line, if there is one; also from a signal's thread.
pub(super) fn announce(text: &str) {
    let live = LIVE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match live {
        Some(bar) => bar.suspend(|| note(text)),
        None => note(text),
    }
}

/// The progress of a plan is shown so often.
const PLAN_EVERY: Duration = Duration::from_secs(1);

/// The command line's screen.
pub(super) struct Terminal {
    quiet: bool,
    live: bool,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    val_loss: Option<f64>,
    downloads: Downloads,
}

impl Terminal {
    pub(super) fn new(quiet: bool) -> Self {
        use std::io::IsTerminal;
        let live = std::io::stderr().is_terminal() && !quiet;
        Self {
            quiet,
            live,
            bar: None,
            last_line: None,
            val_loss: None,
            downloads: Downloads::new(quiet),
        }
    }

    /// Takes the live line away.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            set_live(None);
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        if !self.quiet {
            announce(text);
        }
    }

    fn bar(&mut self, steps: u64) -> &ProgressBar {
        let bar = self.bar.get_or_insert_with(|| {
            let bar =
                ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr_with_hz(8));
            let style = ProgressStyle::with_template("{bar:12} {pos}/{len} {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("=> "));
            set_live(Some(bar.clone()));
            bar
        });
        // A baseline after the run has a length of its own.
        bar.set_length(steps);
        bar
    }
}

impl Screen for Terminal {
    fn note(&mut self, line: &str) {
        self.line(line);
    }

    fn planning(&mut self, done: u64, of: u64) {
        let last = *self.last_line.get_or_insert_with(Instant::now);
        if self.quiet || last.elapsed() < PLAN_EVERY {
            return;
        }
        self.last_line = Some(Instant::now());
        if self.live {
            let bar = self.bar(of);
            bar.set_position(done);
            bar.set_message("steps planned");
        } else {
            self.line(&format!("{done} of {of} steps planned"));
        }
    }

    fn step(&mut self, record: &StepRecord, view: &StepView) {
        if self.quiet {
            return;
        }
        let text = progress(record, view);
        if self.live {
            let bar = self.bar(view.expected_steps.max(record.step));
            bar.set_position(record.step);
            bar.set_message(text);
        } else if self
            .last_line
            .is_none_or(|last| last.elapsed() >= LOG_EVERY)
        {
            self.last_line = Some(Instant::now());
            self.line(&format!(
                "step {}/{} {text}",
                record.step, view.expected_steps
            ));
        }
    }

    fn evaluating(&mut self, done: usize, of: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("evaluating {done}/{of}"));
        }
    }

    fn evaluated(&mut self, step: u64, val_loss: f64) {
        let before = self.val_loss.replace(val_loss).filter(|_| step > 0);
        let change = before.map_or(String::new(), |before| {
            format!(" ({:+.4})", val_loss - before)
        });
        self.line(&format!(
            "step {step}: validation loss {val_loss:.4}{change}"
        ));
    }

    fn downloads(&self) -> &dyn Progress {
        &self.downloads
    }
}

/// "loss 2.3100 · 61 % of the energy budget · 8 s left · 12.4 J · 5210 tok/s · lr 2.00e-4": a narrow terminal cuts the end.
fn progress(record: &StepRecord, view: &StepView) -> String {
    let rate = view.tokens as f64 / view.train_wall.0.max(1e-9);
    let budget = match view.budget {
        Some((limit, part)) => format!("{:.0} % of the {limit} budget · ", 100.0 * part),
        None => String::new(),
    };
    let per_step = Seconds(view.train_wall.0 / view.done.max(1) as f64);
    let left =
        Seconds((per_step.0 * view.expected_steps.saturating_sub(record.step) as f64).ceil());
    let spent: Joules = view.spent;
    format!(
        "loss {} · {budget}{} left · {spent} · {rate:.0} tok/s · lr {:.2e}",
        record
            .loss
            .map_or_else(|| "not finite".to_string(), |loss| format!("{loss:.4}")),
        left.spoken(),
        record.lr
    )
}

/// Download progress: one bar a file on a terminal, one line a file in a log.
struct Downloads {
    bar: ProgressBar,
    quiet: bool,
}

impl Downloads {
    fn new(quiet: bool) -> Self {
        let bar = ProgressBar::hidden();
        Self { bar, quiet }
    }
}

impl Progress for Downloads {
    fn retry(&self, reason: &str, delay: Duration) {
        if !self.quiet {
            let delay = Seconds(delay.as_secs_f64().ceil());
            let line = format!("{reason}; trying again in {}", delay.spoken());
            self.bar.suspend(|| note(&line));
        }
    }

    fn start(&self, file: &str, bytes: Option<u64>) {
        if self.quiet {
            return;
        }
        self.bar
            .set_draw_target(ProgressDrawTarget::stderr_with_hz(4));
        self.bar.set_length(bytes.unwrap_or(0));
        self.bar.set_position(0);
        let style =
            ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}");
        self.bar.set_style(
            style
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        self.bar.set_message(printable(file).into_owned());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn finish(&self) {
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
    }
}
