//! The error type: what failed, where, the value, the rule and the remedy; the boundary for panics of libraries.
//!
//! Code and tests match on [`Error::kind`], never on a message. The exit status follows from the stage of the failure.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

/// The result of every module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line.
    Usage,
    /// A recipe file: syntax, an unknown key, a value that breaks a rule.
    Recipe,
    /// Reading or writing a file.
    Io,
    /// The hub: network, authentication, a missing repository or file.
    Hub,
    /// A training or validation record.
    Data,
    /// A tokenizer or a chat template.
    Tokenizer,
    /// A model's configuration or weights.
    Model,
    /// A LoRA adapter's configuration or weights.
    Adapter,
    /// A device profile or a sensor.
    Energy,
    /// An invalid or unsatisfiable budget.
    Budget,
    /// Insufficient memory or disk space.
    Resources,
    /// A compute device that is absent or not compiled in.
    Device,
    /// A non-finite loss or gradient.
    Diverged,
    /// A run directory: existing, incomplete, or of another recipe.
    Run,
    /// A failed tensor operation.
    Tensor,
}

/// Stage of the failure, which decides the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Preflight,
    Running,
}

/// A failure with its place, value, rule and remedy.
///
/// ```
/// use wattune::error::{Error, Kind};
/// let error = Error::new(Kind::Data, "a record has no text").at("train.jsonl, line 7").hint("remove the line");
/// assert_eq!(error.to_string(), "a record has no text\n  at train.jsonl, line 7\n\nhint: remove the line");
/// assert_eq!(error.exit_status(), 2);
/// ```
#[derive(Debug)]
pub struct Error(Box<Parts>);

#[derive(Debug)]
struct Parts {
    kind: Kind,
    stage: Stage,
    what: String,
    place: Option<String>,
    value: Option<String>,
    rule: Option<String>,
    hint: Option<String>,
    /// The recipe key whose value is at fault.
    key: Option<&'static str>,
    written: Option<Written>,
    /// Independent failures that this one stands for; empty for one failure.
    all: Vec<Error>,
}

/// Where a recipe, or a `--set`, gives a value.
#[derive(Debug, Clone)]
pub struct Written {
    /// `line 3, column 9 of recipe.toml`, or `--set KEY=VALUE`.
    pub place: String,
    /// The line with a caret under the value.
    pub snippet: String,
    /// Orders places as they are read.
    pub order: (usize, usize),
}

impl Error {
    /// A failure of `kind`; `what` is one sentence without a final full stop.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        let what = what.into();
        Self(Box::new(Parts {
            kind,
            stage: Stage::Preflight,
            what,
            place: None,
            value: None,
            rule: None,
            hint: None,
            key: None,
            written: None,
            all: Vec::new(),
        }))
    }

    /// Failures that do not follow from each other, as one; `None` for an empty list.
    pub fn all(errors: Vec<Error>) -> Option<Self> {
        let single = |error: Error| match error.0.all.is_empty() {
            true => vec![error],
            false => error.0.all,
        };
        let mut errors: Vec<Error> = errors.into_iter().flat_map(single).collect();
        if errors.len() < 2 {
            return errors.pop();
        }
        let what = format!("the recipe cannot run for {} reasons", errors.len());
        let mut all = Self::new(errors[0].kind(), what);
        all.0.all = errors;
        Some(all)
    }

    /// A failed file operation; `doing` is its verb ("read", "write", "create").
    pub fn io(doing: &str, path: &Path, source: std::io::Error) -> Self {
        let error = Self::new(
            Kind::Io,
            format!("cannot {doing} `{}`: {source}", path.display()),
        );
        match source.kind() {
            std::io::ErrorKind::NotFound => {
                error.hint("check the path (in a recipe it is relative to the recipe file)")
            }
            std::io::ErrorKind::PermissionDenied => {
                error.hint("check the file's owner and permissions")
            }
            std::io::ErrorKind::StorageFull => {
                error.hint("free some space, or choose another place with `--out DIR`")
            }
            _ => error,
        }
    }

    /// Adds the place: a file and line, a key, a tensor.
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.0.place = Some(place.into());
        self
    }

    /// Adds the recipe key whose value is at fault, unless one is named already.
    pub fn key(mut self, key: &'static str) -> Self {
        self.0.key.get_or_insert(key);
        self.0.all = self.0.all.into_iter().map(|one| one.key(key)).collect();
        self
    }

    /// Adds where the key at fault, or the key that is the place, is written; several failures come in reading order.
    pub fn located(mut self, written: &dyn Fn(&str) -> Option<Written>) -> Self {
        let parts = &mut self.0;
        let keys = [parts.place.as_deref(), parts.key];
        parts.written = keys.into_iter().flatten().find_map(written);
        let all = std::mem::take(&mut parts.all).into_iter();
        parts.all = all.map(|one| one.located(written)).collect();
        let order = |one: &Error| one.0.written.as_ref().map(|written| written.order);
        parts
            .all
            .sort_by_key(|one| (order(one).is_none(), order(one)));
        self
    }

    /// Adds the offending value.
    pub fn value(mut self, value: impl Into<String>) -> Self {
        self.0.value = Some(value.into());
        self
    }

    /// Adds the violated rule.
    pub fn rule(mut self, rule: impl Into<String>) -> Self {
        self.0.rule = Some(rule.into());
        self
    }

    /// Adds the remedy.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Marks a failure after preflight: exit status 1.
    pub fn while_running(mut self) -> Self {
        self.0.stage = Stage::Running;
        self
    }

    /// Kind of failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What failed, in one sentence.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// The remedy, if any.
    pub fn remedy(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Its parts for programs: `kind`, `what`, `place`, `value`, `rule`, `hint` (null where there is none), `exit_status`; of several
    /// failures also `all`, a list of them.
    pub fn to_json(&self) -> serde_json::Value {
        let mut error = self.parts_as_json();
        error["exit_status"] = self.exit_status().into();
        if !self.0.all.is_empty() {
            error["all"] = self.0.all.iter().map(Self::parts_as_json).collect();
        }
        serde_json::json!({ "error": error })
    }

    fn parts_as_json(&self) -> serde_json::Value {
        let parts = &self.0;
        let written = parts.written.as_ref().map(|written| &written.place);
        serde_json::json!({
            "kind": format!("{:?}", parts.kind).to_lowercase(),
            "what": parts.what,
            "place": parts.place.as_ref().or(written),
            "value": parts.value,
            "rule": parts.rule,
            "hint": parts.hint,
        })
    }

    /// Everything but the remedy.
    fn write_finding(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = &self.0;
        f.write_str(&parts.what)?;
        let written = parts.written.as_ref();
        let places = parts.place.iter().chain(written.map(|at| &at.place));
        let places: Vec<&str> = places.map(String::as_str).collect();
        if !places.is_empty() {
            write!(f, "\n  at {}", places.join(", "))?;
        }
        if let Some(written) = written {
            write!(f, "\n{}", written.snippet)?;
        }
        for (label, text) in [("value:", &parts.value), ("rule:", &parts.rule)] {
            if let Some(text) = text {
                write!(f, "\n  {label} {text}")?;
            }
        }
        Ok(())
    }

    /// 2 for a failure in preflight, 1 for a later one.
    pub fn exit_status(&self) -> u8 {
        match self.0.stage {
            Stage::Preflight => 2,
            Stage::Running => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_finding(f)?;
        for one in &self.0.all {
            f.write_str("\n\n")?;
            one.write_finding(f)?;
            if let Some(hint) = one.remedy() {
                write!(f, "\n  hint: {hint}")?;
            }
        }
        match &self.0.hint {
            Some(hint) => write!(f, "\n\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::new(Kind::Tensor, source.to_string())
    }
}

thread_local! {
    /// Whether [`catch_panic`] is on this thread's stack.
    static CATCHES: Cell<bool> = const { Cell::new(false) };
}

/// Calls a library that may panic on malformed input. The error is the library's own or the panic's message, which is not
/// printed. Panics of other threads are not caught.
///
/// ```
/// use wattune::error::catch_panic;
/// let half = |length: usize| catch_panic(|| Ok::<usize, String>(10 / length));
/// assert_eq!(half(2), Ok(5));
/// assert_eq!(half(0), Err("attempt to divide by zero".to_string()));
/// ```
pub fn catch_panic<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CATCHES.get() {
                print(info);
            }
        }));
    });
    let outer = CATCHES.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(call));
    CATCHES.set(outer);
    match outcome {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(payload) => Err(panic_message(payload.as_ref()).to_string()),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let formatted = || payload.downcast_ref::<String>().map(String::as_str);
    let constant = payload.downcast_ref::<&str>().copied();
    constant
        .or_else(formatted)
        .unwrap_or("a panic without a message")
}
