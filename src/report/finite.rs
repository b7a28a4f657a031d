//! The check that a report passes once, before it becomes a page or a file.

use std::ops::Deref;

use minijinja::Value;
use minijinja::value::{Serde, ValueKind};
use serde::Serialize;

use super::types::Report;
use crate::error::{Error, Kind, Result};

/// A report in which every figure is finite or absent.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct FiniteReport(Report);

impl FiniteReport {
    /// An optional figure that is not finite becomes `None`, and a warning names it.
    ///
    /// # Errors
    /// [`Kind::Run`] naming a required figure that is not finite.
    pub fn new(report: Report) -> Result<Self> {
        let mut paths = Vec::new();
        find_non_finite(&Value::from(Serde(&report)), "", &mut paths);
        if paths.is_empty() {
            return Ok(Self(report));
        }
        // JSON writes NaN and infinities as null, which an optional field reads as `None` and a required one rejects.
        let finite = serde_json::to_value(&report).and_then(serde_json::from_value::<Report>);
        let mut report = finite.map_err(|_| {
            Error::new(
                Kind::Run,
                "the report holds a figure that is not a finite number",
            )
            .at(paths.join(", "))
            .rule("an energy, a carbon figure and a ratio must be finite")
            .hint("check the device profile and the grid's intensity with `wattune devices`")
        })?;
        let warning = |path: &String| format!("{path} was not a finite number and is left out");
        report.warnings.extend(paths.iter().map(warning));
        Ok(Self(report))
    }

    /// The report, to be changed and checked again.
    pub fn into_inner(self) -> Report {
        self.0
    }
}

impl Deref for FiniteReport {
    type Target = Report;

    fn deref(&self) -> &Report {
        &self.0
    }
}

/// Adds the paths of NaN and infinite floats under `value`. Unlike a JSON value, this one can hold them.
fn find_non_finite(value: &Value, path: &str, found: &mut Vec<String>) {
    let child = |name: &Value| match path {
        "" => name.to_string(),
        _ => format!("{path}.{name}"),
    };
    let children = value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Number
            if f64::try_from(value.clone()).is_ok_and(|number| !number.is_finite()) =>
        {
            found.push(path.to_string());
        }
        ValueKind::Map => {
            for key in children {
                if let Ok(item) = value.get_item(&key) {
                    find_non_finite(&item, &child(&key), found);
                }
            }
        }
        ValueKind::Seq => {
            for (index, item) in children.enumerate() {
                find_non_finite(&item, &child(&Value::from(index)), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn the_largest_counts_are_finite() {
        let mut report: Report =
            serde_json::from_str(include_str!("../../tests/fixtures/report.json")).unwrap();
        report.energy.flops = u64::MAX;
        report.energy.bytes = Bytes(u64::MAX);
        report
            .energy
            .bytes_by_level
            .insert("l2".to_string(), Bytes(u64::MAX));
        assert_eq!(
            FiniteReport::new(report.clone()).unwrap().into_inner(),
            report
        );
    }
}
