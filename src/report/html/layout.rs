//! How a page is laid out: the document around it, figures with their legends, tables, lists.
//!
//! Owns the HTML of every block and the one style. Takes blocks and figures, returns markup in which every text is escaped. Refuses
//! scripts and anything that would be loaded: the document's own policy forbids both. Knows nothing of what is shown.

use super::figures::{Chart, Figure};
use crate::report::markup::{escape, inline};
use crate::report::page::Block;
use crate::report::table::Table;

/// The page's only style: colours for light, dark and print, and the charts' classes.
const STYLE: &str = include_str!("style.css");

/// Widths in pixels that a chart is drawn for: a desk and a phone.
pub const FULL: [(&str, f64); 2] = [("wide", 760.0), ("narrow", 340.0)];
/// Half of a desk, or a phone.
pub const HALF: [(&str, f64); 1] = [("half", 370.0)];

/// The whole document; `title` and `version` are plain texts, `body` and `footer` are markup.
pub fn document(title: &str, body: &str, footer: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         <footer>{footer}</footer>\n</body>\n</html>\n"
    )
}

/// A section under its heading.
pub fn section(title: &str, body: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n{body}</section>\n", escape(title))
}

/// A figure with its legend and caption, drawn for each of `widths`; the style shows the one that fits.
pub fn figure_html(figure: &Figure, widths: &[(&str, f64)]) -> String {
    let drawn = widths.iter().map(|(class, width)| {
        let id = format!("{}-{class}", figure.id);
        let svg = match &figure.chart {
            Chart::Plot(plot) => plot.svg(&id, *width),
            Chart::Bars(bars) => bars.svg(&id, *width),
        };
        format!("<div class=\"chart {class}\">{svg}</div>\n")
    });
    let key = |(form, class, name): &(&str, &str, String)| {
        format!("<li class=\"key {form} {class}\">{}</li>\n", escape(name))
    };
    let legend = match figure.legend.len() {
        0 | 1 => String::new(),
        _ => format!(
            "<ul class=\"legend\">\n{}</ul>\n",
            figure.legend.iter().map(key).collect::<String>()
        ),
    };
    let caption = match figure.caption.as_str() {
        "" => String::new(),
        text => format!("<figcaption>{}</figcaption>\n", inline(text)),
    };
    format!(
        "<figure>\n{legend}{}{caption}</figure>\n",
        drawn.collect::<String>()
    )
}

/// One block of a section.
pub fn block(block: Block) -> String {
    match block {
        Block::Paragraph(text) => format!("<p>{}</p>\n", inline(&text)),
        Block::Table(table) => table_html(&table),
        Block::Bullets(items) => {
            let items: String = items
                .iter()
                .map(|item| format!("<li>{}</li>\n", inline(item)))
                .collect();
            format!("<ul>\n{items}</ul>\n")
        }
        Block::Verbatim(caption, text) => {
            format!(
                "<p class=\"caption\">{}</p>\n<pre dir=\"auto\">{}</pre>\n",
                escape(caption),
                escape(text.trim_end_matches('\n'))
            )
        }
    }
}

/// A table of more than three columns has, in each cell, the name of its column: on a phone every row becomes a list of its own.
fn table_html(table: &Table) -> String {
    let head: String = table
        .head()
        .iter()
        .map(|name| format!("<th scope=\"col\">{}</th>", inline(name)))
        .collect();
    let many = table.head().len() > 3;
    let cell = |(index, cell): (usize, &String)| match (index, many) {
        (0, _) => format!("<th scope=\"row\">{}</th>", unbroken(&inline(cell))),
        (_, true) => format!(
            "<td data-head=\"{}\">{}</td>",
            escape(&table.head()[index]),
            unbroken(&inline(cell))
        ),
        (_, false) => format!("<td>{}</td>", unbroken(&inline(cell))),
    };
    let row = |row: &Vec<String>| {
        format!(
            "<tr>{}</tr>\n",
            row.iter().enumerate().map(cell).collect::<String>()
        )
    };
    let class = if many { "table many" } else { "table" };
    let rows: String = table.rows().iter().map(row).collect();
    format!(
        "<div class=\"{class}\" tabindex=\"0\">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )
}

/// No line ends between a number and its unit: a short word that is not one of the sentence.
fn unbroken(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (index, word) in text.split(' ').enumerate() {
        let unit = word.starts_with(|c: char| c.is_alphabetic() || c == '%')
            && !["and", "to", "of", "on", "in", "at"].contains(&word);
        let joined = unit && out.ends_with(|c: char| c.is_ascii_digit());
        out += if index == 0 {
            ""
        } else if joined {
            "\u{a0}"
        } else {
            " "
        };
        out += word;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_keeps_its_unit() {
        assert_eq!(
            unbroken("64.73 J (17.98 mWh), 85.2 %"),
            "64.73\u{a0}J (17.98\u{a0}mWh), 85.2\u{a0}%"
        );
        assert_eq!(unbroken("between 2 and 3"), "between 2 and 3");
        assert_eq!(unbroken("a b"), "a b");
    }
}
