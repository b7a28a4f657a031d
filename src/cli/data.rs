//! `wattune data`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::screen::Terminal;
use super::{Common, has_colour, out_json, write_styled};
use crate::error::Result;
use crate::files::write_atomic;
use crate::recipe;
use crate::report::text::{Table, paragraph};
use crate::report::{data_page, format};
use crate::run::{self, Preview, RowsPreview, Screen as _, SetPreview, ShownExample};
use crate::text::printable;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Recipe file
    recipe: PathBuf,
    /// Override a recipe key
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Examples shown of each set, spread over it
    #[arg(long, value_name = "N", default_value_t = 3)]
    show: usize,
    /// Also write a page of the same
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Cells of the longest bar.
const BAR: u64 = 40;
/// SGR: green, and back.
const GREEN: &str = "\u{1b}[32m";
const PLAIN: &str = "\u{1b}[0m";

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let path = &arguments.recipe;
    let recipe = recipe::load(path, &arguments.overrides)?;
    let name = recipe.name.clone();
    let mut screen = Terminal::new(common.quiet);
    let found = run::preview(recipe, arguments.show, screen.downloads());
    screen.clear();
    let found = found.map_err(|e| recipe::locate(e, path, &arguments.overrides))?;
    if let Some(file) = &arguments.html {
        write_atomic(file, data_page(&name, &found)?)?;
        screen.note(&format!("Wrote {}", file.display()));
    }
    if common.json {
        return out_json(&found);
    }
    let next = format!("\nNext: `wattune train {}`\n", path.display());
    write_styled(&(page(&name, &found, has_colour()) + &next))
}

fn page(name: &str, found: &Preview, colour: bool) -> String {
    let mut rows = set_rows("train", &found.train);
    rows.extend(
        found
            .validation
            .iter()
            .flat_map(|set| set_rows("validation", set)),
    );
    rows.push(("rows", packing(&found.rows, found.train.counts.examples)));
    let duplicates = &found.duplicates;
    rows.push((
        "duplicates",
        format!(
            "{} training examples repeat an earlier one",
            format::count(duplicates.in_train)
        ),
    ));
    if found.validation.is_some() {
        let leaked = format::count(duplicates.validation_in_train);
        rows.push((
            "",
            format!("{leaked} validation examples are training examples too"),
        ));
    }
    let mut text = format!(
        "Data of {}\n\n{}",
        printable(name),
        Table::pairs(["", ""], rows).text(2)
    );
    text += &format!(
        "\nLengths of the training examples, in tokens\n\n{}",
        histogram(&found.train)
    );
    for warning in &found.warnings {
        text += &format!(
            "\n{}",
            paragraph(&printable(&format!("warning: {warning}")), 2)
        );
    }
    let sets = [
        ("Training", Some(&found.train)),
        ("Validation", found.validation.as_ref()),
    ];
    for (name, set) in sets {
        for example in set.iter().flat_map(|set| &set.shown) {
            text += &shown(name, example, colour);
        }
    }
    text
}

fn set_rows(name: &'static str, set: &SetPreview) -> Vec<(&'static str, String)> {
    let counts = &set.counts;
    let loss = 100.0 * counts.loss_tokens as f64 / counts.tokens.max(1) as f64;
    let sizes = format!(
        "{} records, {} examples, {} tokens, {loss:.0} % with a loss",
        format::count(counts.records),
        format::count(counts.examples),
        format::count(counts.tokens),
    );
    let ends = if set.eos_trained {
        "the end is learned"
    } else {
        "the end is not learned"
    };
    let rest = format!(
        "median {}, longest {} tokens; {} cut, {} dropped, {} skipped; {ends}",
        set.median,
        set.longest,
        format::count(counts.truncated),
        format::count(counts.dropped),
        format::count(counts.skipped)
    );
    vec![(name, sizes), ("", rest)]
}

fn packing(rows: &RowsPreview, examples: u64) -> String {
    let count = format::count(rows.rows);
    let steps = format::count(rows.steps_per_epoch);
    if !rows.packing {
        return format!("{count}, one example each; {steps} steps in an epoch");
    }
    format!(
        "{count} of at most {} tokens, {:.0} % filled, {:.1} examples each; {steps} steps in an epoch",
        rows.max_length,
        100.0 * rows.filled,
        examples as f64 / rows.rows as f64
    )
}

fn histogram(set: &SetPreview) -> String {
    let most = set
        .lengths
        .iter()
        .map(|bar| bar.examples)
        .max()
        .unwrap_or(1);
    let mut table = Table::new(&["", "", ""]);
    for bar in &set.lengths {
        // A bar that is not empty is seen.
        let cells = (bar.examples * BAR).div_ceil(most.max(1)) as usize;
        table.row([
            format!("{:>5} to {:<5}", bar.from, bar.to),
            "█".repeat(cells),
            format::count(bar.examples),
        ]);
    }
    table.text(0)
}

/// The text of an example; what has a loss is green, or stands between »«.
fn shown(set: &str, example: &ShownExample, colour: bool) -> String {
    let (before, after) = if colour { (GREEN, PLAIN) } else { ("»", "«") };
    let full = if example.at_max_length {
        ", all that max_length holds"
    } else {
        ""
    };
    let class = match example.labels.as_slice() {
        [] => String::new(),
        labels => format!("; class {}", printable(&labels.join(", "))),
    };
    let mut text = format!(
        "\n{set} example {}: {} tokens{full}, {} with a loss ({before}so{after}){class}\n\n",
        example.number, example.tokens, example.loss_tokens
    );
    for piece in &example.pieces {
        let words = printable(&piece.text);
        if piece.loss {
            text += &format!("{before}{words}{after}");
        } else {
            text += &words;
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_loss_is_marked_and_cannot_send_escapes() {
        let piece = |text: &str, loss| {
            serde_json::from_value(serde_json::json!({ "text": text, "loss": loss }))
        };
        let example = ShownExample {
            number: 2,
            tokens: 5,
            loss_tokens: 3,
            at_max_length: false,
            labels: Vec::new(),
            pieces: vec![
                piece("Q\u{1b}[31m", false).unwrap(),
                piece(" A", true).unwrap(),
            ],
        };
        let plain = shown("Training", &example, false);
        assert!(plain.ends_with("\n\nQ\\u{1b}[31m» A«\n"), "{plain:?}");
        let coloured = shown("Training", &example, true);
        assert!(
            coloured.ends_with("\u{1b}[32m A\u{1b}[0m\n"),
            "{coloured:?}"
        );
        assert!(!coloured.contains("\u{1b}[31m"), "{coloured:?}");
    }
}
