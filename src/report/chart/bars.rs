//! Bars along one axis, each under its name and value.
//!
//! Owns the bars' places and lengths. Takes named values, returns an SVG. Each bar's figure is written out beside its name, since
//! on a logarithmic axis a length alone misleads. A value without a place has its name and figure and no bar. Knows nothing of runs.

use super::{Axis, label, picture, segment, text_width, tick_row};

/// Pixels a bar takes with its text, how far down in it the bar begins, and the bar's own height.
const ROW: f64 = 42.0;
const BAR_TOP: f64 = 20.0;
const BAR: f64 = 14.0;
/// Pixels between two ticks.
const TICK: f64 = 80.0;
/// Names and figures are set larger than ticks, by this much.
const LARGER: f64 = 1.15;
/// Pixels between a name and a figure below it.
const STACKED: f64 = 17.0;

/// One bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What it stands for.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// Its value as a person reads it.
    pub figure: String,
    /// Its class, which the page colours.
    pub class: &'static str,
    /// From where to where its value may lie.
    pub span: Option<[f64; 2]>,
}

/// Several bars.
#[derive(Debug, Clone)]
pub struct Bars {
    /// The picture's name.
    pub title: String,
    /// What it shows, in words.
    pub desc: String,
    /// Along the bottom; its low end is where bars begin.
    pub axis: Axis,
    /// From the top.
    pub bars: Vec<Bar>,
}

impl Bars {
    /// The picture, `width` pixels wide; `id` is unique on its page.
    pub fn svg(&self, id: &str, width: f64) -> String {
        let (left, right) = (2.0, width - 14.0);
        let ticks = self.axis.ticks((width / TICK) as usize);
        // Where one name and its figure do not fit side by side, every figure stands below its name.
        let tight = |bar: &Bar| {
            (text_width(&bar.name) + text_width(&bar.figure)) * LARGER > right - left - 8.0
        };
        let lower = if self.bars.iter().any(tight) {
            STACKED
        } else {
            0.0
        };
        let (row, anchor, figure_x) = (
            ROW + lower,
            if lower > 0.0 { "start" } else { "end" },
            if lower > 0.0 { left } else { right },
        );
        let foot = self.bars.len() as f64 * row + 4.0;
        let mut body = String::new();
        let places: Vec<(f64, String)> = ticks
            .marks
            .iter()
            .filter_map(|mark| {
                Some((
                    left + ticks.place(*mark)? * (right - left),
                    (self.axis.form)(*mark),
                ))
            })
            .collect();
        body.extend(
            places
                .iter()
                .map(|(x, _)| segment("grid", [*x, 0.0], [*x, foot + 4.0])),
        );
        body += &tick_row(places.into_iter(), width, foot + 18.0);
        for (index, bar) in self.bars.iter().enumerate() {
            let top = index as f64 * row;
            body += &label("name", "start", [left, top + 14.0], &bar.name);
            body += &label("value", anchor, [figure_x, top + 14.0 + lower], &bar.figure);
            let length = ticks
                .place(bar.value)
                .map_or(0.0, |place| place * (right - left));
            body += &format!(
                "<rect class=\"bar {}\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{BAR:.1}\"/>\n",
                bar.class,
                top + lower + BAR_TOP
            );
            let place = |value: f64| {
                ticks
                    .place(value)
                    .map(|place| left + place * (right - left))
            };
            if let Some((low, high)) = bar.span.and_then(|[low, high]| place(low).zip(place(high)))
            {
                let middle = top + lower + BAR_TOP + BAR / 2.0;
                body += &segment("span", [low, middle], [high, middle]);
                body += &[low, high]
                    .map(|x| segment("span", [x, middle - 4.0], [x, middle + 4.0]))
                    .concat();
            }
        }
        body += &label("axis", "end", [right, foot + 36.0], &self.axis.label);
        picture(id, &self.title, &self.desc, [width, foot + 40.0], &body)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Scale;
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_value_says() {
        let bar = |name: &str, value| Bar {
            name: name.to_string(),
            value,
            figure: format!("{value} J"),
            class: "a",
            span: None,
        };
        let axis = Axis::over("energy", Scale::Log, |v| v.to_string(), [1.0, 100.0]).unwrap();
        let bars = vec![bar("one", 10.0), bar("<two>", 100.0), bar("none", 0.0)];
        let svg = Bars {
            title: String::new(),
            desc: String::new(),
            axis,
            bars,
        }
        .svg("b", 216.0);
        // 200 px for two decades.
        let lengths: Vec<&str> = svg
            .split("<rect")
            .skip(1)
            .map(|bar| bar.split('"').nth(7).unwrap())
            .collect();
        assert_eq!(lengths, ["100.0", "200.0", "0.0"]);
        assert!(svg.contains("&lt;two&gt;") && !svg.contains("<two>"));
        // From 1 to 10 on two decades of 200 px: the left half.
        let spanned = Bar {
            span: Some([1.0, 10.0]),
            ..bar("one", 5.0)
        };
        let axis = Axis::over("energy", Scale::Log, |v| v.to_string(), [1.0, 100.0]).unwrap();
        let svg = Bars {
            title: String::new(),
            desc: String::new(),
            axis,
            bars: vec![spanned],
        }
        .svg("b", 216.0);
        assert!(
            svg.contains("<line class=\"span\" x1=\"2.0\" y1=\"27.0\" x2=\"102.0\" y2=\"27.0\"/>"),
            "{svg}"
        );
        // A name of 22 characters takes 22 x 7.7 x 1.15 = 195 px of 200: its figure goes below.
        let axis = Axis::over("energy", Scale::Linear, |v| v.to_string(), [0.0, 100.0]).unwrap();
        let bars = vec![bar("a name of 22 character", 10.0)];
        let svg = Bars {
            title: String::new(),
            desc: String::new(),
            axis,
            bars,
        }
        .svg("b", 216.0);
        assert!(
            svg.contains("text-anchor=\"start\" x=\"2.0\" y=\"31.0\">10 J<"),
            "{svg}"
        );
    }
}
