//! Grams from joules: grid intensities and the carbon formula.
//!
//! Owns the table of grids (`grid.csv`, made by `scripts/grid_tables.py`), the look-up by code, name, state or cloud region, and a
//! device's share of its own manufacture.
//! Takes a text, returns a `Grid` with its year, basis, source and licence; an unknown place is an error with near matches, never
//! a silent average. Knows nothing of what the energy was spent on.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cloud::{self, Region};
use super::options::GridRef;
use super::{did_you_mean, near_matches};
use crate::error::{Error, Kind, Result};
use crate::units::{GramsCo2e, GramsPerKwh, Joules, Pue, Seconds};

/// Grams of CO2e of `energy` at the machine: times the facility's overhead, times the grid's intensity.
///
/// ```
/// use wattune::energy::carbon;
/// use wattune::units::{GramsCo2e, GramsPerKwh, Joules, Pue};
/// assert_eq!(carbon(Joules(3.6e6), Pue::ONE, GramsPerKwh(473.0)), GramsCo2e(473.0));
/// ```
pub fn carbon(energy: Joules, pue: Pue, grid: GramsPerKwh) -> GramsCo2e {
    grid * (pue * energy)
}

/// How long a device is taken to serve, day and night: the three years of EcoLogits' and many data centres' depreciation.
pub const LIFE_YEARS: f64 = 3.0;

/// The share of a device's manufacture that falls to `time` on it, spread evenly over [`LIFE_YEARS`].
///
/// ```
/// use wattune::energy::carbon::embodied_share;
/// use wattune::units::{GramsCo2e, Seconds};
/// // 164 kg over 3 years of 8,766 hours: 6.236 g an hour.
/// assert!((embodied_share(GramsCo2e(164_000.0), Seconds(3600.0)).0 - 6.236).abs() < 1e-3);
/// ```
pub fn embodied_share(manufacture: GramsCo2e, time: Seconds) -> GramsCo2e {
    const YEAR_S: f64 = 365.25 * 86_400.0;
    manufacture * (time.0 / (LIFE_YEARS * YEAR_S))
}

/// The SHA-256 of both tables as shipped (`grid.csv`, then `cloud_grids.csv`), in hexadecimal: equal where two reports looked a
/// place up in the same data.
pub fn dataset_sha256() -> String {
    let digest = Sha256::new_with_prefix(GRID_TABLE)
        .chain_update(cloud::TABLE)
        .finalize();
    crate::text::hex(digest)
}

/// The table as shipped.
const GRID_TABLE: &str = include_str!("grid.csv");

/// The intensity of one grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// "FR", "US-CA", "gcp:us-central1", "aws:eu-west-1", "world", or "custom" for a number.
    pub code: String,
    /// The country's ISO 3166-1 alpha-3 code, where the grid is a country's.
    pub iso3: Option<String>,
    /// For people.
    pub name: String,
    /// Grams of CO2e per kilowatt-hour.
    pub gco2e_per_kwh: GramsPerKwh,
    /// Year of the figure; `None` for a number of the user's own.
    pub year: Option<u16>,
    /// What is counted ("life-cycle, production mix").
    pub basis: String,
    /// Where the figure comes from.
    pub source: String,
    /// Under what licence.
    pub licence: String,
    /// The lowest figure the same source gave for a recent year.
    pub low: Option<GramsPerKwh>,
    /// The highest.
    pub high: Option<GramsPerKwh>,
}

/// A row of `grid.csv`: `aliases` are further codes, separated by `|`; `dataset` is a key of `DATASETS`.
#[derive(Debug, Deserialize)]
struct Row {
    code: String,
    aliases: String,
    name: String,
    gco2e_per_kwh: f64,
    year: Option<u16>,
    low: Option<f64>,
    high: Option<f64>,
    dataset: String,
}

/// A source of grid figures with its notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Dataset {
    /// Its key in `grid.csv`.
    pub key: &'static str,
    /// Who made it and which part of it is used.
    pub source: &'static str,
    /// Its licence.
    pub licence: &'static str,
    /// What its figures count.
    pub basis: &'static str,
}

/// The sources of the table: print them where attribution is due.
pub const DATASETS: [Dataset; 4] = [
    Dataset {
        key: "owid",
        source: "Our World in Data, energy data set, carbon_intensity_elec, with data of Ember",
        licence: "CC-BY-4.0",
        basis: "life-cycle, production mix",
    },
    Dataset {
        key: "green-algorithms",
        source: "Green Algorithms, CI_aggregated",
        licence: "CC-BY-4.0",
        basis: "as published by national registries, production mix",
    },
    Dataset {
        key: "gcp",
        source: "Google Cloud, region-carbon-info",
        licence: "Apache-2.0",
        basis: "location-based, consumption, hourly average",
    },
    Dataset {
        key: "custom",
        source: "a number given by the user",
        licence: "none",
        basis: "as given",
    },
];

struct Entry {
    grid: Grid,
    /// Every text that finds it, in lower case.
    keys: Vec<String>,
}

static GRIDS: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let mut reader = csv::Reader::from_reader(GRID_TABLE.as_bytes());
    let rows = reader.deserialize::<Row>().map(|row| {
        row.expect("the shipped table is valid: a test reads it")
            .entry()
    });
    let mut entries: Vec<Entry> = rows.collect();
    let regions: Vec<Entry> = Region::all()
        .into_iter()
        .map(|region| on_its_place(&region, &entries))
        .collect();
    entries.extend(regions);
    entries
});

/// The grid of the place where a region lies, under the region's names.
fn on_its_place(region: &Region, places: &[Entry]) -> Entry {
    let place = places.iter().find(|entry| entry.grid.code == region.grid);
    let place = &place
        .expect("the shipped table names grids: a test reads it")
        .grid;
    let code = format!("{}:{}", region.provider, region.region);
    let grid = Grid {
        name: format!("{} on the grid of {}", region.name(), place.name),
        basis: format!(
            "{}; of the place where the region lies, not of what its provider buys",
            place.basis
        ),
        iso3: None,
        code: code.clone(),
        ..place.clone()
    };
    Entry {
        grid,
        keys: vec![code, region.region.clone()],
    }
}

impl Row {
    fn entry(self) -> Entry {
        let dataset = DATASETS
            .iter()
            .find(|d| d.key == self.dataset)
            .expect("the shipped table names its sources: a test reads it");
        let mut keys = vec![self.code.to_lowercase(), self.name.to_lowercase()];
        keys.extend(
            self.aliases
                .split('|')
                .filter(|alias| !alias.is_empty())
                .map(str::to_lowercase),
        );
        let iso3 = self
            .aliases
            .split('|')
            .find(|alias| alias.len() == 3 && self.code.len() == 2)
            .map(str::to_string);
        let grid = Grid {
            code: self.code,
            iso3,
            name: self.name,
            gco2e_per_kwh: GramsPerKwh(self.gco2e_per_kwh),
            year: self.year,
            basis: dataset.basis.to_string(),
            source: dataset.source.to_string(),
            licence: dataset.licence.to_string(),
            low: self.low.map(GramsPerKwh),
            high: self.high.map(GramsPerKwh),
        };
        Entry { grid, keys }
    }
}

impl Grid {
    /// Every grid of the table.
    pub fn all() -> impl Iterator<Item = &'static Grid> {
        GRIDS.iter().map(|entry| &entry.grid)
    }

    /// A grid by "world", ISO code of two or three letters, name, "US-CA", "gcp:us-central1" or "us-central1"; or a number of
    /// gCO2e/kWh. Letter case does not matter.
    ///
    /// ```
    /// use wattune::energy::Grid;
    /// assert_eq!(Grid::find("FRA").unwrap(), Grid::find("france").unwrap());
    /// assert_eq!(Grid::find("250").unwrap().gco2e_per_kwh.0, 250.0);
    /// ```
    pub fn find(text: &str) -> Result<Grid> {
        let wanted = text.trim().to_lowercase();
        if let Ok(intensity) = wanted.parse::<f64>() {
            return Self::custom(intensity);
        }
        if let Some(entry) = GRIDS.iter().find(|entry| entry.keys.contains(&wanted)) {
            return Ok(entry.grid.clone());
        }
        let near = near_matches(
            &wanted,
            GRIDS
                .iter()
                .flat_map(|entry| &entry.keys)
                .map(String::as_str),
        );
        let otherwise = match wanted.split_once(':') {
            Some(("aws" | "azure" | "gcp", _)) => {
                "write the country or US state of the region instead"
            }
            _ => {
                "write an ISO code, a US state (`US-CA`), a cloud region (`gcp:us-central1`, `aws:eu-west-1`, `azure:uaenorth`), `world`, \
                 or a number in gCO2e/kWh"
            }
        };
        Err(Error::new(
            Kind::Energy,
            "no grid of this name is known, and none is assumed",
        )
        .at("energy.grid")
        .value(text)
        .hint(did_you_mean(&near, otherwise)))
    }

    /// The grid of a recipe's `energy.grid`.
    ///
    /// # Errors
    /// A name that no table lists.
    pub fn resolve(grid: &GridRef) -> Result<Grid> {
        match grid {
            GridRef::Named(name) => Self::find(name),
            GridRef::Intensity(intensity) => Self::custom(intensity.0),
        }
    }

    /// The country it lies in: its own row, a state's or a province's country; `None` for larger places, cloud regions and numbers.
    pub fn country(&self) -> Option<Grid> {
        if self.iso3.is_some() {
            return Some(self.clone());
        }
        let (country, _) = self
            .code
            .split_once('-')
            .filter(|_| !self.code.contains(':'))?;
        Grid::find(country).ok().filter(|grid| grid.iso3.is_some())
    }

    /// A grid of the user's own intensity, zero or more gCO2e/kWh.
    pub fn custom(intensity: f64) -> Result<Grid> {
        if !(intensity.is_finite() && intensity >= 0.0) {
            let error = Error::new(Kind::Energy, "a grid's intensity is a number of gCO2e/kWh")
                .at("energy.grid")
                .value(intensity.to_string());
            return Err(error
                .rule("zero or more")
                .hint("write `grid = \"world\"`, or a number such as 250"));
        }
        let [.., dataset] = DATASETS;
        let words = |text: &str| text.to_string();
        Ok(Grid {
            code: words(dataset.key),
            iso3: None,
            name: words(dataset.source),
            gco2e_per_kwh: GramsPerKwh(intensity),
            year: None,
            basis: words(dataset.basis),
            source: words(dataset.source),
            licence: words(dataset.licence),
            low: None,
            high: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_found_by_every_name_it_has() {
        for text in ["FR", "fra", "France", " fr "] {
            let grid = Grid::find(text).unwrap();
            // Our World in Data, 2024: 44.2 g/kWh.
            assert!(
                (grid.gco2e_per_kwh.0 - 44.2).abs() < 0.05 && grid.year == Some(2024),
                "{text}: {grid:?}"
            );
        }
        // World 2024 and US 2024 of the same table; California 2020 of Green Algorithms; Iowa's region 2024 of Google.
        for (text, grams) in [
            ("world", 473.0),
            ("US", 383.5),
            ("DEU", 344.1),
            ("US-CA", 216.43),
            ("gcp:us-central1", 412.7),
            ("us-central1", 412.7),
            // Our World in Data's own file, 2024.
            ("UAE", 467.51),
        ] {
            let grid = Grid::find(text).unwrap();
            assert!(
                (grid.gco2e_per_kwh.0 - grams).abs() < 0.06,
                "{text}: {grid:?}"
            );
        }
        let world = Grid::find("world").unwrap();
        assert!(
            world.low.unwrap() <= world.gco2e_per_kwh && world.gco2e_per_kwh <= world.high.unwrap()
        );
    }

    #[test]
    fn a_region_stands_on_the_grid_of_its_place_and_says_so() {
        for (region, place) in [
            ("aws:us-east-1", "US-VA"),
            ("me-central-1", "ARE"),
            ("azure:uaenorth", "AE"),
            ("eu-west-3", "FR"),
        ] {
            let (found, at) = (Grid::find(region).unwrap(), Grid::find(place).unwrap());
            assert_eq!(
                (found.gco2e_per_kwh, found.year, &found.source),
                (at.gco2e_per_kwh, at.year, &at.source),
                "{region}"
            );
            assert!(
                found.basis.contains("place where the region lies")
                    && found.name.ends_with(&at.name),
                "{found:?}"
            );
        }
        assert_eq!(Grid::find("Azure:UAENorth").unwrap().code, "azure:uaenorth");
        assert_eq!(Grid::find("fr").unwrap().iso3.as_deref(), Some("FRA"));
        assert_eq!(
            [
                Grid::find("world"),
                Grid::find("US-CA"),
                Grid::find("aws:eu-west-3")
            ]
            .map(|g| g.unwrap().iso3),
            [None, None, None]
        );
    }

    #[test]
    fn a_state_lies_in_its_country() {
        let country = |text: &str| {
            Grid::find(text)
                .unwrap()
                .country()
                .and_then(|grid| grid.iso3)
        };
        let named = ["FR", "US-CA", "AU-NSW"].map(country);
        assert_eq!(named.map(|iso3| iso3.unwrap()), ["FRA", "USA", "AUS"]);
        assert_eq!(
            ["world", "aws:us-east-1", "gcp:us-central1", "250"].map(country),
            [None, None, None, None]
        );
    }

    #[test]
    fn the_hash_is_that_of_the_files() {
        // cat src/energy/grid.csv src/energy/cloud_grids.csv | sha256sum
        assert_eq!(
            dataset_sha256(),
            "c3b5069920d3ee00bf62ad081098ab5b89ff05450692192ce82d651d3d9cf5b8"
        );
    }

    #[test]
    fn an_unknown_place_is_an_error_with_near_matches() {
        let error = Grid::find("Germny").unwrap_err();
        assert!(
            error.kind() == Kind::Energy && error.remedy().unwrap().contains("`germany`"),
            "{error}"
        );
        assert!(
            Grid::find("us-centrl1")
                .unwrap_err()
                .to_string()
                .contains("us-central1")
        );
        assert!(
            Grid::find("aws:us-east-9")
                .unwrap_err()
                .to_string()
                .contains("`aws:us-east-1`")
        );
        assert!(
            Grid::find("azure:uae")
                .unwrap_err()
                .to_string()
                .contains("`azure:uaenorth`")
        );
        for bad in ["", "-5", "nan", "inf", "Atlantis"] {
            assert_eq!(Grid::find(bad).unwrap_err().kind(), Kind::Energy, "{bad}");
        }
    }

    #[test]
    fn every_row_has_a_key_of_its_own_a_year_and_a_plausible_figure() {
        let mut keys: Vec<&str> = GRIDS
            .iter()
            .flat_map(|entry| &entry.keys)
            .map(String::as_str)
            .collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), all, "two rows share a key");
        assert!(GRIDS.len() > 250);
        for grid in Grid::all() {
            assert!((0.0..=1400.0).contains(&grid.gco2e_per_kwh.0), "{grid:?}");
            assert!(grid.year.is_some_and(|year| year >= 2019), "{grid:?}");
        }
    }
}
