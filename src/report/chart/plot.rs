//! Plots as SVG: lines, marks, bands and limits over two axes.
//!
//! Owns geometry and SVG text; colours and fonts are the page's, by class names. A value that is not finite, or has no position
//! on a logarithmic axis, interrupts its line. Lines, marks, bands and limits differ in form, not in colour alone. Knows nothing
//! of runs.

use super::axis::{Axis, Ticks};
use crate::report::templates::escape;

/// Height of a line of labels, in pixels.
const LINE: f64 = 16.0;
/// Pixels between two ticks of the horizontal axis, and of the vertical one.
const TICK_X: f64 = 65.0;
const TICK_Y: f64 = 36.0;

/// One marked value.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// Position.
    pub at: [f64; 2],
    /// Tooltip.
    pub tooltip: String,
    /// Text next to it.
    pub label: Option<String>,
}

/// Form of a series.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// A line through the points.
    Line(Vec<[f64; 2]>),
    /// Diamonds.
    Marks(Vec<Mark>),
    /// The area between two values, as [x, low, high].
    Band(Vec<[f64; 3]>),
}

/// A series.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Legend entry; empty: none.
    pub name: String,
    /// CSS class.
    pub class: &'static str,
    /// Its form.
    pub shape: Shape,
}

impl Series {
    /// A series.
    pub fn new(name: &str, class: &'static str, shape: Shape) -> Self {
        let name = name.to_string();
        Self { name, class, shape }
    }

    /// Its points, for axis ranges.
    pub fn points(&self) -> Vec<[f64; 2]> {
        match &self.shape {
            Shape::Line(points) => points.clone(),
            Shape::Marks(marks) => marks.iter().map(|mark| mark.at).collect(),
            Shape::Band(edges) => edges
                .iter()
                .flat_map(|[x, low, high]| [[*x, *low], [*x, *high]])
                .collect(),
        }
    }

    /// Last value of a line; `None` for any other form.
    pub fn end(&self) -> Option<f64> {
        match &self.shape {
            Shape::Line(points) => points.last().map(|[_, y]| *y).filter(|y| y.is_finite()),
            Shape::Marks(_) | Shape::Band(_) => None,
        }
    }
}

/// A limit across the plot.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// At a value of the horizontal axis.
    X(f64, String),
    /// At a value of the vertical axis.
    Y(f64, String),
}

/// Series and limits over two axes.
#[derive(Debug, Clone)]
pub struct Plot {
    /// SVG title.
    pub title: String,
    /// SVG description.
    pub desc: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// In drawing order.
    pub series: Vec<Series>,
    /// Below the series.
    pub rules: Vec<Rule>,
    /// In pixels.
    pub height: f64,
}

/// The plot's inner area in pixels, and the axes' ticks.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: Ticks,
    y: Ticks,
}

impl Frame {
    fn x(&self, value: f64) -> Option<f64> {
        Some(self.left + self.x.position(value)? * (self.right - self.left))
    }

    fn y(&self, value: f64) -> Option<f64> {
        Some(self.bottom - self.y.position(value)? * (self.bottom - self.top))
    }

    fn point(&self, [x, y]: [f64; 2]) -> Option<[f64; 2]> {
        Some([self.x(x)?, self.y(y)?])
    }
}

impl Plot {
    /// SVG of `width` pixels; `id` is unique on its page.
    pub fn svg(&self, id: &str, width: f64) -> String {
        let frame = self.frame(width);
        let mut body = self.grid(&frame);
        body.extend(self.rules.iter().map(|rule| draw_rule(&frame, rule)));
        body.extend(self.series.iter().map(|series| draw(&frame, series)));
        svg_element(id, &self.title, &self.desc, [width, self.height], &body)
    }

    /// The left margin holds the widest vertical label, at least seven characters, so that stacked plots align.
    fn frame(&self, width: f64) -> Frame {
        let top = LINE + 8.0;
        let bottom = self.height - 2.0 * LINE - 6.0;
        let y = self.y.ticks(((bottom - top) / TICK_Y) as usize);
        let widest = y
            .marks
            .iter()
            .map(|mark| text_width(&(self.y.form)(*mark)))
            .fold(text_width("0000000"), f64::max);
        let left = widest + 8.0;
        let right = width - 14.0;
        Frame {
            left,
            right,
            top,
            bottom,
            x: self.x.ticks(((right - left) / TICK_X) as usize),
            y,
        }
    }

    fn grid(&self, frame: &Frame) -> String {
        let mut body = label("axis", "start", [0.0, 12.0], &self.y.label);
        body += &label(
            "axis",
            "end",
            [frame.right, self.height - 4.0],
            &self.x.label,
        );
        for mark in &frame.y.marks {
            let Some(y) = frame.y(*mark) else { continue };
            body += &segment("grid", [frame.left, y], [frame.right, y]);
            body += &label(
                "tick",
                "end",
                [frame.left - 6.0, y + 4.0],
                &(self.y.form)(*mark),
            );
        }
        let ticks: Vec<(f64, String)> = frame
            .x
            .marks
            .iter()
            .filter_map(|mark| Some((frame.x(*mark)?, (self.x.form)(*mark))))
            .collect();
        body.extend(
            ticks
                .iter()
                .map(|(x, _)| segment("grid", [*x, frame.bottom], [*x, frame.bottom + 4.0])),
        );
        // The last label ends with the picture.
        body += &tick_row(ticks.into_iter(), frame.right + 13.0, frame.bottom + LINE);
        body + &segment(
            "base",
            [frame.left, frame.bottom],
            [frame.right, frame.bottom],
        )
    }
}

fn draw_rule(frame: &Frame, rule: &Rule) -> String {
    let drawn = match rule {
        Rule::X(at, text) => frame.x(*at).map(|x| {
            let (anchor, text_x) = if x > (frame.left + frame.right) / 2.0 {
                ("end", x - 5.0)
            } else {
                ("start", x + 5.0)
            };
            let line = segment("rule", [x, frame.top - 4.0], [x, frame.bottom]);
            line + &label("limit", anchor, [text_x, frame.top + 8.0], text)
        }),
        Rule::Y(at, text) => frame.y(*at).map(|y| {
            // Under the line where the axis's name stands above it.
            let baseline = if y < frame.top + LINE {
                y + 14.0
            } else {
                y - 5.0
            };
            segment("rule", [frame.left, y], [frame.right, y])
                + &label("limit", "start", [frame.left + 5.0, baseline], text)
        }),
    };
    drawn.unwrap_or_default()
}

fn draw(frame: &Frame, series: &Series) -> String {
    let class = series.class;
    match &series.shape {
        Shape::Line(points) => format!(
            "<path class=\"line {class}\" d=\"{}\"/>\n",
            path(points.iter().map(|p| frame.point(*p)))
        ),
        Shape::Marks(marks) => marks
            .iter()
            .filter_map(|mark| draw_mark(frame, class, mark))
            .collect(),
        Shape::Band(edges) => {
            let high = edges.iter().map(|[x, _, high]| frame.point([*x, *high]));
            let low = edges
                .iter()
                .rev()
                .map(|[x, low, _]| frame.point([*x, *low]));
            let outline: Vec<_> = high.chain(low).flatten().map(Some).collect();
            format!(
                "<path class=\"band {class}\" d=\"{}Z\"/>\n",
                path(outline.into_iter())
            )
        }
    }
}

fn draw_mark(frame: &Frame, class: &str, mark: &Mark) -> Option<String> {
    let [x, y] = frame.point(mark.at)?;
    let diamond = format!(
        "<path class=\"mark {class}\" d=\"M{x:.1} {:.1}l5 5l-5 5l-5 -5z\"><title>{}</title></path>\n",
        y - 5.0,
        escape(&mark.tooltip)
    );
    let text = mark.label.as_ref().map(|text| {
        let (anchor, x) = if x > (frame.left + frame.right) / 2.0 {
            ("end", x - 8.0)
        } else {
            ("start", x + 9.0)
        };
        label("value", anchor, [x, (y - 8.0).max(frame.top + 8.0)], text)
    });
    Some(diamond + &text.unwrap_or_default())
}

/// SVG path data; a point without a position starts a new segment.
fn path(points: impl Iterator<Item = Option<[f64; 2]>>) -> String {
    let (mut data, mut down) = (String::new(), false);
    for point in points {
        if let Some([x, y]) = point {
            data += &format!("{}{x:.1} {y:.1}", if down { 'L' } else { 'M' });
        }
        down = point.is_some();
    }
    data
}

/// Width in pixels of a character of 12 px in the widest likely font (DejaVu Sans, 0.636 em).
const CHARACTER: f64 = 7.7;

/// Width of a label in pixels.
fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// An SVG of `width` by `height` pixels with title and description. `id` is unique on its page.
fn svg_element(id: &str, title: &str, desc: &str, [width, height]: [f64; 2], body: &str) -> String {
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

/// The labels under a horizontal axis, centred at their ticks and inside `width`; one that would touch the label before it is left out.
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
    use crate::report::chart::Scale;

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

    fn plot(series: Vec<Series>, rules: Vec<Rule>) -> Plot {
        let axis =
            |label: &str| Axis::over(label, Scale::Linear, |v| v.to_string(), [0.0, 10.0]).unwrap();
        let title = "a <title>".to_string();
        let desc = "what \"it\" shows".to_string();
        Plot {
            title,
            desc,
            x: axis("across"),
            y: axis("up"),
            series,
            rules,
            height: 200.0,
        }
    }

    #[test]
    fn points_lie_where_the_axes_say() {
        // Left edge: seven characters of 7.7 px and 8 px; right: 14 px from 300; top 16 + 8; bottom 200 - 2 x 16 - 6.
        let line = Shape::Line(vec![[0.0, 0.0], [10.0, 10.0]]);
        let svg = plot(
            vec![Series {
                name: String::new(),
                class: "a",
                shape: line,
            }],
            Vec::new(),
        )
        .svg("p", 300.0);
        assert!(
            svg.contains("<path class=\"line a\" d=\"M61.9 162.0L286.0 24.0\"/>"),
            "{svg}"
        );
        let svg = plot(Vec::new(), vec![Rule::Y(5.0, "half & half".to_string())]).svg("p", 300.0);
        assert!(
            svg.contains("<line class=\"rule\" x1=\"61.9\" y1=\"93.0\" x2=\"286.0\" y2=\"93.0\"/>"),
            "{svg}"
        );
        assert!(
            svg.contains(">half &amp; half<") && svg.contains(">a &lt;title&gt;<"),
            "{svg}"
        );
    }

    #[test]
    fn a_limit_at_the_top_has_its_name_below() {
        // The line of 10 lies on the top edge, 24 px down, where the axis's name ends; that of 5 at 93 px has room above.
        for (at, baseline) in [(10.0, "38.0"), (5.0, "88.0")] {
            let svg = plot(Vec::new(), vec![Rule::Y(at, "the limit".to_string())]).svg("p", 300.0);
            let text = svg
                .lines()
                .find(|line| line.contains(">the limit<"))
                .unwrap();
            assert!(text.contains(&format!("y=\"{baseline}\"")), "{text}");
        }
    }

    #[test]
    fn values_that_are_not_finite_interrupt_the_line() {
        let broken = [Some([1.0, 2.0]), None, Some([3.0, 4.0]), Some([5.0, 6.0])];
        assert_eq!(path(broken.into_iter()), "M1.0 2.0M3.0 4.0L5.0 6.0");
        let line = Shape::Line(vec![[0.0, f64::NAN], [f64::INFINITY, 1.0]]);
        let svg = plot(
            vec![Series {
                name: String::new(),
                class: "a",
                shape: line,
            }],
            Vec::new(),
        )
        .svg("p", 300.0);
        assert!(
            svg.contains("d=\"\"") && !svg.contains("NaN") && !svg.contains("inf"),
            "{svg}"
        );
    }
}
