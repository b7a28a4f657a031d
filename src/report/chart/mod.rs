//! Plots as SVG.

mod axis;
mod plot;

pub use axis::{Axis, Scale};
pub use plot::{Mark, Plot, Rule, Series, Shape};
