//! What the end-to-end tests share: a folder with records and a recipe, the program, and readers of what a run leaves.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A small run on the model inside the program: 24 records, 3 to validate, two rows to a step.
const RECIPE: &str = r#"
name = "small"
seed = 7
[model]
id = "embedded:tiny"
[adapter]
r = 2
lora_alpha = 6
[data]
train = "train.jsonl"
validation = "validation.jsonl"
format = "completion"
max_length = 64
packing = false
[train]
steps = 4
micro_batch_size = 2
learning_rate = 5e-3
warmup_steps = 0
eval_every = 0
save_every = 0
[energy]
device = "raspberry-pi-5"
meter = "counted"
"#;

/// A folder of its own, gone with the test.
pub struct Lab(tempfile::TempDir);

impl Lab {
    pub fn new() -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        lab.records("train.jsonl", "recipes/quickstart/train.jsonl", 24);
        lab.records("validation.jsonl", "recipes/quickstart/validation.jsonl", 3);
        lab.write("recipe.toml", RECIPE);
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Changes the recipe's text.
    pub fn edit(&self, from: &str, to: &str) {
        let text = String::from_utf8(self.read("recipe.toml")).unwrap();
        assert!(text.contains(from), "{from}");
        self.write("recipe.toml", &text.replace(from, to));
    }

    /// The first `count` lines of a file of the checkout (or an absolute path).
    pub fn records(&self, name: &str, from: impl AsRef<Path>, count: usize) {
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(from)).unwrap();
        let lines: Vec<&str> = text.lines().take(count).collect();
        assert_eq!(lines.len(), count);
        self.write(name, &(lines.join("\n") + "\n"));
    }

    /// The program in this folder.
    pub fn wattune(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wattune"));
        command.args(arguments).current_dir(self.0.path()).env(
            "WATTUNE_CACHE",
            Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"),
        );
        command
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("RAYON_NUM_THREADS");
        command
    }

    /// Runs to the end, whatever the exit status.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.wattune(arguments).output().unwrap()
    }

    /// Runs a command that must succeed and print one JSON document and nothing else.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.output(&[arguments, &["--json"]].concat());
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{arguments:?} printed no single JSON document: {e}"))
    }

    /// Trains the recipe with these keys set; returns the report.
    pub fn train(&self, out: &str, set: &[String]) -> Value {
        self.json(
            &[
                &["train", "recipe.toml", "--out", out, "--quiet"],
                &flags(set)[..],
            ]
            .concat(),
        )
    }

    /// Plans the recipe with these keys set.
    pub fn plan(&self, set: &[String]) -> Value {
        self.json(&[&["plan", "recipe.toml"], &flags(set)[..]].concat())
    }

    /// Runs what must be refused with `status`; returns the message.
    pub fn refused(&self, status: i32, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?}: {message}"
        );
        message
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn adapter(&self, run: &str) -> Vec<u8> {
        self.read(&format!("{run}/adapter/adapter_model.safetensors"))
    }

    /// Every whole line of a `.jsonl` file of this folder; none where there is no file yet.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        whole
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// What each step of a run learned: everything in steps.jsonl but the clock and its meter.
    pub fn course(&self, run: &str) -> Vec<Value> {
        let mut steps = self.lines(&format!("{run}/steps.jsonl"));
        for step in &mut steps {
            let step = step.as_object_mut().unwrap();
            step.remove("wall_s");
            step["energy_j"].as_object_mut().unwrap().remove("timed");
        }
        steps
    }

    /// Counted microjoules of every entry in a run's ledger.
    pub fn ledger(&self, run: &str) -> u64 {
        let entries = self.lines(&format!("{run}/ledger.jsonl"));
        entries
            .iter()
            .filter_map(|line| line.pointer("/energy_j/counted"))
            .map(microjoules)
            .sum()
    }
}

/// `--set` for each.
pub fn flags(set: &[String]) -> Vec<&str> {
    set.iter()
        .flat_map(|pair| ["--set", pair.as_str()])
        .collect()
}

/// `["a=1"]` as `--set` takes it.
pub fn set(pairs: &[&str]) -> Vec<String> {
    pairs.iter().map(|pair| pair.to_string()).collect()
}

pub fn number(value: &Value, pointer: &str) -> f64 {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("no number at {pointer}"))
}

pub fn word<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no word at {pointer}"))
}

/// Joules as whole microjoules.
pub fn microjoules(value: &Value) -> u64 {
    (value.as_f64().unwrap() * 1e6).round() as u64
}

/// Asserts that every text is in `message`.
pub fn says(message: &str, texts: &[&str]) {
    for text in texts {
        assert!(message.contains(text), "`{text}` is missing in:\n{message}");
    }
}
