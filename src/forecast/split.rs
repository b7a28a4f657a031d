//! A model cut between a device and a server: what the halves and the link between them take.
//!
//! Blocks before the cut run on the device, the others and the head on the server. Blocks are alike, so energy is linear in the cut,
//! and the link adds a constant to every cut inside the model: all on the device or all on the server is cheapest, unless memory or a
//! rule that blocks stay forbids both. A cut protects nothing: 88 % of a prompt's tokens were recovered from hidden states
//! (arXiv:2503.09022).

use std::ops::Range;

use serde::Serialize;

use super::place::{Candidates, PlacedRow, precision};
use super::request::{RequestCost, RequestSize, resident};
use crate::energy::{Interval, OperatingPoint, Profile};
use crate::error::{Error, Kind, Result};
use crate::model::ServedShape;
use crate::text::{did_you_mean, near_matches};
use crate::units::{Bytes, Joules, Seconds};
use crate::work::Precision;

/// A link's power while it sends: `slope * rate + base`, and for a while after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Megabits per second.
    pub mbit_s: f64,
    /// Watts per megabit per second, sending.
    slope: f64,
    /// Watts.
    base: f64,
    /// How long the radio stays awake after a message, and its power meanwhile.
    tail_s: f64,
    tail_w: f64,
    /// Of a message to the server and back.
    round_trip_s: f64,
}

/// Name, usual Mbit/s, W per Mbit/s up, base W, tail s, tail W, round trip s. Power: Huang et al., MobiSys 2012, recalled; the wired
/// network 0.059 kWh a GB at most (Sustainable Web Design v4), as power at its rate; rates and round trips assumed.
const LINKS: [(&str, [f64; 6]); 4] = [
    ("lte", [10.0, 0.438_39, 1.288_04, 11.6, 1.06, 0.05]),
    ("3g", [2.0, 0.868_98, 0.817_88, 0.0, 0.0, 0.1]),
    ("wifi", [50.0, 0.283_17, 0.132_86, 0.0, 0.0, 0.005]),
    ("wired", [1000.0, 0.026_55, 0.0, 0.0, 0.0, 0.001]),
];

/// Bytes of a token id.
const ID: f64 = 4.0;
/// Bytes of the scale that a token's int8 hidden state is sent with.
const SCALE: f64 = 4.0;

impl Link {
    /// "lte", or "lte:5" for 5 Mbit/s.
    ///
    /// # Errors
    /// An unknown name, a rate that is none.
    pub fn parse(text: &str) -> Result<Link> {
        let (name, rate) = match text.split_once(':') {
            Some((name, rate)) => (name, Some(rate)),
            None => (text, None),
        };
        let names = LINKS.iter().map(|(name, _)| *name);
        let Some((name, figures)) = LINKS.iter().find(|(known, _)| *known == name) else {
            let near = near_matches(name, names);
            return Err(Error::new(Kind::Usage, "no link has this name")
                .at("--link")
                .value(text)
                .rule("`lte`, `3g`, `wifi` or `wired`, with `:RATE` in Mbit/s")
                .hint(did_you_mean(&near, "write `--link wifi` or `--link lte:5`")));
        };
        let [usual, slope, base, tail_s, tail_w, round_trip_s] = *figures;
        let rate = rate.map_or(Some(usual), |rate| rate.parse().ok());
        let rate = rate.filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
        let mbit_s = rate.ok_or_else(|| {
            Error::new(Kind::Usage, "this is no rate of a link")
                .at("--link")
                .value(text)
                .rule("a number of Mbit/s, more than zero")
                .hint("write `--link lte:5`")
        })?;
        Ok(Link {
            name: (*name).to_string(),
            mbit_s,
            slope,
            base,
            tail_s,
            tail_w,
            round_trip_s,
        })
    }

    /// Energy and time of sending `bytes` in `messages` that wait for each other.
    pub fn sending(&self, bytes: f64, messages: f64) -> CutCost {
        let seconds = bytes * 8e-6 / self.mbit_s;
        let joules = seconds * (self.slope * self.mbit_s + self.base) + self.tail_s * self.tail_w;
        CutCost {
            energy: Joules(joules),
            time: Seconds(seconds + messages * self.round_trip_s),
        }
    }
}

/// Energy and time of a cut, or of a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CutCost {
    /// Joules.
    pub energy: Joules,
    /// Seconds, one part after the other.
    pub time: Seconds,
}

impl std::ops::Add for CutCost {
    type Output = CutCost;
    fn add(self, other: CutCost) -> CutCost {
        CutCost {
            energy: self.energy + other.energy,
            time: self.time + other.time,
        }
    }
}

/// Where a model is cut.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Split {
    /// First block that the server runs; 0: all of them.
    pub first_server_block: usize,
    /// The server's profile.
    pub server: String,
    /// The link.
    pub link: String,
    /// Bytes that are sent for a request.
    pub sent_bytes: Bytes,
}

/// A device, a server and the link between them.
pub struct SplitRequest<'a> {
    /// Runs the first blocks.
    pub device: &'a Profile,
    /// Runs the others and the head.
    pub server: &'a Profile,
    /// Carries tokens, or hidden states in int8.
    pub link: &'a Link,
    /// Blocks that have to stay on the device.
    pub keep_on_device: usize,
    /// Blocks of the model.
    pub blocks: usize,
    /// The stored format's name.
    pub format: &'a str,
    /// What serves the whole model on the server.
    pub serve: String,
    /// Some blocks of the model.
    pub part: &'a dyn Fn(Precision, Range<usize>) -> ServedShape,
}

/// The rows of all on the server and of the best cut inside the model, and what they show.
pub struct SplitRows {
    /// Rows of the table.
    pub rows: Vec<PlacedRow>,
    /// Which of all on the device, all on the server and the cuts is cheapest, and why.
    pub statement: String,
}

/// Enumerates every cut of one request at a time.
pub fn splits(request: &SplitRequest<'_>, candidates: &Candidates) -> SplitRows {
    let cut = |first: usize| cut_row(request, candidates, first);
    let feasible = |row: &PlacedRow| row.feasible;
    let energy = |row: &PlacedRow| row.j_per_request.unwrap_or_default();
    let [on_server, on_device] = [cut(0), cut(request.blocks)];
    let inside = (1..request.blocks).map(cut).filter(feasible);
    let best = inside.min_by(|a, b| energy(a).0.total_cmp(&energy(b).0));
    let ends = [("the device", &on_device), ("the server", &on_server)];
    let possible = ends.into_iter().filter(|(_, row)| row.feasible);
    let cheapest = possible.min_by(|a, b| energy(a.1).0.total_cmp(&energy(b.1).0));
    let cut = match &best {
        Some(row) => format!(
            "the best cut inside the model is before block {} at {}",
            row.split
                .as_ref()
                .map_or(0, |split| split.first_server_block),
            energy(row)
        ),
        None => "no cut inside the model is feasible".to_string(),
    };
    let linear =
        "energy is linear in the cut, because blocks are alike, and the link adds a constant";
    let dearer = |end: &PlacedRow| best.as_ref().is_some_and(|cut| energy(cut) < energy(end));
    let statement = match (cheapest, &best) {
        (Some((place, end)), _) if !dearer(end) => {
            format!(
                "all on {place} is cheapest at {}: {linear}; {cut}",
                energy(end)
            )
        }
        (_, Some(_)) => {
            let (place, forbidden) = if on_server.feasible {
                ("the device", &on_device)
            } else {
                ("the server", &on_server)
            };
            let reason = forbidden.reason.as_deref().unwrap_or("it is not feasible");
            format!(
                "all on {place} is ruled out ({reason}), else an end would be cheapest: {linear}; {cut}"
            )
        }
        (_, None) => "nothing is feasible: a device with more memory or a later deadline is needed"
            .to_string(),
    };
    let statement = statement + ". A cut hides nothing from the server";
    SplitRows {
        rows: [on_server].into_iter().chain(best).collect(),
        statement,
    }
}

/// One cut: the device's blocks, the link, the server's.
fn cut_row(request: &SplitRequest<'_>, candidates: &Candidates, first: usize) -> PlacedRow {
    let size = RequestSize {
        prompt: candidates.prompt,
        generated: candidates.generated,
        batch: 1,
    };
    let part = |profile: &Profile, blocks: Range<usize>| {
        let shape = (request.part)(precision(profile), blocks);
        let cost = RequestCost::new(profile, &shape, size);
        let cost = CutCost {
            energy: cost.energy(),
            time: cost.latency(),
        };
        (cost, resident(&shape, size))
    };
    let (device, on_device) = part(request.device, 0..first);
    let (server, on_server) = part(request.server, first..request.blocks);
    let hidden = (request.part)(Precision::F32, 0..0).hidden_size as f64 + SCALE;
    let [prompt, generated] = [size.prompt, size.generated].map(|tokens| tokens as f64);
    let cost = match first {
        _ if first == request.blocks => (device, 0.0),
        0 => (server, ID * (prompt + generated)),
        _ => (
            device + server,
            hidden * (prompt + generated - 1.0) + ID * generated,
        ),
    };
    let (parts, sent) = cost;
    let round_trips = if first == 0 { 1.0 } else { generated };
    let total = if first == request.blocks {
        parts
    } else {
        parts + request.link.sending(sent, round_trips)
    };
    let mut row = PlacedRow {
        device: request.device.name.clone(),
        operating_point: OperatingPoint::None,
        format: request.format.to_string(),
        batch: 1,
        split: (first < request.blocks).then(|| Split {
            first_server_block: first,
            server: request.server.name.clone(),
            link: request.link.name.clone(),
            sent_bytes: Bytes(sent as u64),
        }),
        j_per_request: Some(total.energy),
        j_per_token: Some(Interval::counted(total.energy).map(|joules| joules / generated)),
        latency_s: Some(total.time),
        memory_bytes: if first == 0 { Bytes(0) } else { on_device },
        feasible: true,
        reason: None,
        command: (first == 0).then(|| request.serve.clone()),
    };
    let memory = request.device.memory.or(Some(Bytes(u64::MAX)));
    row.check(memory, candidates);
    let full = request
        .server
        .memory
        .filter(|memory| first < request.blocks && on_server > *memory);
    if let Some(memory) = full {
        row.feasible = false;
        row.reason = Some(format!("{on_server} do not fit the server's {memory}"));
    }
    if first < request.keep_on_device.min(request.blocks) {
        row.feasible = false;
        row.reason = Some(format!(
            "the first {} blocks have to stay on the device",
            request.keep_on_device
        ));
    }
    row
}

/// Index of the cheapest of `costs`, the cost of each cut from all on the server to all on the device.
pub fn best_cut(costs: &[CutCost]) -> Option<usize> {
    let each = costs.iter().enumerate();
    let least = each.min_by(|a, b| a.1.energy.0.total_cmp(&b.1.energy.0));
    least.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Hao et al. (arXiv:2205.11854; Hao840/MAHPPO at f08b11e8), Jetson Nano: seconds and joules of the device up to each split point,
    /// bits sent, and total milliseconds and millijoules at 1 W and 50 m, as printed.
    type Point = [f64; 5];
    const VGG11: [Point; 6] = [
        [0.0, 0.0, 1_204_224.0, 92.88, 92.88],
        [0.015589, 0.034358, 200_704.0, 31.07, 49.84],
        [0.045, 0.118548, 100_352.0, 52.74, 126.29],
        [0.100595, 0.287883, 50_176.0, 104.46, 291.75],
        [0.136817, 0.415075, 25_088.0, 138.75, 417.01],
        [0.1893, 0.488299, 0.0, 189.3, 488.3],
    ];
    const RESNET18: [Point; 6] = [
        [0.0, 0.0, 1_204_224.0, 92.88, 92.88],
        [0.004359, 0.009976, 100_352.0, 12.1, 17.72],
        [0.01647, 0.043362, 50_176.0, 20.34, 47.23],
        [0.025477, 0.073412, 25_088.0, 27.41, 75.35],
        [0.03678, 0.110818, 25_088.0, 38.71, 112.75],
        [0.045887, 0.098446, 0.0, 45.89, 98.45],
    ];

    /// A radio of `watts` at `metres`: 1e6 log2(1 + (P / d^3) / 1e-9) bits a second.
    fn radio(watts: f64, metres: f64) -> Link {
        Link {
            name: "radio".into(),
            mbit_s: (1.0 + watts / metres.powi(3) / 1e-9).log2(),
            slope: 0.0,
            base: watts,
            tail_s: 0.0,
            tail_w: 0.0,
            round_trip_s: 0.0,
        }
    }

    #[test]
    fn published_split_points_are_exact_to_the_printed_digit() {
        let link = radio(1.0, 50.0);
        assert!((link.mbit_s - 12.966).abs() < 5e-4, "{}", link.mbit_s);
        for points in [VGG11, RESNET18] {
            let costs = points.map(|[time, energy, bits, ms, mj]| {
                let own = CutCost {
                    energy: Joules(energy),
                    time: Seconds(time),
                };
                let total = own + link.sending(bits / 8.0, 1.0);
                assert!((total.time.0 * 1e3 - ms).abs() <= 0.0051, "{total:?}, {ms}");
                assert!(
                    (total.energy.0 * 1e3 - mj).abs() <= 0.0051,
                    "{total:?}, {mj}"
                );
                total
            });
            assert_eq!(best_cut(&costs), Some(1));
        }
    }

    #[test]
    fn a_radio_that_stays_awake_costs_more_than_the_bytes() {
        // 1,152 bytes over LTE at 10 Mbit/s: 9216 bits / 1e7 x (4.3839 + 1.28804) W = 5.227 mJ; the tail 11.6 s x 1.06 W = 12.296 J.
        let sent = Link::parse("lte").unwrap().sending(1152.0, 1.0).energy;
        assert!((sent.0 - 12.296 - 0.005_227).abs() < 1e-6, "{sent}");
        for bad in ["lan", "lte:0", "lte:x", "wifi:-1"] {
            assert!(Link::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        /// Of blocks that are alike no cut inside is cheaper than both ends.
        #[test]
        fn a_cut_of_equal_blocks_is_cheapest_at_an_end(
            blocks in 2usize..100,
            on_device in 1e-3..1e3f64,
            on_server in 1e-3..1e3f64,
            head in 0.0..10.0f64,
            hidden in 0.0..1e6f64,
            ids in 0.0..1.0f64,
        ) {
            let link = Link::parse("wifi").unwrap();
            let part = |joules: f64| CutCost { energy: Joules(joules), time: Seconds(0.0) };
            let cost = |first: usize| {
                let last = blocks - first;
                let halves = part(on_device * first as f64) + part(on_server * last as f64);
                match first {
                    0 => halves + part(on_server * head) + link.sending(ids * hidden, 1.0),
                    _ if last == 0 => halves + part(on_device * head),
                    _ => halves + part(on_server * head) + link.sending(hidden, 1.0),
                }
            };
            let costs: Vec<CutCost> = (0..=blocks).map(cost).collect();
            let ends = costs[0].energy.min(costs[blocks].energy);
            let inside = costs[1..blocks].iter().map(|cost| cost.energy);
            prop_assert!(inside.reduce(Joules::min).unwrap().0 >= ends.0 * (1.0 - 1e-12));
        }
    }
}
