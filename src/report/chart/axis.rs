//! A chart axis: range, scale and round ticks.
//!
//! Takes the values to be shown, returns positions between 0 and 1. Ticks are 1, 2 or 5 times a power of ten apart. Knows
//! nothing of pixels or SVG.

/// Spacing of values along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences have equal lengths.
    Linear,
    /// Equal ratios have equal lengths; only values above zero have a position.
    Log,
}

/// One side of a chart.
#[derive(Debug, Clone)]
pub struct Axis {
    /// Its label.
    pub label: String,
    /// Its scale.
    pub scale: Scale,
    /// Formats a tick.
    pub form: fn(f64) -> String,
    /// Ticks at integers only.
    integer_ticks: bool,
    /// The range ends at the values instead of the next ticks; linear axes only.
    fit: bool,
    low: f64,
    high: f64,
}

/// An axis's ends and labelled values.
#[derive(Debug, Clone, PartialEq)]
pub struct Ticks {
    scale: Scale,
    low: f64,
    high: f64,
    /// The labelled values, ascending.
    pub marks: Vec<f64>,
}

impl Axis {
    /// An axis that covers `values`; `None` where no value has a position on it.
    pub fn over(
        label: &str,
        scale: Scale,
        form: fn(f64) -> String,
        values: impl IntoIterator<Item = f64>,
    ) -> Option<Self> {
        let usable = |value: &f64| value.is_finite() && (scale == Scale::Linear || *value > 0.0);
        let bounds = values
            .into_iter()
            .filter(usable)
            .map(|value| (value, value));
        let (low, high) =
            bounds.reduce(|(low, high), (value, _)| (low.min(value), high.max(value)))?;
        Some(Self {
            label: label.to_string(),
            scale,
            form,
            integer_ticks: false,
            fit: false,
            low,
            high,
        })
    }

    /// Ends a linear axis at its values.
    pub fn fit(self) -> Self {
        Self { fit: true, ..self }
    }

    /// Restricts the ticks of a linear axis to integers.
    pub fn integer_ticks(self) -> Self {
        Self {
            integer_ticks: true,
            ..self
        }
    }

    /// Ends and about `count` labelled values.
    pub fn ticks(&self, count: usize) -> Ticks {
        let count = count.max(1);
        match self.scale {
            Scale::Linear => self.linear(count),
            Scale::Log => self.log(count),
        }
    }

    fn linear(&self, count: usize) -> Ticks {
        let range = self.high - self.low;
        let range = if range > 0.0 {
            range
        } else {
            self.low.abs().max(1.0) * 0.1
        };
        let step = nice_step(range / count as f64).max(if self.integer_ticks { 1.0 } else { 0.0 });
        let first = (self.low / step).floor();
        let last = (self.high / step).ceil().max(first + 1.0);
        // Products of integers: no rounding error accumulates along the axis.
        let marks: Vec<f64> = (0..=(last - first) as u64)
            .map(|index| (first + index as f64) * step)
            .collect();
        if self.fit && self.high > self.low {
            let inside = marks
                .into_iter()
                .filter(|mark| (self.low..=self.high).contains(mark))
                .collect();
            return Ticks {
                scale: Scale::Linear,
                low: self.low,
                high: self.high,
                marks: inside,
            };
        }
        Ticks {
            scale: Scale::Linear,
            low: first * step,
            high: last * step,
            marks,
        }
    }

    fn log(&self, count: usize) -> Ticks {
        let bottom = self.low.log10().floor() as i32 - 1;
        let top = self.high.log10().ceil() as i32 + 1;
        let fine: Vec<f64> = (bottom..=top)
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|m| m * power_of_ten(decade)))
            .collect();
        let low = fine
            .iter()
            .copied()
            .rfind(|tick| *tick <= self.low)
            .unwrap_or(self.low);
        let high = fine
            .iter()
            .copied()
            .find(|tick| *tick >= self.high && *tick > low)
            .unwrap_or(self.high);
        let inside = |tick: &f64| (low..=high).contains(tick);
        let decades: Vec<f64> = (bottom..=top).map(power_of_ten).filter(inside).collect();
        let marks: Vec<f64> = match decades.len() {
            // Powers of ten alone would leave most of the axis without ticks.
            0..=2 => fine.into_iter().filter(inside).collect(),
            found => decades
                .into_iter()
                .step_by(found.div_ceil(count + 1))
                .collect(),
        };
        Ticks {
            scale: Scale::Log,
            low,
            high,
            marks,
        }
    }
}

impl Ticks {
    /// Position of `value`: 0 at the low end, 1 at the high end; `None` where it has none.
    pub fn position(&self, value: f64) -> Option<f64> {
        let position = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        position.is_finite().then(|| position.clamp(0.0, 1.0))
    }
}

/// The least of 1, 2 and 5 times a power of ten that is not below `rough`.
fn nice_step(rough: f64) -> f64 {
    let decade = rough.log10().floor() as i32;
    let steps = [1.0, 2.0, 5.0, 10.0].map(|mantissa| mantissa * power_of_ten(decade));
    steps
        .into_iter()
        .find(|step| *step >= rough * (1.0 - 1e-9))
        .unwrap_or(rough)
}

/// Read from text, which is the nearest double; `powi` is off by a bit below one.
fn power_of_ten(exponent: i32) -> f64 {
    format!("1e{exponent}").parse().unwrap_or(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(scale: Scale, values: &[f64], count: usize) -> Vec<f64> {
        Axis::over("", scale, |v| v.to_string(), values.iter().copied())
            .unwrap()
            .ticks(count)
            .marks
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        // 65 over 6 is 10.8; the next of 1, 2, 5 times a power of ten is 20.
        assert_eq!(
            marks(Scale::Linear, &[0.0, 65.0], 6),
            [0.0, 20.0, 40.0, 60.0, 80.0]
        );
        assert_eq!(marks(Scale::Linear, &[2.05, 3.25], 4), [2.0, 2.5, 3.0, 3.5]);
        assert_eq!(
            marks(Scale::Linear, &[0.0, 0.0003], 3),
            [0.0, 0.0001, 0.0002, 0.0003].map(|v: f64| (v / 1e-4).round() * 1e-4)
        );
        assert_eq!(marks(Scale::Linear, &[7.0], 3).len(), 2);
    }

    #[test]
    fn log_ticks_are_decades_or_one_two_five() {
        assert_eq!(marks(Scale::Log, &[0.0036, 3.9], 5), [0.01, 0.1, 1.0]);
        assert_eq!(marks(Scale::Log, &[30.0, 80.0], 5), [20.0, 50.0, 100.0]);
        assert_eq!(
            marks(Scale::Log, &[1.0, 1e10], 5),
            [1.0, 1e2, 1e4, 1e6, 1e8, 1e10]
        );
    }

    #[test]
    fn positions_run_from_end_to_end() {
        let axis = |scale| Axis::over("", scale, |v| v.to_string(), [1.0, 100.0]).unwrap();
        let ticks = axis(Scale::Log).ticks(4);
        assert_eq!(
            [1.0, 10.0, 100.0].map(|v| ticks.position(v).unwrap()),
            [0.0, 0.5, 1.0]
        );
        assert_eq!(
            (
                ticks.position(0.0),
                ticks.position(-1.0),
                ticks.position(f64::NAN)
            ),
            (None, None, None)
        );
        let ticks = axis(Scale::Linear).ticks(4);
        assert_eq!(
            [0.0, 50.0, 100.0].map(|v| ticks.position(v).unwrap()),
            [0.0, 0.5, 1.0]
        );
    }

    #[test]
    fn values_without_a_position_make_no_axis() {
        let over = |scale, values: &[f64]| {
            Axis::over("", scale, |v| v.to_string(), values.iter().copied()).is_some()
        };
        assert!(
            !over(Scale::Linear, &[f64::NAN, f64::INFINITY])
                && !over(Scale::Log, &[0.0, -1.0])
                && !over(Scale::Linear, &[])
        );
        assert!(over(Scale::Log, &[0.0, 2.0]));
    }

    #[test]
    fn a_fitted_axis_ends_with_its_values() {
        let ticks = Axis::over("", Scale::Linear, |v| v.to_string(), [0.0, 161.0])
            .unwrap()
            .fit()
            .ticks(4);
        assert_eq!(
            (ticks.marks.as_slice(), ticks.position(161.0)),
            ([0.0, 50.0, 100.0, 150.0].as_slice(), Some(1.0))
        );
    }

    #[test]
    fn integer_ticks_are_integers() {
        let axis = Axis::over("", Scale::Linear, |v| v.to_string(), [0.0, 2.0]).unwrap();
        assert_eq!(axis.integer_ticks().ticks(6).marks, [0.0, 1.0, 2.0]);
    }
}
