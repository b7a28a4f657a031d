//! Cloud regions whose provider publishes no current open intensities: each stands on the grid of its place.
//!
//! Owns `cloud_grids.csv`: which country's, state's or province's grid feeds a region of AWS or Azure. Takes nothing, returns rows.
//! That a region lies in a place is the provider's own statement; that it draws the place's average mix is an assumption, which the
//! basis of its grid says. Knows no intensities.

use serde::Deserialize;

/// The table as shipped.
pub(super) const TABLE: &str = include_str!("cloud_grids.csv");

/// A region and the code of its grid.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Region {
    /// "aws" or "azure".
    pub(super) provider: String,
    /// The provider's name of the region.
    pub(super) region: String,
    /// Where it lies, in words.
    pub(super) location: String,
    /// A code of `grid.csv`.
    pub(super) grid: String,
}

impl Region {
    /// Every region of the table.
    pub(super) fn all() -> Vec<Region> {
        let mut reader = csv::Reader::from_reader(TABLE.as_bytes());
        reader
            .deserialize()
            .map(|row| row.expect("the shipped table is valid: a test reads it"))
            .collect()
    }

    /// "AWS us-east-1 (Northern Virginia)".
    pub(super) fn name(&self) -> String {
        let provider = if self.provider == "aws" {
            "AWS"
        } else {
            "Azure"
        };
        format!("{provider} {} ({})", self.region, self.location)
    }
}
