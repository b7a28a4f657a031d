//! Uses wattune as a library: plans a recipe, trains it, prints each step and what the run cost.
//!
//!     cargo run --release --example train -- recipes/quickstart.toml my-run

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use wattune::error::Result;
use wattune::recipe;
use wattune::run::{
    DeviceChoice, Progress, Purpose, Screen, Silent, StepRecord, StepView, TrainRequest, plan,
    prepare, train,
};

/// Prints one line a step; `run::NoProgress` prints nothing.
struct Lines;

impl Screen for Lines {
    fn note(&mut self, line: &str) {
        println!("{line}");
    }
    fn step(&mut self, step: &StepRecord, view: &StepView) {
        let loss = step.loss.unwrap_or(f64::NAN);
        println!(
            "step {} of {}: loss {loss:.4}",
            step.step, view.expected_steps
        );
    }
    fn evaluating(&mut self, _: usize, _: usize) {}
    fn evaluated(&mut self, step: u64, val_loss: f64) {
        println!("step {step}: validation loss {val_loss:.4}");
    }
    fn downloads(&self) -> &dyn Progress {
        &Silent
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let recipe = arguments
        .next()
        .unwrap_or("recipes/quickstart.toml".to_string());
    let out = arguments.next().map_or("my-run".into(), PathBuf::from);

    let recipe = recipe::load(Path::new(&recipe), &[])?;
    let (device, computing) = "auto".parse::<DeviceChoice>()?.open()?;
    let purpose = Purpose::Run;
    let prepared = prepare(recipe.clone(), &device, computing, purpose, &Silent)?;
    let forecast = plan(&prepared, &mut Lines)?;
    println!("the plan: {} steps", forecast.steps());

    let interrupted = AtomicBool::new(false);
    let request = TrainRequest {
        recipe: Some(recipe),
        out,
        resume: None,
        device,
        computing,
        interrupted: &interrupted,
    };
    let finished = train(request, &mut Lines)?;
    let spent = finished.report.energy.total.central;
    println!("{spent} for the adapter in {}", finished.result().display());
    Ok(())
}
