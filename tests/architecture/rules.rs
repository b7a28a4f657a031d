//! The rules themselves, each a function from a piece of text to findings.
//!
//! Owns the tables and the limits. Takes a path from the root of the checkout, and code as `source` leaves it; returns what breaks
//! a rule, by line. Knows no file system. Each rule is shown at the bottom to find what it is for.

use crate::source::{code, functions, words};

/// What every room may import.
const COMMON: &[&str] = &["units", "error", "work", "random", "files", "text"];

/// The import table: each room of `src/` and which rooms it may import besides itself and `COMMON`.
const ROOMS: &[(&str, &[&str])] = &[
    ("recipe", &["data", "adapter", "train", "energy"]),
    ("hub", &[]),
    ("data", &["hub"]),
    ("ops", &[]),
    ("adapter", &["ops"]),
    ("model", &["ops", "adapter"]),
    ("train", &["model", "adapter", "data", "ops", "energy"]),
    ("energy", &[]),
    ("gguf", &["model", "ops"]),
    (
        "forecast",
        &[
            "recipe", "data", "ops", "adapter", "model", "train", "energy",
        ],
    ),
    (
        "measure",
        &[
            "recipe", "data", "ops", "adapter", "model", "train", "energy", "forecast", "report",
        ],
    ),
    ("report", &["energy", "train", "recipe", "forecast"]),
    (
        "run",
        &[
            "recipe", "hub", "data", "ops", "adapter", "model", "train", "energy", "gguf",
            "forecast", "measure", "report",
        ],
    ),
    ("cli", &["run", "recipe", "report"]),
    ("main", &["cli"]),
];

/// The modules of plain option types that `recipe` may import from the rooms of its row, and no others of those rooms.
const OPTION_TYPES: &[&str] = &[
    "adapter::options",
    "data::options",
    "energy::options",
    "train::schedule",
];

/// The ground that every room stands on, and what each of its files may import: no `COMMON` here.
const GROUND: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("error", &[]),
    ("work", &["units", "error"]),
    ("random", &[]),
    ("files", &["error", "text", "units"]),
    ("text", &[]),
];

/// Crates that some rooms do not name: (crate, rooms, why).
const FOREIGN: &[(&str, &[&str], &str)] = &[
    (
        "candle_core",
        &[
            "energy", "forecast", "data", "recipe", "hub", "report", "cli",
        ],
        "knows nothing of tensors",
    ),
    (
        "candle_nn",
        &[
            "energy", "forecast", "data", "recipe", "hub", "report", "cli",
        ],
        "knows nothing of tensors",
    ),
    (
        "hf_hub",
        &[
            "recipe", "data", "ops", "adapter", "model", "train", "energy", "forecast", "measure",
            "report", "cli",
        ],
        "never touches the network",
    ),
    (
        "reqwest",
        &[
            "recipe", "data", "ops", "adapter", "model", "train", "energy", "forecast", "measure",
            "report", "cli",
        ],
        "never touches the network",
    ),
];

/// Hard limit of a source file, in lines; `NOTED` is what a file should aim at.
const FILE_LINES: usize = 700;
pub const NOTED: usize = 400;
const MAIN_LINES: usize = 59;
/// Hard limit of a function, in lines; tables and matches that are longer stand in `LONG`, as (file, function).
const FUNCTION_LINES: usize = 80;
const LONG: &[(&str, &str)] = &[];

/// Words that code outside tests does not hold, and why. `.backward()` without arguments is candle's; ours take some.
const NEVER: &[(&str, &str)] = &[
    (
        ".unwrap()",
        "return an error, or say the invariant with `expect(\"...\")`",
    ),
    (
        "panic!",
        "return an error, or say the invariant with `unreachable!(\"...\")`",
    ),
    ("todo!", "write it"),
    ("unimplemented!", "write it"),
    ("dbg!", "take it out"),
    (
        "println!",
        "it panics when the reader has gone: write with `writeln!` and ignore or return the error",
    ),
    (
        "eprintln!",
        "it panics when standard error is closed: use `cli::note`",
    ),
    ("Var", "gradients are written, not recorded"),
    ("VarMap", "gradients are written, not recorded"),
    ("GradStore", "gradients are written, not recorded"),
    (".backward()", "gradients are written, not recorded"),
];

/// Where a path of one machine begins.
const MACHINE_PATHS: &[&str] = &[
    "/root/",
    "/home/",
    "/Users/",
    "/work/",
    "/workspace/",
    "/tmp/",
    "/mnt/",
    "C:\\",
];
/// What names another registry than the public one, or an address inside somebody's network.
const REGISTRIES: &[&str] = &[
    "index-url",
    "index_url",
    "replace-with",
    "[registries",
    "registry-index",
    "//10.",
    "//172.",
    "//192.168.",
    ".internal/",
    ".lan/",
];
/// Words about how the project is made, which say nothing of the project.
const WORKPLACE: &[&str] = &[
    "worktree",
    "previous session",
    "last session",
    "next session",
    "sub-agent",
    "subagent",
    "language model wrote",
    "fixme",
    "xxx:",
];

/// One broken rule.
#[derive(Debug, PartialEq)]
pub struct Finding {
    pub line: usize,
    pub rule: String,
}

fn finding(line: usize, rule: impl Into<String>) -> Finding {
    Finding {
        line,
        rule: rule.into(),
    }
}

/// The room of a file of `src/`: its folder, or its own name; `None` for `lib.rs`, which holds them all.
fn room(path: &str) -> Option<&str> {
    let first = path.strip_prefix("src/")?.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first)).filter(|&room| room != "lib")
}

/// The rooms that `room` may import; `None` where no row names it.
fn allowed(room: &str) -> Option<Vec<&'static str>> {
    let row = |table: &'static [(&str, &'static [&'static str])]| {
        table
            .iter()
            .find(|(name, _)| *name == room)
            .map(|(_, row)| *row)
    };
    row(ROOMS)
        .map(|row| [row, COMMON].concat())
        .or_else(|| row(GROUND).map(<[_]>::to_vec))
}

/// The first names behind `crate::` or `wattune::`, as (line, name).
fn imports(code: &str) -> Vec<(usize, String)> {
    [names_after(code, "crate::"), names_after(code, "wattune::")].concat()
}

/// The first names behind `prefix`, lists in braces opened, as (line, name).
fn names_after(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let names = |after: &str| {
        after
            .strip_prefix('{')
            .map_or_else(|| vec![first_word(after)], heads)
    };
    words(code, prefix)
        .flat_map(|(line, after)| names(after).into_iter().map(move |name| (line, name)))
        .collect()
}

/// The first name of each part of a list whose opening brace is already read.
fn heads(list: &str) -> Vec<String> {
    let (mut heads, mut depth) = (Vec::new(), 1);
    for part in list.split_inclusive(['{', '}', ',']) {
        let head = first_word(part);
        if depth == 1 && !head.is_empty() {
            heads.push(head);
        }
        match part.chars().next_back() {
            Some('{') => depth += 1,
            Some('}') if depth == 1 => break,
            Some('}') => depth -= 1,
            _ => {}
        }
    }
    heads
}

fn first_word(text: &str) -> String {
    text.trim_start()
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// Imports that cross the table. A `super` that climbs out of the room would hide one and is refused too.
pub fn crossing_imports(path: &str, code: &str) -> Vec<Finding> {
    let Some(room) = room(path) else {
        return Vec::new();
    };
    let Some(allowed) = allowed(room) else {
        return vec![finding(
            1,
            format!("the room `{room}` has no row in the import table of tests/architecture.rs"),
        )];
    };
    let crossing = imports(code)
        .into_iter()
        .filter(|(_, name)| name != room && !allowed.contains(&name.as_str()));
    let mut found: Vec<_> = crossing
        .map(|(line, name)| finding(line, format!("`{room}` may not import `{name}`")))
        .collect();
    let folders = path.matches('/').count() - 1;
    let climb = "super::".repeat(if path.ends_with("/mod.rs") {
        folders
    } else {
        folders + 1
    });
    found.extend(
        words(code, &climb)
            .map(|(line, _)| finding(line, "`super` leaves the room: write `crate::`")),
    );
    found
}

/// Imports of `recipe` from an allowed room that are not its option types.
pub fn option_types_only(path: &str, code: &str) -> Vec<Finding> {
    if room(path) != Some("recipe") {
        return Vec::new();
    }
    let rooms = allowed("recipe").unwrap_or_default();
    let crosses = |after: &str| {
        let name = first_word(after);
        rooms.contains(&name.as_str())
            && !COMMON.contains(&name.as_str())
            && !OPTION_TYPES.iter().any(|module| after.starts_with(module))
    };
    words(code, "crate::")
        .filter(|(_, after)| crosses(after))
        .map(|(line, _)| {
            finding(
                line,
                format!("`recipe` imports {}", OPTION_TYPES.join(", ")),
            )
        })
        .collect()
}

/// The files that are on a cycle of `super::` imports among siblings, or import one that is. Takes (module, code).
pub fn import_cycle<'a>(files: &[(&'a str, &str)]) -> Vec<&'a str> {
    let mut open: Vec<(&str, Vec<String>)> = files
        .iter()
        .map(|(module, code)| (*module, names_after(code, "super::")))
        .map(|(module, imports)| (module, imports.into_iter().map(|(_, name)| name).collect()))
        .collect();
    loop {
        let modules: Vec<&str> = open.iter().map(|(module, _)| *module).collect();
        open.retain(|(_, imports)| imports.iter().any(|name| modules.contains(&name.as_str())));
        if open.len() == modules.len() {
            return modules;
        }
    }
}

/// Crates that a room does not name.
pub fn foreign_crates(path: &str, code: &str) -> Vec<Finding> {
    let of_room = FOREIGN
        .iter()
        .filter(|(_, rooms, _)| room(path).is_some_and(|room| rooms.contains(&room)));
    of_room
        .flat_map(|(name, _, why)| {
            words(code, name)
                .map(move |(line, _)| finding(line, format!("`{name}`: this room {why}")))
        })
        .collect()
}

/// Printing anywhere but in `cli` and `main`.
pub fn printing(path: &str, code: &str) -> Vec<Finding> {
    if matches!(room(path), Some("cli" | "main")) {
        return Vec::new();
    }
    let macros = [
        "println!",
        "eprintln!",
        "print!",
        "eprint!",
        "stdout()",
        "stderr()",
    ];
    macros
        .iter()
        .flat_map(|name| {
            words(code, name)
                .map(move |(line, _)| finding(line, format!("`{name}`: only `cli` prints")))
        })
        .collect()
}

/// What code outside tests does not hold: unwraps, panics, recorded gradients, an `expect` that states nothing.
pub fn never(code: &str) -> Vec<Finding> {
    let mut found: Vec<_> = NEVER
        .iter()
        .flat_map(|(name, why)| {
            words(code, name).map(move |(line, _)| finding(line, format!("`{name}`: {why}")))
        })
        .collect();
    let silent = words(code, ".expect(").filter(|(_, after)| {
        let argument = after.trim_start();
        !argument.starts_with('"') || argument.starts_with("\"\"")
    });
    found.extend(
        silent
            .map(|(line, _)| finding(line, "`expect` takes a sentence that states the invariant")),
    );
    found
}

/// A file that is too long, or a module without its first lines.
pub fn file_shape(path: &str, text: &str) -> Vec<Finding> {
    let lines = text.lines().count();
    let limit = if path == "src/main.rs" {
        MAIN_LINES
    } else {
        FILE_LINES
    };
    let mut found = Vec::new();
    if lines > limit {
        found.push(finding(
            lines,
            format!("{lines} lines; a file ends by line {limit}"),
        ));
    }
    // A declaration alone needs no words.
    if lines > 3 && !text.starts_with("//! ") {
        found.push(finding(
            1,
            "a module begins with `//!`: what it owns, takes, returns and refuses to know",
        ));
    }
    found
}

/// Functions over the limit that are not named in `LONG`.
pub fn long_functions(path: &str, code: &str) -> Vec<Finding> {
    let long = functions(code)
        .into_iter()
        .filter(|(name, _, lines)| *lines > FUNCTION_LINES && !LONG.contains(&(path, name)));
    long.map(|(name, first, lines)| {
        finding(
            first,
            format!("`{name}` has {lines} lines; a function ends by {FUNCTION_LINES}"),
        )
    })
    .collect()
}

/// Paths of one machine, registries other than the public one, words about the making of the project.
pub fn not_of_the_project(text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line)) {
        if let Some(path) = MACHINE_PATHS.iter().find(|path| begins_a_path(line, path)) {
            found.push(finding(number, format!("`{path}`: a path of one machine")));
        }
        if let Some(name) = REGISTRIES.iter().find(|name| line.contains(**name)) {
            found.push(finding(
                number,
                format!("`{name}`: no registry but the public one, no private address"),
            ));
        }
        let lower = line.to_lowercase();
        if let Some(word) = WORKPLACE.iter().find(|word| lower.contains(**word)) {
            found.push(finding(
                number,
                format!("`{word}`: the project speaks of the project alone"),
            ));
        }
    }
    found
}

/// Whether `path` stands in `line` as the beginning of a path, not inside a longer one or an address.
fn begins_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "/.~_-}".contains(c)))
}

/// Locked packages that do not come from crates.io.
pub fn foreign_packages(lock: &str) -> Vec<Finding> {
    let crates_io = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";
    let sources = lock
        .lines()
        .enumerate()
        .filter(|(_, line)| line.starts_with("source = ") && *line != crates_io);
    sources
        .map(|(i, line)| finding(i + 1, format!("{line}: not from crates.io")))
        .collect()
}

/// Each rule finds what it is for, and passes what it is not for.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{has_word, line, without_tests};

    const CLEAN: [usize; 0] = [];

    fn lines(found: Vec<Finding>) -> Vec<usize> {
        found.into_iter().map(|f| f.line).collect()
    }

    #[test]
    fn imports_are_held_to_the_table() {
        let check = |path, text| lines(crossing_imports(path, &without_tests(&code(text))));
        assert_eq!(
            check(
                "src/data/load.rs",
                "use crate::hub::Hub;\nuse crate::units::Bytes;\nuse crate::data::Row;"
            ),
            CLEAN
        );
        assert_eq!(check("src/data/load.rs", "\nuse crate::model::Batch;"), [2]);
        assert_eq!(
            check("src/data/load.rs", "fn f() -> crate::train::Step {}"),
            [1]
        );
        assert_eq!(
            check(
                "src/ops/linear.rs",
                "use crate::{error::{Result, model}, work::Work};"
            ),
            CLEAN
        );
        assert_eq!(
            check(
                "src/ops/linear.rs",
                "use crate::{error::{Error, Result}, model::Batch};"
            ),
            [1]
        );
        assert_eq!(
            check("src/cli/train.rs", "use crate::run;\nuse crate::train;"),
            [2]
        );
        assert_eq!(
            check(
                "src/main.rs",
                "use wattune::cli;\nfn main() { wattune::ops::x() }"
            ),
            [2]
        );
        assert_eq!(check("src/units.rs", "use crate::error::Error;"), [1]);
        assert_eq!(check("src/cellar/mod.rs", ""), [1], "a room without a row");
        assert_eq!(
            check(
                "src/data/load.rs",
                "// crate::model\nconst S: &str = \"crate::model\";"
            ),
            CLEAN
        );
        assert_eq!(
            check(
                "src/data/load.rs",
                "#[cfg(test)]\nmod tests {\n use crate::model;\n}\nuse crate::train;"
            ),
            [5]
        );
    }

    #[test]
    fn a_recipe_imports_option_types_alone() {
        let code =
            "use crate::data::options::Format;\nuse crate::data::load;\nuse crate::units::Joules;";
        assert_eq!(lines(option_types_only("src/recipe/mod.rs", code)), [2]);
        assert_eq!(lines(option_types_only("src/run/mod.rs", code)), CLEAN);
    }

    #[test]
    fn a_super_that_leaves_the_room_is_found() {
        let check = |path, text| lines(crossing_imports(path, text));
        assert_eq!(
            check("src/data/mod.rs", "use self::a;\nuse super::model;"),
            [2]
        );
        assert_eq!(
            check(
                "src/data/load.rs",
                "use super::a;\nuse super::super::model;"
            ),
            [2]
        );
        assert_eq!(
            check("src/energy/sensor/rapl.rs", "use super::super::meter;"),
            CLEAN
        );
    }

    #[test]
    fn a_cycle_of_imports_is_found() {
        let chain = [
            ("a", "use super::b;"),
            ("b", "use super::c::X;"),
            ("c", "use crate::a;"),
        ];
        assert!(import_cycle(&chain).is_empty());
        let cycle = [
            chain[0],
            chain[1],
            ("c", "use super::{d, a::{Y, Z}};"),
            ("d", ""),
        ];
        assert_eq!(import_cycle(&cycle), ["a", "b", "c"]);
    }

    #[test]
    fn foreign_crates_and_printing_are_found_where_they_do_not_belong() {
        assert_eq!(
            lines(foreign_crates(
                "src/energy/meter.rs",
                "\nuse candle_core::Tensor;"
            )),
            [2]
        );
        assert_eq!(
            lines(foreign_crates(
                "src/train/mod.rs",
                "use candle_core::Tensor;"
            )),
            CLEAN
        );
        assert_eq!(
            lines(foreign_crates("src/recipe/open.rs", "reqwest::get(x)")),
            [1]
        );
        assert_eq!(
            lines(printing(
                "src/train/mod.rs",
                "a;\nprintln!(x);\neprintln!(x)"
            )),
            [2, 3]
        );
        assert_eq!(lines(printing("src/cli/mod.rs", "println!(x)")), CLEAN);
    }

    #[test]
    fn what_is_never_written_is_found() {
        assert_eq!(lines(never("x.unwrap();")), [1]);
        assert_eq!(lines(never("let v: Var = w;\nloss.backward()?;")), [1, 2]);
        assert_eq!(lines(never("x.expect(&why);\ny.expect(\"\");")), [1, 2]);
        assert_eq!(
            lines(never(
                "x.expect(\"a sum is finite\"); y.unwrap_or(0); VarBuilder; layer.backward(dy)"
            )),
            CLEAN
        );
        assert_eq!(
            lines(never(&code(
                "/// x.unwrap()\nconst S: &str = \"panic!\"; // todo!"
            ))),
            CLEAN
        );
    }

    #[test]
    fn sizes_and_first_lines_are_held() {
        let long = format!("//! A file.\n{}", "\n".repeat(FILE_LINES));
        assert_eq!(
            file_shape("src/a.rs", &long),
            [finding(701, "701 lines; a file ends by line 700")]
        );
        assert_eq!(
            lines(file_shape("src/main.rs", &long[..MAIN_LINES + 12])),
            [60]
        );
        assert_eq!(lines(file_shape("src/a.rs", "use a;\n\n\n\n")), [1]);
        let function = |lines: usize| format!("\nfn f() {{\n{}}}\n", "x;\n".repeat(lines - 2));
        assert_eq!(lines(long_functions("src/a.rs", &function(80))), CLEAN);
        assert_eq!(lines(long_functions("src/a.rs", &function(81))), [2]);
    }

    #[test]
    fn what_is_not_of_the_project_is_found() {
        let found = |text| lines(not_of_the_project(text));
        assert_eq!(found("fine\nsee /home/ann/x\nat `/tmp/x`"), [2, 3]);
        assert_eq!(
            found("https://host/home/x, ~/work/x, target/tmp/report, {HOME}/work/"),
            CLEAN
        );
        assert_eq!(found("pip --index-url x\nhttp://192.168.1.4/"), [1, 2]);
        assert_eq!(found("as the Worktree of the last sessions"), [1]);
        let lock = "source = \"registry+https://github.com/rust-lang/crates.io-index\"\nsource = \"git+https://github.com/a/b\"";
        assert_eq!(lines(foreign_packages(lock)), [2]);
    }

    #[test]
    fn source_is_read_as_rust_reads_it() {
        assert_eq!(
            code("a // b\nc /* d /* e */ f */ g"),
            format!("a     \nc{:19}g", "")
        );
        assert_eq!(
            code(r##"f("a\"{", '{', 'a, b'\'', for"r")"##),
            r##"f("    ", ' ', 'a, b'  ', for" ")"##
        );
        assert_eq!(
            code("r#\"}\"{\"# r\"{\"x r#type"),
            format!("{:12}\"x r#type", "")
        );
        assert_eq!(
            without_tests("#[cfg(test)]\nuse a;\n#[cfg(unix)]\nb"),
            "            \n      \n#[cfg(unix)]\nb"
        );
        assert_eq!(
            without_tests("#[cfg(all(test, unix))] #[x] mod t { {} } a").trim(),
            "a"
        );
        let text = "fn a();\nfn b<F: Fn(u8)>(f: fn(u8), x: [u8; 2]) -> u8 {\n  { 1 }\n}\nimpl X { fn c() {} }";
        assert_eq!(functions(text), [("b".into(), 2, 3), ("c".into(), 5, 1)]);
        assert_eq!(line("a\nb", 2), 2);
        assert!(has_word("a.unwrap()", ".unwrap()") && !has_word("Variable", "Var"));
    }
}
