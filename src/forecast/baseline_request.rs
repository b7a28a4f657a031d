//! `wattune baseline`: the cost of a published training run, or of one described by figures.
//!
//! Precedence of a figure: the request's, else the published one, else the default of `training_cost`.

use serde::Serialize;

use super::accelerator::{Accelerator, Power};
use super::published::PublishedRun;
use super::training_cost::{Estimate, Method, TrainingJob, estimate};
use crate::energy::Grid;
use crate::error::{Error, Kind, Result};
use crate::units::{Count, Flops, Pue, Seconds, Watts};

/// The figures on the command line, all positive.
#[derive(Debug, Clone, PartialEq)]
pub struct BaselineRequest {
    /// A published run.
    pub name: Option<String>,
    /// Parameters active per token.
    pub parameters: Option<Count>,
    /// Training tokens.
    pub tokens: Option<Count>,
    /// Total FLOPs, in place of parameters and tokens.
    pub flops: Option<Flops>,
    /// Pretraining, full fine-tuning or LoRA.
    pub method: Method,
    /// Name of a profile or an accelerator.
    pub device: Option<String>,
    /// Number of devices.
    pub count: Option<u64>,
    /// FLOP/s of one device, averaged over the training.
    pub achieved: Option<f64>,
    /// Power of one device.
    pub power: Option<Watts>,
    /// Device time: the sum over all devices.
    pub device_time: Option<Seconds>,
    /// The facility's overhead.
    pub pue: Option<Pue>,
    /// Name of a grid or a number of gCO2e/kWh.
    pub grid: Option<String>,
}

/// Figures of a run as its source prints them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PublishedFigures {
    /// With or without overhead, as the next field says.
    pub energy_mwh: Option<f64>,
    /// Whether the energy contains the overhead; null where the source does not say.
    pub energy_has_pue: Option<bool>,
    /// With or without overhead, as the next field says.
    pub tco2e: Option<f64>,
    /// Whether the tonnes contain the overhead; null where the source does not say.
    pub tco2e_has_pue: Option<bool>,
    /// Paper, report or model card.
    pub source: String,
    /// A caveat for readers.
    pub remark: Option<String>,
}

/// An estimate with the published figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BaselineCost {
    /// Name of the published run, if requested.
    pub name: Option<String>,
    /// Training method, if the FLOPs follow from it.
    pub method: Option<Method>,
    /// The figures.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// Figures of the source, if a published run was requested.
    pub published: Option<PublishedFigures>,
}

/// The cost of the requested training.
///
/// # Errors
/// Unknown names, and too few figures.
pub fn baseline_cost(request: &BaselineRequest) -> Result<BaselineCost> {
    let run = request
        .name
        .as_deref()
        .map(PublishedRun::find)
        .transpose()?;
    let mut job = run.map_or_else(|| Ok(TrainingJob::default()), published_job)?;
    override_with(&mut job, request)?;
    let estimate = estimate(job)?;
    Ok(BaselineCost {
        name: run.map(|run| run.name.clone()),
        method: request.parameters.map(|_| request.method),
        estimate,
        published: run.map(printed),
    })
}

fn printed(run: &PublishedRun) -> PublishedFigures {
    PublishedFigures {
        energy_mwh: run.energy.map(|energy| energy.kwh() / 1000.0),
        energy_has_pue: run.energy_has_pue,
        tco2e: run.carbon.map(|carbon| carbon.0 / 1e6),
        tco2e_has_pue: run.tco2e_has_pue,
        source: run.source.clone(),
        remark: (!run.remark.is_empty()).then(|| run.remark.clone()),
    }
}

/// A published run as a job: energy without PUE and tCO2e with it, so that the overhead counts once.
fn published_job(run: &PublishedRun) -> Result<TrainingJob> {
    let device = (!run.device.is_empty())
        .then(|| Accelerator::named(&run.device))
        .transpose()?;
    let overhead = run.pue.map_or(1.0, Pue::value);
    let power = run.power_w.map(|watts| match &device {
        Some(device) if run.power_is == "rated" => device.at_rated(watts),
        _ => Power::exact(watts, format!("{}, as published", run.power_is)),
    });
    let mut assumptions = vec![format!("published: {}", run.source)];
    if run.energy.is_some() && run.energy_has_pue.is_none() {
        assumptions.push(
            "the source does not say whether its energy contains the overhead: taken as without"
                .to_string(),
        );
    }
    let energy = run.energy.map(|energy| match run.energy_has_pue {
        Some(true) => energy / overhead,
        _ => energy,
    });
    let carbon = run.carbon.map(|carbon| match run.tco2e_has_pue {
        Some(false) => carbon * overhead,
        _ => carbon,
    });
    Ok(TrainingJob {
        published_name: Some(run.name.clone()),
        flops: run.flops,
        count: run.count,
        achieved: run.achieved,
        power,
        device_time: run.device_time,
        pue: run.pue,
        grid: published_grid(run)?,
        energy,
        carbon,
        assumptions,
        device,
    })
}

fn published_grid(run: &PublishedRun) -> Result<Option<Grid>> {
    let Some(intensity) = run.gco2e_per_kwh else {
        return Ok(None);
    };
    Ok(Some(Grid {
        name: run.source.clone(),
        source: run.source.clone(),
        basis: "as published".to_string(),
        ..Grid::custom(intensity.0)?
    }))
}

/// Replaces published figures, and those derived from them, by the request's.
fn override_with(job: &mut TrainingJob, request: &BaselineRequest) -> Result<()> {
    if let Some(device) = &request.device {
        job.device = Some(Accelerator::named(device).map_err(|error| error.at("--device"))?);
        (
            job.device_time,
            job.achieved,
            job.power,
            job.energy,
            job.carbon,
        ) = (None, None, None, None, None);
        if job.published_name.is_some() {
            job.assumptions.push(format!(
                "the published work on {device} instead of its own device"
            ));
        }
    }
    match (request.flops, request.parameters) {
        (Some(flops), _) => job.flops = Some(flops),
        (None, Some(parameters)) => job.count_flops(request.method, parameters, request.tokens)?,
        (None, None) if request.name.is_none() && request.device_time.is_none() => {
            return Err(no_work());
        }
        (None, None) => {}
    }
    if let Some(time) = request.device_time {
        (job.device_time, job.achieved, job.energy, job.carbon) = (Some(time), None, None, None);
    }
    if let Some(rate) = request.achieved {
        if job.flops.is_none() {
            return Err(no_work().at("--achieved-tflops"));
        }
        (job.achieved, job.energy, job.carbon) = (Some(rate), None, None);
    }
    if let Some(power) = request.power {
        (job.power, job.energy, job.carbon) = (Some(Power::exact(power, "as given")), None, None);
    }
    if let Some(grid) = &request.grid {
        job.grid = Some(Grid::find(grid).map_err(|error| error.at("--grid"))?);
    }
    job.pue = request.pue.or(job.pue);
    job.count = request.count.or(job.count);
    Ok(())
}

fn no_work() -> Error {
    Error::new(Kind::Usage, "nothing says how large the training is")
        .rule("a published run's name, `--params N`, `--flops F` or `--hours DEVICE_HOURS`")
        .hint("`wattune baseline gpt-3`, or `wattune baseline --params 7B --tokens 1T --device nvidia-a100-sxm4-80gb`")
}
