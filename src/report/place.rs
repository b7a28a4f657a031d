//! The pages of a placement: the terminal's, Markdown and HTML, from the same tables.

use crate::forecast::place::{Cheapest, PlacedRow, Placement};

use super::format;
use super::text::{Table, bullet, paragraph};
use crate::units::Seconds;

/// Most rows of the terminal's table; a longer one holds the Pareto set alone.
const MOST_ROWS: usize = 24;

/// "Placement of MODEL", the cheapest rows, the Pareto set or all rows, and what holds for them.
pub fn screen_page(placement: &Placement) -> String {
    let mut text = format!(
        "Placement of {} ({} parameters): {} prompt and {} generated tokens a request\n\nCheapest\n{}",
        placement.model,
        format::count(placement.parameters),
        format::count(placement.prompt_tokens as u64),
        format::count(placement.generated_tokens as u64),
        cheapest_table(placement).text(2)
    );
    let all: Vec<&PlacedRow> = placement.rows.iter().collect();
    let best: Vec<&PlacedRow> = (placement.pareto.iter())
        .map(|index| &placement.rows[*index])
        .collect();
    let (heading, rows) = if all.len() <= MOST_ROWS {
        (format!("All {} combinations", all.len()), all)
    } else {
        (
            format!(
                "The {} of {} combinations that none beats in both energy and latency (`--json` and `--out` hold all)",
                best.len(),
                all.len()
            ),
            best,
        )
    };
    text += &format!("\n{heading}\n{}", rows_table(&rows).text(2));
    if let Some(row) = placement.cheapest.iter().find_map(|cheapest| cheapest.row) {
        let command = placement.rows[row].command.as_deref();
        let command = command.unwrap_or("no program here runs a model that is cut in two");
        text += &format!("\nTo run the cheapest:\n  {command}\n");
    }
    for statement in &placement.splits {
        text += &format!("\n{}", paragraph(statement, 2));
    }
    text += "\nAssumptions:\n";
    text += &(placement.assumptions.iter().map(|text| bullet(text))).collect::<String>();
    text
}

/// The cheapest feasible row by deadline and load.
pub(super) fn cheapest_table(placement: &Placement) -> Table {
    let mut table = Table::new(&[
        "deadline",
        "at once",
        "device",
        "point",
        "format",
        "split",
        "J/request",
        "latency",
    ]);
    for Cheapest {
        deadline_s,
        batch,
        row,
    } in &placement.cheapest
    {
        let deadline = deadline_s.map_or("none".to_string(), Seconds::spoken);
        let start = [deadline, batch.to_string()];
        match row.map(|row| &placement.rows[row]) {
            Some(row) => table.row(start.into_iter().chain([
                row.device.clone(),
                row.operating_point.to_string(),
                row.format.clone(),
                split(row),
                joules(row),
                latency(row),
            ])),
            None => table.row(start.into_iter().chain(["nothing is feasible".to_string()])),
        }
    }
    table
}

/// These rows with every figure.
pub(super) fn rows_table(rows: &[&PlacedRow]) -> Table {
    let mut table = Table::new(&[
        "device",
        "point",
        "format",
        "at once",
        "split",
        "J/request",
        "J/token",
        "latency",
        "memory",
        "note",
    ]);
    for row in rows {
        table.row([
            row.device.clone(),
            row.operating_point.to_string(),
            row.format.clone(),
            row.batch.to_string(),
            split(row),
            joules(row),
            row.j_per_token
                .map_or("-".to_string(), |token| token.central.to_string()),
            latency(row),
            row.memory_bytes.to_string(),
            note(row),
        ]);
    }
    table
}

fn note(row: &PlacedRow) -> String {
    let reason = row.reason.clone().unwrap_or_default();
    if row.feasible {
        reason
    } else {
        format!("not feasible: {reason}")
    }
}

fn split(row: &PlacedRow) -> String {
    match &row.split {
        None => "none".to_string(),
        Some(split) if split.first_server_block == 0 => {
            format!("all on {} by {}", split.server, split.link)
        }
        Some(split) => format!(
            "from block {} on {} by {}",
            split.first_server_block, split.server, split.link
        ),
    }
}

fn joules(row: &PlacedRow) -> String {
    row.j_per_request
        .map_or("-".to_string(), |joules| joules.to_string())
}

fn latency(row: &PlacedRow) -> String {
    row.latency_s.map_or("-".to_string(), Seconds::spoken)
}
