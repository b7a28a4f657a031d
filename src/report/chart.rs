//! Charts as SVG: lines, marks, bands and limits over two axes, and bars along one.
//!
//! Owns geometry, ticks and the SVG's text; colours and fonts are the page's, by class names. Takes numbers and labels, returns
//! one `<svg role="img">` with title and description, drawn for a width in CSS pixels. A value that is not finite, or has no place
//! on a logarithmic axis, interrupts its line. Knows nothing of runs or reports.

pub mod axis;
mod bars;
mod plot;

pub use axis::{Axis, Scale};
pub use bars::{Bar, Bars};
pub use plot::{Mark, Plot, Rule, Series, Shape};

use super::markup::escape;

/// Wide enough for a figure at the size of a tick's label (12 px) in the widest font the page may get (DejaVu Sans, 0.636 em).
const CHARACTER: f64 = 7.7;

/// The room a label takes, in pixels.
fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// A picture of `width` by `height` pixels that says what it shows. `id` is unique on its page.
fn picture(id: &str, title: &str, desc: &str, [width, height]: [f64; 2], body: &str) -> String {
    format!(
        "<svg role=\"img\" aria-labelledby=\"{id}-t {id}-d\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\">\n<title id=\"{id}-t\">{}</title>\n<desc id=\"{id}-d\">{}</desc>\n{body}</svg>\n",
        escape(title),
        escape(desc)
    )
}

/// A label; `anchor` is SVG's: start, middle or end.
fn label(class: &str, anchor: &str, [x, y]: [f64; 2], text: &str) -> String {
    format!(
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>\n",
        escape(text)
    )
}

/// The labels under a horizontal axis, each in the middle of its place and inside `width`; one that would touch the label before it is
/// left out, its line in the grid is not.
fn tick_row(ticks: impl Iterator<Item = (f64, String)>, width: f64, y: f64) -> String {
    let (mut row, mut end) = (String::new(), f64::NEG_INFINITY);
    for (x, text) in ticks {
        let half = text_width(&text) / 2.0;
        let x = x.min(width - half).max(half);
        if x - half >= end + CHARACTER {
            row += &label("tick", "middle", [x, y], &text);
            end = x + half;
        }
    }
    row
}

fn segment(class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) -> String {
    format!(
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_would_touch_are_left_out() {
        // Four characters of 7.7 px are 30.8 wide: at 10 the first is moved to 15.4 and ends at 30.8, so the next begins at 38.5 or later.
        let row = tick_row(
            [10.0, 53.0, 54.0, 95.0]
                .map(|x| (x, "1234".to_string()))
                .into_iter(),
            100.0,
            5.0,
        );
        let places: Vec<&str> = row
            .split(" x=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert_eq!(places, ["15.4", "54.0"]);
    }
}
