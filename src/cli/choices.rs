//! The table of choices under a plan: aligned columns, the recipe's own row marked.

use serde_json::Value;

use crate::units::{Bytes, Joules, Seconds, significant};

/// Columns between two cells.
const GAP: usize = 3;

/// The table of the plan's `choices`; nothing where there are none.
pub(super) fn table(choices: &[Value]) -> String {
    if choices.is_empty() {
        return String::new();
    }
    let head = [
        "choice",
        "a step",
        "same tokens",
        "times",
        "time, at least",
        "peak memory",
    ]
    .map(String::from);
    let rows: Vec<[String; 6]> = std::iter::once(head)
        .chain(choices.iter().map(cells))
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text =
        "\nWhat each choice would cost, all else as in the recipe (training alone; the same tokens as planned)\n\n".to_string();
    let mut kind = "";
    for (index, row) in rows.iter().enumerate() {
        let choice = index.checked_sub(1).map(|index| &choices[index]);
        let own = choice.is_some_and(|choice| choice["own"] == true);
        let next = choice
            .and_then(|choice| choice["kind"].as_str())
            .unwrap_or_default();
        // A line apart between ranks, targets and devices; single rows stand together.
        if [kind, next]
            .iter()
            .any(|kind| ["recipe", "rank", "targets", "device"].contains(kind))
            && next != kind
            && index > 1
        {
            text.push('\n');
        }
        kind = next;
        text += &line(if own { ">" } else { " " }, row, &widths);
    }
    text
}

/// The first cell to the left, figures to the right.
fn line(mark: &str, row: &[String; 6], widths: &[usize; 6]) -> String {
    let mut line = format!("{mark} {:<width$}", row[0], width = widths[0]);
    for (cell, width) in row.iter().zip(widths).skip(1) {
        line += &format!("{cell:>width$}", width = width + GAP);
    }
    line.trim_end().to_string() + "\n"
}

fn cells(choice: &Value) -> [String; 6] {
    let number = |key: &str| choice[key].as_f64().unwrap_or_default();
    [
        choice["choice"].as_str().unwrap_or_default().to_string(),
        Joules(number("step_j")).to_string(),
        Joules(number("same_tokens_j")).to_string(),
        times(number("ratio")),
        Seconds(number("same_tokens_s")).spoken(),
        Bytes(choice["peak_bytes"].as_u64().unwrap_or_default()).to_string(),
    ]
}

fn times(ratio: f64) -> String {
    if ratio >= 0.01 {
        format!("{ratio:.2}")
    } else {
        significant(ratio)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_aligned_and_the_recipes_own_row_is_marked() {
        let choice = |kind: &str, choice: &str, own: bool, joules: f64| {
            json!({ "kind": kind, "choice": choice, "own": own, "step_j": joules / 10.0, "same_tokens_j": joules,
                "same_tokens_s": 90.0, "ratio": joules / 100.0, "peak_bytes": 3 << 20 })
        };
        let rows = [
            choice("recipe", "this recipe", true, 100.0),
            choice("rank", "rank 4", false, 95.0),
            choice("device", "device somewhere-else", false, 0.1),
        ];
        let expected = "
What each choice would cost, all else as in the recipe (training alone; the same tokens as planned)

  choice                  a step   same tokens   times   time, at least   peak memory
> this recipe               10 J         100 J    1.00       1 min 30 s         3 MiB

  rank 4                   9.5 J          95 J    0.95       1 min 30 s         3 MiB

  device somewhere-else    10 mJ        100 mJ   0.001       1 min 30 s         3 MiB
";
        assert_eq!(table(&rows), expected);
        assert_eq!(table(&[]), "");
    }
}
