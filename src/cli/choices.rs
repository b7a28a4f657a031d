//! The what-if table of a plan, the recipe's row marked.

use crate::report::text::Table;
use crate::run::Choice;
use crate::units::significant;

/// Kinds with several rows, set apart by blank lines; other rows stand together.
const GROUPS: [&str; 4] = ["recipe", "rank", "targets", "device"];

/// The table of `choices`; empty where there are none.
pub(super) fn table(choices: &[Choice]) -> String {
    if choices.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        "",
        "choice",
        "per step",
        "same tokens",
        "times",
        "time, roofline",
        "peak memory",
    ])
    .right_from(2);
    let mut kind = "";
    for (index, choice) in choices.iter().enumerate() {
        let grouped = GROUPS.contains(&kind) || GROUPS.contains(&choice.kind);
        if index > 0 && choice.kind != kind && grouped {
            table.blank_line();
        }
        kind = choice.kind;
        table.row([
            if choice.own { ">" } else { "" }.to_string(),
            choice.choice.clone(),
            choice.step_j.to_string(),
            choice.same_tokens_j.to_string(),
            times(choice.ratio),
            choice.same_tokens_s.spoken(),
            choice.peak_bytes.to_string(),
        ]);
    }
    format!(
        "\nCost of training with one choice changed, for the same number of tokens\n\n{}",
        table.text(0)
    )
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
    use super::*;
    use crate::units::{Bytes, Joules, Seconds};

    #[test]
    fn columns_are_aligned_and_the_recipes_row_is_marked() {
        let choice = |kind, choice: &str, own, joules: f64| Choice {
            kind,
            choice: choice.to_string(),
            set: Vec::new(),
            own,
            trainable_parameters: 1,
            step_j: Joules(joules / 10.0),
            same_tokens_j: Joules(joules),
            same_tokens_flops: 1.0,
            same_tokens_s: Seconds(90.0),
            peak_bytes: Bytes(3 << 20),
            ratio: joules / 100.0,
        };
        let rows = [
            choice("recipe", "this recipe", true, 100.0),
            choice("rank", "rank 4", false, 95.0),
            choice("device", "device somewhere-else", false, 0.1),
        ];
        let expected = "
Cost of training with one choice changed, for the same number of tokens

   choice                 per step  same tokens  times  time, roofline  peak memory
   ---------------------  --------  -----------  -----  --------------  -----------
>  this recipe                10 J        100 J   1.00      1 min 30 s        3 MiB

   rank 4                    9.5 J         95 J   0.95      1 min 30 s        3 MiB

   device somewhere-else     10 mJ       100 mJ  0.001      1 min 30 s        3 MiB
";
        assert_eq!(table(&rows), expected);
        assert_eq!(table(&[]), "");
    }
}
