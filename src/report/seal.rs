//! Every figure finite or absent: what a report passes before it becomes a page or a file.
//!
//! Owns `Report::sealed`. Takes a report as the run filled it, returns one in which an optional figure that is not finite is
//! absent and named in a warning. Refuses a total that is not finite. Knows nothing of what the figures mean.

use super::types::Report;
use crate::error::{Error, Kind, Result};
use crate::units::Bytes;

impl Report {
    /// The same report with every figure finite or absent: an optional figure that is not finite becomes `None`, and a warning
    /// names it.
    ///
    /// # Errors
    /// [`Kind::Run`] where a figure that a report cannot do without is not finite.
    pub fn sealed(self) -> Result<Self> {
        let lost = not_finite(&self)?;
        if lost.is_empty() {
            return Ok(self);
        }
        // JSON writes what is not finite as null, which an optional field reads as absent and any other refuses.
        let mut sealed: Self = serde_json::to_value(&self)
            .and_then(serde_json::from_value)
            .map_err(|_| {
                Error::new(
                    Kind::Run,
                    "the report holds a figure that is not a finite number",
                )
                .at(lost.join(", "))
                .rule("an energy, a carbon figure and a ratio must be finite")
                .hint("check the device profile and the grid's intensity with `wattune devices`")
            })?;
        sealed.warnings.extend(
            lost.iter()
                .map(|path| format!("{path} was not a finite number and is left out")),
        );
        Ok(sealed)
    }
}

/// Paths of the floats that JSON cannot write. TOML can say `nan`, so its tree still shows them; its integers end at 2^63, so
/// the two counts that may pass that stand aside.
fn not_finite(report: &Report) -> Result<Vec<String>> {
    fn walk(value: &toml::Value, path: &str, found: &mut Vec<String>) {
        let under = |name: &str| {
            if path.is_empty() {
                name.to_string()
            } else {
                format!("{path}.{name}")
            }
        };
        match value {
            toml::Value::Float(number) if !number.is_finite() => found.push(path.to_string()),
            toml::Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(index, item)| walk(item, &under(&index.to_string()), found));
            }
            toml::Value::Table(table) => table
                .iter()
                .for_each(|(key, item)| walk(item, &under(key), found)),
            _ => {}
        }
    }
    let mut figures = report.clone();
    (figures.energy.flops, figures.energy.bytes) = (0, Bytes(0));
    figures.energy.bytes_by_level.clear();
    let tree = toml::Value::try_from(&figures).map_err(|source| {
        Error::new(
            Kind::Run,
            format!("the report holds a count that no file can: {source}"),
        )
    })?;
    let mut found = Vec::new();
    walk(&tree, "", &mut found);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_counts_can_be_sealed() {
        let mut report: Report =
            serde_json::from_str(include_str!("../../tests/fixtures/report.json")).unwrap();
        report.energy.flops = u64::MAX;
        report.energy.bytes = Bytes(u64::MAX);
        report
            .energy
            .bytes_by_level
            .insert("l2".to_string(), Bytes(u64::MAX));
        assert_eq!(report.clone().sealed().unwrap(), report);
    }
}
