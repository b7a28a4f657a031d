//! Placement: energy, latency and memory of a request on every device, operating point, format and batch, enumerated exactly.
//!
//! Takes the served shapes of a model by stored format and the candidates, returns one [`PlacedRow`] for each combination, the Pareto
//! set of joules and latency, and the cheapest feasible row by deadline and batch. Every figure is counted on the device alone, without
//! the machine around it. A learner that places requests by trial (AutoScale, MICRO 2020) approximates this table.

use serde::Serialize;

use super::request::{RequestCost, RequestSize, resident};
use super::split::Split;
use crate::energy::operating_point::{COMPUTE_BOUND, MEMORY_BOUND};
use crate::energy::{Interval, OperatingPoint, Profile, Scaling};
use crate::error::Result;
use crate::model::ServedShape;
use crate::units::{Bytes, Joules, Seconds, Watts};
use crate::work::Precision;

/// What is enumerated.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Devices.
    pub devices: Vec<Profile>,
    /// Operating points; one that a device does not take gives an infeasible row.
    pub operating_points: Vec<OperatingPoint>,
    /// Batches.
    pub batches: Vec<usize>,
    /// Tokens of a request's prompt.
    pub prompt: usize,
    /// Tokens of its answer.
    pub generated: usize,
    /// Longest latencies of a request.
    pub deadlines: Vec<Seconds>,
}

/// A model in one stored format.
pub struct StoredModel<'a> {
    /// The format's name.
    pub format: String,
    /// The shape for products in a precision.
    pub shape: &'a dyn Fn(Precision) -> ServedShape,
    /// What serves it on a device: a command line.
    pub serve: &'a dyn Fn(&Profile, usize) -> String,
}

/// One combination.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlacedRow {
    /// Name of the device profile.
    pub device: String,
    /// Limit of power or clock.
    pub operating_point: OperatingPoint,
    /// Stored format of the weights.
    pub format: String,
    /// Requests that run together.
    pub batch: usize,
    /// Where the model is cut; `None`: all of it on the device.
    pub split: Option<Split>,
    /// Energy of a request, of all devices and links.
    pub j_per_request: Option<Joules>,
    /// Energy of a generated token, its share of the prompt included.
    pub j_per_token: Option<Interval<Joules>>,
    /// From the prompt to the last token.
    pub latency_s: Option<Seconds>,
    /// Weights, keys and values.
    pub memory_bytes: Bytes,
    /// Whether it fits the memory and the latest deadline.
    pub feasible: bool,
    /// Why it is not feasible, or what is not known.
    pub reason: Option<String>,
    /// What runs it.
    pub command: Option<String>,
}

/// The cheapest feasible row for a deadline and a load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cheapest {
    /// `None`: any latency.
    pub deadline_s: Option<Seconds>,
    /// Requests that run together.
    pub batch: usize,
    /// Its index among the rows; `None` where nothing is feasible.
    pub row: Option<usize>,
}

/// Every combination, and what to take of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Placement {
    /// The model's name.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// Tokens of a request's prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer.
    pub generated_tokens: usize,
    /// Whose energy is counted.
    pub scope: &'static str,
    /// All rows.
    pub rows: Vec<PlacedRow>,
    /// Indices of the rows that no feasible row beats in both energy and latency.
    pub pareto: Vec<usize>,
    /// The cheapest feasible row by deadline and batch.
    pub cheapest: Vec<Cheapest>,
    /// What the cuts of each device and format show.
    pub splits: Vec<String>,
    /// What has to hold for it.
    pub assumptions: Vec<String>,
}

impl Placement {
    /// Of these rows.
    pub fn new(
        model: String,
        parameters: u64,
        rows: Vec<PlacedRow>,
        candidates: &Candidates,
        splits: Vec<String>,
    ) -> Self {
        let mut assumptions = vec![
            "counted on device profiles, not measured: energy of the device alone, without the machine around it".to_string(),
            "every weight and every cached key is read once a step; activations, norms and softmax are left out".to_string(),
            "a batch starts and ends together; batches above 64 take longer than counted (published measurements: 16 % more energy up to 128)".to_string(),
            "an operating point saves between nothing and what is shown: the power without a limit is the roofline's".to_string(),
        ];
        if !splits.is_empty() {
            assumptions.push("links: power of Huang et al. (MobiSys 2012), recalled; rates and round trips assumed; hidden states sent in int8".into());
        }
        Self {
            model,
            parameters,
            prompt_tokens: candidates.prompt,
            generated_tokens: candidates.generated,
            scope: "device",
            pareto: pareto(&rows),
            cheapest: cheapest(&rows, candidates),
            rows,
            splits,
            assumptions,
        }
    }
}

/// The rows of every combination of `models` and `candidates`, devices first.
pub fn place(models: &[StoredModel<'_>], candidates: &Candidates) -> Vec<PlacedRow> {
    let mut rows = Vec::new();
    for device in &candidates.devices {
        for model in models {
            let shape = (model.shape)(precision(device));
            for batch in &candidates.batches {
                let size = RequestSize {
                    prompt: candidates.prompt,
                    generated: candidates.generated,
                    batch: *batch,
                };
                let cost = RequestCost::new(device, &shape, size);
                let serve = (model.serve)(device, *batch);
                let row = |point: &OperatingPoint| PlacedRow {
                    device: device.name.clone(),
                    operating_point: *point,
                    format: model.format.clone(),
                    batch: *batch,
                    split: None,
                    j_per_request: None,
                    j_per_token: None,
                    latency_s: None,
                    memory_bytes: resident(&shape, size),
                    feasible: false,
                    reason: None,
                    command: Some(command(*point, device, &serve)),
                };
                let points = candidates.operating_points.iter();
                rows.extend(
                    points.map(|point| row(point).at_point(device, &cost, size, candidates)),
                );
            }
        }
    }
    rows
}

/// Type of a device's matrix products: its fastest of 16 bits, else f32.
pub fn precision(device: &Profile) -> Precision {
    let has = |precision: &Precision| device.peak_flops.contains_key(precision);
    let types = [Precision::Bf16, Precision::F16];
    types.into_iter().find(has).unwrap_or(Precision::F32)
}

fn command(point: OperatingPoint, device: &Profile, serve: &str) -> String {
    match point.command(device) {
        Some(set) => format!("{set} && {serve}"),
        None => serve.to_string(),
    }
}

impl PlacedRow {
    fn at_point(
        mut self,
        device: &Profile,
        cost: &RequestCost,
        size: RequestSize,
        candidates: &Candidates,
    ) -> Self {
        match scaled(device, self.operating_point, cost) {
            Ok((energy, latency)) => {
                let tokens = size.generated as f64;
                // The power without a limit is the roofline's: what a limit saves lies between nothing and this.
                let unlimited = Interval::counted(cost.energy());
                self.j_per_request = Some(energy);
                self.j_per_token = Some(
                    Interval {
                        low: Interval::counted(energy).low,
                        central: energy,
                        high: unlimited.high,
                    }
                    .map(|joules| joules / tokens),
                );
                self.latency_s = Some(latency);
                self.check(device.memory, candidates);
            }
            Err(error) => self.reason = Some(error.what().to_string()),
        }
        self
    }

    /// Decides whether the row fits the device's `memory` and the latest deadline.
    pub(super) fn check(&mut self, memory: Option<Bytes>, candidates: &Candidates) {
        let latest = candidates.deadlines.iter().copied().reduce(Seconds::max);
        let late = latest.filter(|latest| self.latency_s.is_some_and(|time| time > *latest));
        let full = memory.filter(|memory| self.memory_bytes > *memory);
        self.feasible = late.is_none() && full.is_none();
        self.reason = match (full, late, memory) {
            (Some(memory), ..) => Some(format!(
                "{} of weights and cache do not fit {memory}",
                self.memory_bytes
            )),
            (None, Some(latest), _) => Some(format!("later than {}", latest.spoken())),
            (None, None, None) => Some("the device's memory is not known".to_string()),
            _ => None,
        };
    }

    fn meets(&self, deadline: Option<Seconds>) -> bool {
        deadline.is_none_or(|deadline| self.latency_s.is_some_and(|time| time <= deadline))
    }
}

/// Energy and latency of a request at an operating point: the prompt follows the clock, the tokens mostly the memory.
fn scaled(
    device: &Profile,
    point: OperatingPoint,
    cost: &RequestCost,
) -> Result<(Joules, Seconds)> {
    let part = |energy: Joules, time: Seconds, bound: f64| -> Result<(Joules, Seconds)> {
        if time.0 <= 0.0 {
            return Ok((energy, time));
        }
        let Scaling {
            time: longer,
            energy: share,
            ..
        } = point.scaling(device, Watts(energy.0 / time.0), bound)?;
        Ok((energy * share, time * longer))
    };
    let of_prompt = cost.prompt.energy.joules();
    let (prompt_j, prompt_s) = part(of_prompt, cost.prompt.time, COMPUTE_BOUND)?;
    let (tokens_j, tokens_s) = part(
        cost.total.energy.joules() - of_prompt,
        cost.total.time - cost.prompt.time,
        MEMORY_BOUND,
    )?;
    Ok((cost.share(prompt_j + tokens_j), prompt_s + tokens_s))
}

/// Indices of the feasible rows that no other beats in both energy and latency, by latency.
pub fn pareto(rows: &[PlacedRow]) -> Vec<usize> {
    let mut points: Vec<(usize, f64, f64)> = (rows.iter().enumerate())
        .filter(|(_, row)| row.feasible)
        .filter_map(|(index, row)| Some((index, row.latency_s?.0, row.j_per_request?.0)))
        .collect();
    points.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.2.total_cmp(&b.2)));
    let mut least = f64::INFINITY;
    points.retain(|(_, _, joules)| {
        let better = *joules < least;
        least = least.min(*joules);
        better
    });
    points.into_iter().map(|(index, ..)| index).collect()
}

/// The cheapest feasible row of each deadline and batch, without a deadline last.
pub fn cheapest(rows: &[PlacedRow], candidates: &Candidates) -> Vec<Cheapest> {
    let deadlines = candidates.deadlines.iter().copied().map(Some);
    let mut all = Vec::new();
    for deadline in deadlines.chain([None]) {
        for batch in &candidates.batches {
            let fits = |row: &PlacedRow| row.feasible && row.batch == *batch && row.meets(deadline);
            let row = (rows.iter().enumerate())
                .filter(|(_, row)| fits(row))
                .filter_map(|(index, row)| Some((index, row.j_per_request?)))
                .min_by(|a, b| a.1.0.total_cmp(&b.1.0))
                .map(|(index, _)| index);
            all.push(Cheapest {
                deadline_s: deadline,
                batch: *batch,
                row,
            });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;

    fn rows(candidates: &Candidates) -> Vec<PlacedRow> {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": true,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        let architecture = Architecture::from_config(&config).unwrap();
        let model = StoredModel {
            format: "bf16".into(),
            shape: &|precision| ServedShape::new(&architecture, precision),
            serve: &|_, _| "serve".into(),
        };
        place(&[model], candidates)
    }

    fn candidates(deadlines: &[f64]) -> Candidates {
        let named = |name| Profile::named(name).unwrap();
        Candidates {
            devices: ["raspberry-pi-5", "nvidia-l4", "nvidia-h100-sxm5-80gb"]
                .map(named)
                .to_vec(),
            operating_points: vec![OperatingPoint::None, OperatingPoint::Share(0.6)],
            batches: vec![1, 8],
            prompt: 64,
            generated: 32,
            deadlines: deadlines.iter().map(|seconds| Seconds(*seconds)).collect(),
        }
    }

    #[test]
    fn a_later_deadline_never_costs_more_and_the_pareto_set_is_not_beaten() {
        let candidates = candidates(&[0.1, 1.0, 30.0]);
        let rows = rows(&candidates);
        assert_eq!(rows.len(), 3 * 2 * 2);
        let joules = |index: usize| rows[index].j_per_request.unwrap().0;
        for batch in [1, 8] {
            let found: Vec<f64> = (cheapest(&rows, &candidates).iter())
                .filter(|cheapest| cheapest.batch == batch)
                .filter_map(|cheapest| cheapest.row.map(joules))
                .collect();
            assert!(
                found.len() >= 2 && found.windows(2).all(|pair| pair[0] >= pair[1]),
                "{found:?}"
            );
        }
        let best = pareto(&rows);
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.feasible) {
            let beaten = best.iter().any(|other| {
                joules(*other) <= joules(index) && rows[*other].latency_s <= row.latency_s
            });
            assert!(beaten, "{row:?} is in the set or beaten by it");
        }
        // A limit of 60 % is 43.2 W of an L4; what it saves is bounded by no saving.
        let is_limited = |row: &&PlacedRow| {
            row.device == "nvidia-l4" && row.operating_point != OperatingPoint::None
        };
        let limited = rows.iter().find(is_limited).unwrap();
        let command = limited.command.as_deref();
        assert_eq!(command, Some("sudo nvidia-smi -pl 43 && serve"));
        let token = limited.j_per_token.unwrap();
        assert!(token.low < token.central && token.central <= token.high / 1.37 * 1.0001);
    }

    #[test]
    fn what_does_not_fit_says_so() {
        let mut candidates = candidates(&[1e-6]);
        let says = |row: &PlacedRow, words: &str| {
            !row.feasible
                && row
                    .reason
                    .as_ref()
                    .is_some_and(|reason| reason.contains(words))
        };
        assert!(rows(&candidates).iter().all(|row| says(row, "later than")));
        candidates.deadlines.clear();
        candidates.devices.truncate(1);
        candidates.devices[0].memory = Some(Bytes(1000));
        let rows = rows(&candidates);
        assert!(says(&rows[0], "do not fit"), "{:?}", rows[0]);
        assert!(pareto(&rows).is_empty());
        assert!(
            cheapest(&rows, &candidates)
                .iter()
                .all(|cheapest| cheapest.row.is_none())
        );
    }

    /// AutoScale (Kim and Wu, MICRO 2020): Q-learning over states of deadline and load with rewards of -joules and a penalty past the
    /// deadline; rate 0.9, discount 0.1, epsilon 0.1. On a stationary trace it comes within 3 % of the exact table.
    #[test]
    fn a_learner_comes_within_three_percent_of_the_table() {
        let candidates = candidates(&[0.5, 2.0, 30.0]);
        let rows = rows(&candidates);
        let table: Vec<Cheapest> = cheapest(&rows, &candidates);
        let states: Vec<&Cheapest> = table.iter().filter(|state| state.row.is_some()).collect();
        let actions = |state: &Cheapest| -> Vec<usize> {
            let batch = state.batch;
            (0..rows.len())
                .filter(|row| rows[*row].batch == batch)
                .collect()
        };
        let reward = |state: &Cheapest, row: usize| {
            let late = if rows[row].meets(state.deadline_s) {
                0.0
            } else {
                1e3
            };
            -rows[row].j_per_request.unwrap().0 - late
        };
        let unseen = |state: &&Cheapest| vec![0.0; actions(state).len()];
        let mut values: Vec<Vec<f64>> = states.iter().map(unseen).collect();
        let best = |values: &[f64]| {
            (0..values.len())
                .max_by(|a, b| values[*a].total_cmp(&values[*b]))
                .unwrap()
        };
        let mut seed = 7u64;
        let mut random = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as f64 / (1u64 << 31) as f64
        };
        // 50 runs of each state.
        for run in 0..50 * states.len() {
            let state = run % states.len();
            let count = values[state].len();
            let explores = random() < 0.1;
            let action = if explores {
                (random() * count as f64) as usize
            } else {
                best(&values[state])
            };
            let next = &values[(state + 1) % states.len()];
            let next = next.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let seen = reward(states[state], actions(states[state])[action]) + 0.1 * next;
            values[state][action] += 0.9 * (seen - values[state][action]);
        }
        let joules = |row: usize| rows[row].j_per_request.unwrap().0;
        let exact: f64 = states.iter().map(|state| joules(state.row.unwrap())).sum();
        let learnt = states.iter().zip(&values);
        let learnt: f64 = learnt
            .map(|(state, values)| joules(actions(state)[best(values)]))
            .sum();
        assert!(
            learnt >= exact * (1.0 - 1e-12) && learnt <= exact * 1.03,
            "{learnt} against {exact}"
        );
    }
}
