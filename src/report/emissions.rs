//! `emissions.csv`: one run in CodeCarbon's columns, so that its tools and everybody's spreadsheets read it.
//!
//! Owns the columns and their units: seconds, kilograms, kilowatt-hours, watts, gigabytes. Takes a report and what only the
//! composition root knows, returns a CSV of one row. What is not known is an empty cell. As in CodeCarbon (its
//! `_do_measurements`), energies and powers include the facility's overhead, given in `pue`.

use crate::error::{Error, Kind, Result};
use crate::units::{Bytes, Joules, Seconds};

use super::types::{Meter, Report};

/// CodeCarbon 3.3.0's columns in its order (`codecarbon/output_methods/emissions_data.py`, MIT).
pub const COLUMNS: [&str; 38] = [
    "timestamp",
    "project_name",
    "run_id",
    "experiment_id",
    "duration",
    "emissions",
    "emissions_rate",
    "cpu_power",
    "gpu_power",
    "ram_power",
    "cpu_energy",
    "gpu_energy",
    "ram_energy",
    "energy_consumed",
    "water_consumed",
    "country_name",
    "country_iso_code",
    "region",
    "cloud_provider",
    "cloud_region",
    "os",
    "python_version",
    "codecarbon_version",
    "cpu_count",
    "cpu_model",
    "gpu_count",
    "gpu_model",
    "longitude",
    "latitude",
    "ram_total_size",
    "tracking_mode",
    "cpu_utilization_percent",
    "gpu_utilization_percent",
    "ram_utilization_percent",
    "ram_used_gb",
    "on_cloud",
    "pue",
    "wue",
];

/// Bytes in CodeCarbon's gigabyte (its `external/hardware.py`).
const BYTES_PER_GB: f64 = 1_073_741_824.0;

/// The total's parts by device, the machine's own energy; `None` where the meter does not tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EnergyParts {
    /// The processor's.
    pub cpu: Option<Joules>,
    /// The accelerator's.
    pub gpu: Option<Joules>,
    /// The memory's.
    pub ram: Option<Joules>,
}

/// What the row says beyond the report.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Emissions {
    /// Local time of the run's end, "2026-01-31T12:00:00".
    pub timestamp: String,
    /// The recipe's name.
    pub project_name: String,
    /// Tells this run from others.
    pub run_id: String,
    /// The total's parts.
    pub parts: EnergyParts,
    /// The grid's country.
    pub country_name: Option<String>,
    /// Its ISO 3166-1 alpha-3 code.
    pub country_iso_code: Option<String>,
    /// State or province.
    pub region: Option<String>,
    /// Where the grid is a cloud region's: whose.
    pub cloud_provider: Option<String>,
    /// Where the grid is a cloud region's: which.
    pub cloud_region: Option<String>,
    /// Processors of the machine.
    pub cpu_count: Option<u64>,
    /// Accelerators used.
    pub gpu_count: Option<u64>,
    /// Their name.
    pub gpu_model: Option<String>,
    /// The machine's memory.
    pub ram_total: Option<Bytes>,
}

impl Emissions {
    /// Header and row.
    ///
    /// # Errors
    /// As [`Report::sealed`].
    pub fn to_csv(&self, report: &Report) -> Result<String> {
        let report = report.clone().sealed()?;
        let failed = |why: String| {
            Error::new(
                Kind::Run,
                format!("cannot put the emissions into CSV: {why}"),
            )
        };
        let mut csv = csv::Writer::from_writer(Vec::new());
        let row = COLUMNS.map(|column| self.cell(column, &report));
        csv.write_record(COLUMNS)
            .and_then(|()| csv.write_record(&row))
            .map_err(|source| failed(source.to_string()))?;
        let bytes = csv
            .into_inner()
            .map_err(|source| failed(source.to_string()))?;
        String::from_utf8(bytes).map_err(|source| failed(source.to_string()))
    }

    fn cell(&self, column: &str, report: &Report) -> String {
        let (carbon, wall) = (&report.carbon, report.training.wall_s);
        let facility = |energy: Option<Joules>| energy.map(|energy| carbon.pue * energy);
        let kwh = |energy: Option<Joules>| facility(energy).map(Joules::kwh);
        let watts =
            |energy: Option<Joules>| facility(energy).and_then(|energy| mean_power(energy, wall));
        let kilograms = carbon.gco2e.0 / 1000.0;
        let words = |text: &Option<String>| text.clone().unwrap_or_default();
        match column {
            "timestamp" => self.timestamp.clone(),
            "project_name" => self.project_name.clone(),
            "run_id" => self.run_id.clone(),
            "duration" => decimal(Some(wall.0)),
            "emissions" => decimal(Some(kilograms)),
            "emissions_rate" => decimal((wall.0 > 0.0).then(|| kilograms / wall.0)),
            "cpu_power" => decimal(watts(self.parts.cpu)),
            "gpu_power" => decimal(watts(self.parts.gpu)),
            "ram_power" => decimal(watts(self.parts.ram)),
            "cpu_energy" => decimal(kwh(self.parts.cpu)),
            "gpu_energy" => decimal(kwh(self.parts.gpu)),
            "ram_energy" => decimal(kwh(self.parts.ram)),
            "energy_consumed" => decimal(kwh(Some(report.energy.total_j))),
            "country_name" => words(&self.country_name),
            "country_iso_code" => words(&self.country_iso_code),
            "region" => words(&self.region),
            "cloud_provider" => words(&self.cloud_provider),
            "cloud_region" => words(&self.cloud_region),
            "os" => report.environment.os.clone(),
            "cpu_count" => self
                .cpu_count
                .map(|count| count.to_string())
                .unwrap_or_default(),
            "cpu_model" => report.environment.cpu.clone(),
            "gpu_count" => self
                .gpu_count
                .map(|count| count.to_string())
                .unwrap_or_default(),
            "gpu_model" => words(&self.gpu_model),
            "ram_total_size" => decimal(self.ram_total.map(|bytes| bytes.0 as f64 / BYTES_PER_GB)),
            "tracking_mode" => tracking_mode(report.energy.meter).to_string(),
            "on_cloud" => self
                .cloud_provider
                .as_ref()
                .map(|_| "Y".to_string())
                .unwrap_or_default(),
            "pue" => decimal(Some(carbon.pue.value())),
            // Python, CodeCarbon itself, water, coordinates, utilisation: not known here.
            _ => String::new(),
        }
    }
}

/// CodeCarbon's two words: a counter sees the whole machine, a count or an allotted power only this process.
fn tracking_mode(meter: Meter) -> &'static str {
    match meter {
        Meter::Measured => "machine",
        Meter::Counted | Meter::Timed => "process",
    }
}

fn mean_power(energy: Joules, time: Seconds) -> Option<f64> {
    (time.0 > 0.0).then(|| energy.0 / time.0)
}

/// A finite number as plain decimals, else an empty cell.
fn decimal(value: Option<f64>) -> String {
    value
        .filter(|value| value.is_finite())
        .map(|value| value.to_string())
        .unwrap_or_default()
}
