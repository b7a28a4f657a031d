//! Electricity grids: carbon intensity by country, state or cloud region.
//!
//! Holds two tables: intensities (`grid.csv`, made by `scripts/grid_tables.py`), and the grids of
//! AWS and Azure regions, whose providers publish no current open intensities (`cloud_grids.csv`).
//! A region's location is its provider's statement; that it draws the location's average mix is an
//! assumption, stated in its basis. Takes a name, returns a [`Grid`] with year, basis, source and
//! licence; an unknown name is an error with near matches, never an average.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::options::GridRef;
use crate::error::{Error, Kind, Result};
use crate::text::{did_you_mean, hex, near_matches};
use crate::units::GramsPerKwh;

const INTENSITIES: &str = include_str!("grid.csv");
const CLOUD_REGIONS: &str = include_str!("cloud_grids.csv");

/// SHA-256 of both tables (`grid.csv`, then `cloud_grids.csv`), in hexadecimal: equal for two
/// reports that used the same data.
pub fn dataset_sha256() -> String {
    let tables = Sha256::new_with_prefix(INTENSITIES).chain_update(CLOUD_REGIONS);
    hex(tables.finalize())
}

/// Carbon intensity of a grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// "FR", "US-CA", "gcp:us-central1", "aws:eu-west-1", "world", or "custom" for a number.
    pub code: String,
    /// ISO 3166-1 alpha-3 code of a country.
    pub iso3: Option<String>,
    /// Display name.
    pub name: String,
    /// Grams of CO2e per kilowatt-hour.
    pub gco2e_per_kwh: GramsPerKwh,
    /// Year of the figure; `None` for a user's number.
    pub year: Option<u16>,
    /// Scope of the intensity ("life-cycle, production mix").
    pub basis: String,
    /// Source of the figure.
    pub source: String,
    /// Its licence.
    pub licence: String,
    /// Lowest figure of the same source in recent years.
    pub low: Option<GramsPerKwh>,
    /// Highest figure of the same source in recent years.
    pub high: Option<GramsPerKwh>,
}

/// A row of `grid.csv`; `aliases` are separated by `|`, `dataset` is a key of `DATASETS`.
#[derive(Debug, Deserialize)]
struct IntensityRow {
    code: String,
    aliases: String,
    name: String,
    gco2e_per_kwh: f64,
    year: Option<u16>,
    low: Option<f64>,
    high: Option<f64>,
    dataset: String,
}

/// A row of `cloud_grids.csv`; `grid` is a code of `grid.csv`.
#[derive(Debug, Deserialize)]
struct RegionRow {
    /// "aws" or "azure".
    provider: String,
    region: String,
    location: String,
    grid: String,
}

/// A source of grid figures with its notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Dataset {
    /// Key in `grid.csv`.
    pub key: &'static str,
    /// Publisher and the part that is used.
    pub source: &'static str,
    /// Licence.
    pub licence: &'static str,
    /// Scope of its figures.
    pub basis: &'static str,
}

/// The sources of the tables, for attribution.
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

/// A grid and the lower-case names that find it.
struct Entry {
    grid: Grid,
    keys: Vec<String>,
}

static GRIDS: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let countries = rows::<IntensityRow>(INTENSITIES).into_iter();
    let mut entries: Vec<Entry> = countries.map(IntensityRow::entry).collect();
    let regions = rows::<RegionRow>(CLOUD_REGIONS).into_iter();
    let regions: Vec<Entry> = regions.map(|region| region.entry(&entries)).collect();
    entries.extend(regions);
    entries
});

fn rows<T: serde::de::DeserializeOwned>(table: &str) -> Vec<T> {
    csv::Reader::from_reader(table.as_bytes())
        .deserialize()
        .map(|row| row.expect("the shipped table is valid: a test reads it"))
        .collect()
}

impl IntensityRow {
    fn entry(self) -> Entry {
        let dataset = DATASETS
            .iter()
            .find(|dataset| dataset.key == self.dataset)
            .expect("the shipped table names its sources: a test reads it");
        let aliases = self.aliases.split('|').filter(|alias| !alias.is_empty());
        let mut keys = vec![self.code.to_lowercase(), self.name.to_lowercase()];
        keys.extend(aliases.clone().map(str::to_lowercase));
        let is_country = self.code.len() == 2;
        let iso3 = aliases.clone().find(|alias| alias.len() == 3 && is_country);
        let grid = Grid {
            iso3: iso3.map(str::to_string),
            code: self.code,
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

impl RegionRow {
    /// The grid of the region's location, under the region's names.
    fn entry(self, entries: &[Entry]) -> Entry {
        let location = entries
            .iter()
            .find(|entry| entry.grid.code == self.grid)
            .map(|entry| entry.grid.clone())
            .expect("the shipped table names grids: a test reads it");
        let provider = if self.provider == "aws" {
            "AWS"
        } else {
            "Azure"
        };
        let code = format!("{}:{}", self.provider, self.region);
        let grid = Grid {
            name: format!(
                "{provider} {} ({}) on the grid of {}",
                self.region, self.location, location.name
            ),
            basis: format!(
                "{}; of the place where the region lies, not of what its provider buys",
                location.basis
            ),
            iso3: None,
            code: code.clone(),
            ..location
        };
        Entry {
            grid,
            keys: vec![code, self.region],
        }
    }
}

impl Grid {
    /// Every grid of the tables.
    pub fn all() -> impl Iterator<Item = &'static Grid> {
        GRIDS.iter().map(|entry| &entry.grid)
    }

    /// Finds a grid by "world", ISO code of two or three letters, name, "US-CA", "gcp:us-central1"
    /// or "us-central1", in any letter case; or takes a number of gCO2e/kWh.
    ///
    /// ```
    /// use wattune::energy::Grid;
    /// assert_eq!(Grid::find("FRA").unwrap(), Grid::find("france").unwrap());
    /// assert_eq!(Grid::find("250").unwrap().gco2e_per_kwh.0, 250.0);
    /// ```
    pub fn find(text: &str) -> Result<Grid> {
        let name = text.trim().to_lowercase();
        if let Ok(intensity) = name.parse::<f64>() {
            return Self::custom(intensity);
        }
        if let Some(entry) = GRIDS.iter().find(|entry| entry.keys.contains(&name)) {
            return Ok(entry.grid.clone());
        }
        let keys = GRIDS.iter().flat_map(|entry| &entry.keys);
        let near = near_matches(&name, keys.map(String::as_str));
        let otherwise = match name.split_once(':') {
            Some(("aws" | "azure" | "gcp", _)) => {
                "write the country or US state of the region instead"
            }
            _ => {
                "write an ISO code, a US state (`US-CA`), a cloud region (`gcp:us-central1`, `aws:eu-west-1`, `azure:uaenorth`), `world`, \
                 or a number in gCO2e/kWh"
            }
        };
        let what = "no grid of this name is known, and none is assumed";
        Err(Error::new(Kind::Energy, what)
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

    /// The country of a country's, a state's or a province's grid; `None` for larger areas, cloud
    /// regions and numbers.
    pub fn country(&self) -> Option<Grid> {
        if self.iso3.is_some() {
            return Some(self.clone());
        }
        if self.code.contains(':') {
            return None;
        }
        let (country, _) = self.code.split_once('-')?;
        Grid::find(country).ok().filter(|grid| grid.iso3.is_some())
    }

    /// A grid of a given intensity, zero or more gCO2e/kWh.
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
        Ok(Grid {
            code: dataset.key.to_string(),
            iso3: None,
            name: dataset.source.to_string(),
            gco2e_per_kwh: GramsPerKwh(intensity),
            year: None,
            basis: dataset.basis.to_string(),
            source: dataset.source.to_string(),
            licence: dataset.licence.to_string(),
            low: None,
            high: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> Grid {
        Grid::find(text).unwrap()
    }

    #[test]
    fn a_grid_is_found_by_every_name() {
        for text in ["FR", "fra", "France", " fr "] {
            let grid = find(text);
            // Our World in Data, 2024: 44.2 g/kWh.
            let is_2024 = (grid.gco2e_per_kwh.0 - 44.2).abs() < 0.05 && grid.year == Some(2024);
            assert!(is_2024, "{text}: {grid:?}");
        }
        // World 2024 and US 2024 of the same table; California 2020 of Green Algorithms; Iowa's
        // region 2024 of Google.
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
            let grid = find(text);
            assert!(
                (grid.gco2e_per_kwh.0 - grams).abs() < 0.06,
                "{text}: {grid:?}"
            );
        }
        let world = find("world");
        assert!(world.low.unwrap() <= world.gco2e_per_kwh);
        assert!(world.gco2e_per_kwh <= world.high.unwrap());
    }

    #[test]
    fn a_cloud_region_has_the_intensity_of_its_location_and_states_so() {
        for (region, location) in [
            ("aws:us-east-1", "US-VA"),
            ("me-central-1", "ARE"),
            ("azure:uaenorth", "AE"),
            ("eu-west-3", "FR"),
        ] {
            let (region, location) = (find(region), find(location));
            assert_eq!(region.gco2e_per_kwh, location.gco2e_per_kwh);
            assert_eq!(
                (region.year, &region.source),
                (location.year, &location.source)
            );
            assert!(
                region.basis.contains("place where the region lies"),
                "{region:?}"
            );
            assert!(region.name.ends_with(&location.name), "{region:?}");
        }
        assert_eq!(find("Azure:UAENorth").code, "azure:uaenorth");
        assert_eq!(find("fr").iso3.as_deref(), Some("FRA"));
        for text in ["world", "US-CA", "aws:eu-west-3"] {
            assert_eq!(find(text).iso3, None, "{text}");
        }
    }

    #[test]
    fn a_state_lies_in_its_country() {
        let country = |text: &str| find(text).country().and_then(|grid| grid.iso3);
        let countries = ["FR", "US-CA", "AU-NSW"].map(|text| country(text).unwrap());
        assert_eq!(countries, ["FRA", "USA", "AUS"]);
        for text in ["world", "aws:us-east-1", "gcp:us-central1", "250"] {
            assert_eq!(country(text), None, "{text}");
        }
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
    fn an_unknown_name_is_an_error_with_near_matches() {
        for (text, near) in [
            ("Germny", "`germany`"),
            ("us-centrl1", "us-central1"),
            ("aws:us-east-9", "`aws:us-east-1`"),
            ("azure:uae", "`azure:uaenorth`"),
        ] {
            let error = Grid::find(text).unwrap_err();
            assert!(error.remedy().unwrap().contains(near), "{error}");
        }
        for bad in ["", "-5", "nan", "inf", "Atlantis", "Germny"] {
            assert_eq!(Grid::find(bad).unwrap_err().kind(), Kind::Energy, "{bad}");
        }
    }

    #[test]
    fn every_row_has_unique_keys_a_year_and_a_plausible_figure() {
        let keys: Vec<&String> = GRIDS.iter().flat_map(|entry| &entry.keys).collect();
        let unique: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(unique.len(), keys.len(), "two rows share a key");
        assert!(GRIDS.len() > 250);
        for grid in Grid::all() {
            assert!((0.0..=1400.0).contains(&grid.gco2e_per_kwh.0), "{grid:?}");
            assert!(grid.year.is_some_and(|year| year >= 2019), "{grid:?}");
        }
    }
}
