//! The main job, proved through the command line: budgets bind, forecasts hold, runs resume, refusals say what to type.
//!
//! Every test starts the program itself on the model inside it (or, where its name says so, on real pretrained assets) and reads what a
//! person would read: exit status, standard output, the run's files. `lab` holds what they share.

#[path = "../common/mod.rs"]
mod common;
mod lab;

mod adapters;
mod baselines;
mod budget;
mod choices;
mod classifiers;
mod continued;
mod crashes;
mod early_stopping;
mod export;
mod figures;
mod first_recipe;
mod json;
mod measured;
mod memory;
mod multiple_choice;
mod pretrained;
mod python;
mod refusals;
mod resume;
mod serving;
mod text;
