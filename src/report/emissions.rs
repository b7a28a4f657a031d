//! `emissions.csv`: one run in CodeCarbon's columns and units (seconds, kilograms, kilowatt-hours, watts, gigabytes).
//!
//! An unknown figure is an empty cell. As in CodeCarbon (its `_do_measurements`), energies and powers include the facility
//! overhead, given in `pue`.

use crate::error::{Error, Kind, Result};
use crate::units::{Bytes, GramsCo2e, Joules, Pue, Seconds};

use super::finite::FiniteReport;
use super::types::{Environment, Meter};

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

/// Energy by device, without facility overhead; `None` where the meter does not separate it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EnergyParts {
    /// Processor.
    pub cpu: Option<Joules>,
    /// Accelerator.
    pub gpu: Option<Joules>,
    /// Memory.
    pub ram: Option<Joules>,
}

/// Facts of the row that are not in the report.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Emissions {
    /// Local time of the run's end, "2026-01-31T12:00:00".
    pub timestamp: String,
    /// The recipe's name.
    pub project_name: String,
    /// Unique to the run.
    pub run_id: String,
    /// Energy by device.
    pub parts: EnergyParts,
    /// Country of the grid.
    pub country_name: Option<String>,
    /// Its ISO 3166-1 alpha-3 code.
    pub country_iso_code: Option<String>,
    /// State or province.
    pub region: Option<String>,
    /// Provider, where the grid is that of a cloud region.
    pub cloud_provider: Option<String>,
    /// The cloud region.
    pub cloud_region: Option<String>,
    /// Available CPUs.
    pub cpu_count: Option<u64>,
    /// Accelerators used.
    pub gpu_count: Option<u64>,
    /// Name of the accelerator.
    pub gpu_model: Option<String>,
    /// Memory of the machine.
    pub ram_total: Option<Bytes>,
}

/// The figures of the row.
pub struct Totals<'a> {
    /// Wall time.
    pub wall: Seconds,
    /// Energy, without facility overhead.
    pub energy: Joules,
    /// Emissions, facility overhead included.
    pub emissions: GramsCo2e,
    /// Facility overhead.
    pub pue: Pue,
    /// The deciding meter.
    pub meter: Meter,
    /// The machine.
    pub environment: &'a Environment,
}

impl Emissions {
    /// Header and row of a run.
    ///
    /// # Errors
    /// [`Kind::Run`] where it cannot be serialized.
    pub fn to_csv(&self, report: &FiniteReport) -> Result<String> {
        self.row(&Totals {
            wall: report.training.wall_s,
            energy: report.energy.total.central,
            emissions: report.carbon.emissions.central,
            pue: report.carbon.pue,
            meter: report.energy.meter,
            environment: &report.environment,
        })
    }

    /// Header and row.
    ///
    /// # Errors
    /// [`Kind::Run`] where it cannot be serialized.
    pub fn row(&self, totals: &Totals<'_>) -> Result<String> {
        let failed = |why: String| {
            Error::new(
                Kind::Run,
                format!("cannot write the emissions as CSV: {why}"),
            )
        };
        let mut csv = csv::Writer::from_writer(Vec::new());
        let row = COLUMNS.map(|column| self.cell(column, totals));
        csv.write_record(COLUMNS)
            .and_then(|()| csv.write_record(&row))
            .map_err(|source| failed(source.to_string()))?;
        let bytes = csv
            .into_inner()
            .map_err(|source| failed(source.to_string()))?;
        String::from_utf8(bytes).map_err(|source| failed(source.to_string()))
    }

    fn cell(&self, column: &str, totals: &Totals<'_>) -> String {
        let wall = totals.wall;
        let facility = |energy: Option<Joules>| energy.map(|energy| totals.pue * energy);
        let kwh = |energy: Option<Joules>| decimal(facility(energy).map(Joules::kwh));
        let watts = |energy: Option<Joules>| {
            decimal(facility(energy).and_then(|energy| mean_power(energy, wall)))
        };
        let kilograms = totals.emissions.0 / 1000.0;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let number = |count: Option<u64>| count.map_or_else(String::new, |count| count.to_string());
        match column {
            "timestamp" => self.timestamp.clone(),
            "project_name" => self.project_name.clone(),
            "run_id" => self.run_id.clone(),
            "duration" => decimal(Some(wall.0)),
            "emissions" => decimal(Some(kilograms)),
            "emissions_rate" => decimal((wall.0 > 0.0).then(|| kilograms / wall.0)),
            "cpu_power" => watts(self.parts.cpu),
            "gpu_power" => watts(self.parts.gpu),
            "ram_power" => watts(self.parts.ram),
            "cpu_energy" => kwh(self.parts.cpu),
            "gpu_energy" => kwh(self.parts.gpu),
            "ram_energy" => kwh(self.parts.ram),
            "energy_consumed" => kwh(Some(totals.energy)),
            "country_name" => text(&self.country_name),
            "country_iso_code" => text(&self.country_iso_code),
            "region" => text(&self.region),
            "cloud_provider" => text(&self.cloud_provider),
            "cloud_region" => text(&self.cloud_region),
            "os" => totals.environment.os.clone(),
            "cpu_count" => number(self.cpu_count),
            "cpu_model" => totals.environment.cpu.clone(),
            "gpu_count" => number(self.gpu_count),
            "gpu_model" => text(&self.gpu_model),
            "ram_total_size" => decimal(self.ram_total.map(|bytes| bytes.0 as f64 / BYTES_PER_GB)),
            "tracking_mode" => tracking_mode(totals.meter).to_string(),
            "on_cloud" => self.cloud_provider.iter().map(|_| "Y").collect(),
            "pue" => decimal(Some(totals.pue.value())),
            // Python, CodeCarbon itself, water, coordinates, utilisation: not known here.
            _ => String::new(),
        }
    }
}

/// CodeCarbon's term: a counter measures the machine, counted and timed energy are of this process.
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
