//! Energy through its public interface: published runs recomputed, budgets never exceeded, crashes replayed.

use proptest::prelude::*;
use wattune::energy::ledger::Lease;
use wattune::energy::{
    Account, Allowance, Budget, Energies, Ledger, Limit, Limits, MeterKind, Meters, Phase, Profile,
    Rates, Spent, Verdict, carbon,
};
use wattune::forecast::{RequestCost, RequestSize};
use wattune::model::{Architecture, ServedShape};
use wattune::units::{Flops, GramsCo2e, GramsPerKwh, Joules, MicroJoules, Pue, Seconds, Watts};
use wattune::work::{Precision, Work};

/// Patterson et al. 2021 (arXiv:2104.10350), table 4: model, FLOPs, achieved FLOP/s a chip, watts a chip, PUE, gCO2e/kWh net,
/// MWh, tonnes. Energy and tonnes are the paper's printed (rounded) figures.
const PATTERSON: [(&str, [f64; 7]); 6] = [
    (
        "Evolved Transformer NAS",
        [2.91e21, 24.8e12, 208.0, 1.10, 431.0, 7.5, 3.2],
    ),
    ("T5-11B", [4.05e22, 45.6e12, 310.0, 1.12, 545.0, 85.7, 46.7]),
    ("Meena", [1.12e23, 42.3e12, 289.0, 1.09, 415.0, 232.0, 96.4]),
    (
        "GShard-600B",
        [1.33e22, 48.0e12, 288.0, 1.09, 177.0, 24.1, 4.3],
    ),
    (
        "Switch Transformer",
        [8.22e22, 34.4e12, 245.0, 1.10, 330.0, 179.0, 59.1],
    ),
    (
        "GPT-3",
        [3.14e23, 24.6e12, 330.0, 1.10, 429.0, 1287.0, 552.1],
    ),
];

#[test]
fn published_runs_are_recomputed() {
    for (model, [flops, rate, watts, pue, grid, mwh, tonnes]) in PATTERSON {
        let machine: Joules = Watts(watts) * Seconds(flops / rate);
        let pue = Pue::new(pue).unwrap();
        let facility = (pue * machine).kwh() / 1000.0;
        let grams = carbon(machine, pue, GramsPerKwh(grid));
        assert!(
            (facility / mwh - 1.0).abs() < 0.01,
            "{model}: {facility} MWh of {mwh}"
        );
        assert!(
            (grams.0 / 1e6 / tonnes - 1.0).abs() < 0.015,
            "{model}: {grams} of {tonnes} t"
        );
    }
}

/// Whether an amount is within a limit.
type Rule = Box<dyn Fn(&Spent) -> bool>;

const GRID: GramsPerKwh = GramsPerKwh(383.5);
const PUE: f64 = 1.13;

/// The kinds of limits, each with a size that `limited` scales.
fn limits(which: usize, size: f64) -> (Limits, Option<&'static str>) {
    let mut limits = Limits::default();
    match which {
        0 => limits.energy = Some(Joules(size)),
        1 => limits.carbon = Some(GramsCo2e(size * 1e-4)),
        2 => limits.flops = Some(Flops(size * 1e3)),
        _ => limits.cost = Some(format!("{} EUR", size * 1e-6).parse().unwrap()),
    }
    let price = match which {
        3 => Some("0.31 EUR/kWh"),
        4 => Some("2.5 EUR/h"),
        _ => None,
    };
    (limits, price)
}

/// A budget with one limit, and the exact rule that it must keep, in integers or reals.
fn limited(which: usize, size: f64) -> (Budget, Rule) {
    let (limits, price) = limits(which, size);
    let rates = Rates {
        grid: GRID,
        pue: Pue::new(PUE).unwrap(),
        price: price.map(|price| price.parse().unwrap()),
    };
    let kwh = |spent: &Spent| spent.energy.0 as f64 / 3.6e12;
    // A relative tolerance where the rule multiplies in another order than the code.
    let tolerance = 1.0 + 1e-12;
    let grams = size * 1e-4;
    let cost = size * 1e-6;
    let rule: Rule = match which {
        0 => Box::new(move |s| s.energy.0 as f64 / 1e6 <= size),
        1 => Box::new(move |s| kwh(s) * PUE * GRID.0 <= grams * tolerance),
        2 => Box::new(move |s| s.flops as f64 <= size * 1e3),
        3 => Box::new(move |s| kwh(s) * PUE * 0.31 <= cost * tolerance),
        _ => Box::new(move |s| s.time.0 / 3600.0 * 2.5 <= cost * tolerance),
    };
    (Budget::new(limits, rates).unwrap(), rule)
}

proptest! {
    #[test]
    fn admitted_steps_never_exceed_a_limit(
        which in 0..5_usize,
        size in 0.001..1e4_f64,
        steps in prop::collection::vec((0..3_000_000_000_u64, 0..2_000_000_u64, 0.0..5e-3_f64), 1..60),
        reserve in (0..1_000_000_000_u64, 0..1_000_000_u64, 0.0..1e-3_f64),
    ) {
        let (budget, keeps) = limited(which, size);
        let make = |(energy, flops, time)| Spent { energy: MicroJoules(energy), flops, time: Seconds(time) };
        let reserve = make(reserve);
        let mut spent = Spent::default();
        for step in steps {
            let step = make(step);
            match budget.admits(&spent, &step, &reserve) {
                Ok(()) => spent += step,
                // No needless refusal: one part in a million more would have exceeded the limit.
                Err(_) => {
                    let total = spent + step + reserve;
                    let more = Spent {
                        energy: MicroJoules(total.energy.0 + total.energy.0 / 1_000_000 + 1),
                        flops: total.flops + 1,
                        time: total.time * (1.0 + 1e-6),
                    };
                    prop_assert!(!keeps(&more));
                }
            }
            // The reserve can still be spent.
            prop_assert!(spent == Spent::default() || keeps(&(spent + reserve)));
        }
    }

    #[test]
    fn progress_is_monotone(parts in prop::collection::vec(0..1_000_000_u64, 1..40)) {
        let allowance = Allowance { energy: Some(MicroJoules(10_000_000)), flops: None, time: None };
        let (mut spent, mut before) = (Spent::default(), 0.0);
        for part in parts {
            spent.energy += MicroJoules(part);
            let now = allowance.fraction(&spent);
            prop_assert!((before..=1.0).contains(&now));
            before = now;
        }
    }

}

proptest! {
    // Every case syncs to disk.
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// A process that dies after any step, any number of times, stays within its budget; the ledger has at least what it spent.
    #[test]
    fn crashes_hide_no_spending(deaths in prop::collection::vec(1..9_u64, 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let profile = Profile::named("generic-cpu").unwrap();
        let step = Work::product(400, 300, 200, Precision::F32);
        let one = profile.charge(&step).energy.0;
        let limit = MicroJoules(one * 30);
        let mut done = 0;
        for steps in deaths {
            let ledger = if path.exists() { Ledger::resume(&path, "run") } else { Ledger::create(&path, "run") }.unwrap();
            let rates = Rates { grid: GramsPerKwh(473.0), pue: Pue::ONE, price: None };
            let budget = Budget::new(Limits { energy: Some(limit.joules()), ..Limits::default() }, rates).unwrap();
            let mut account = Account::new(budget, Meters::without_counters(profile.clone()), ledger, MeterKind::Counted);
            for _ in 0..steps {
                if account.admit(Phase::Train, &step, &[]).unwrap() != Verdict::Continue {
                    break;
                }
                // The step runs; its entry may be lost in a power cut.
                done += 1;
                account.charge(Phase::Train, done, &step).unwrap();
            }
            prop_assert!(account.spent().energy.0 >= done * one);
            prop_assert!(account.spent().energy <= limit);
        }
    }
}

#[test]
fn unsynced_entries_are_covered_by_the_lease() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.jsonl");
    let mut ledger = Ledger::create(&path, "run").unwrap();
    let energy_j = Energies {
        counted: MicroJoules(50),
        measured: None,
        timed: MicroJoules(60),
    };
    let lease = Lease {
        steps: 5,
        energy_j,
        flops: 500,
        time_s: Seconds(5.0),
    };
    ledger.lease(lease, Seconds(1.0)).unwrap();
    let synced = std::fs::read(&path).unwrap();
    drop(ledger);
    // Five steps ran, none of their lines reached the disk.
    std::fs::write(&path, synced).unwrap();
    let ledger = Ledger::resume(&path, "run").unwrap();
    assert_eq!(ledger.total().energy_j, energy_j);
    assert_eq!(ledger.phase(Phase::Lost).flops, 500);
    // A second before the lease, and its five.
    assert_eq!(ledger.elapsed(), Seconds(6.0));
}

#[test]
fn a_budget_below_one_step_stops_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let rates = Rates {
        grid: GramsPerKwh(473.0),
        pue: Pue::ONE,
        price: None,
    };
    let limits = Limits {
        carbon: Some("1 mg".parse().unwrap()),
        ..Limits::default()
    };
    let budget = Budget::new(limits, rates).unwrap();
    let ledger = Ledger::create(&dir.path().join("ledger.jsonl"), "run").unwrap();
    let meters = Meters::without_counters(Profile::named("raspberry-pi-5").unwrap());
    let account = Account::new(budget, meters, ledger, MeterKind::Counted);
    let step = Work::product(4096, 4096, 4096, Precision::F32).times(10);
    let verdict = account.fits(Phase::Train, &step, &[]);
    assert_eq!(verdict, Verdict::Stop(Limit::Carbon));
}

/// A row of `tests/fixtures/decode_energy.csv`: published measurements of dense bf16 models under vLLM.
#[derive(serde::Deserialize)]
struct Decoding {
    model: String,
    gpu: String,
    max_num_seqs: usize,
    avg_batch: f64,
    avg_output_tokens: f64,
    joule_per_output_token: f64,
    parameters: f64,
}

/// config.json of the models: type, hidden size, inner size, layers, heads, heads of k and v, head size, vocabulary.
const SERVED: [(&str, &str, [usize; 7]); 9] = [
    (
        "meta-llama/Llama-3.1-8B-Instruct",
        "llama",
        [4096, 14_336, 32, 32, 8, 128, 128_256],
    ),
    (
        "meta-llama/Llama-3.1-70B-Instruct",
        "llama",
        [8192, 28_672, 80, 64, 8, 128, 128_256],
    ),
    (
        "meta-llama/Llama-3.3-70B-Instruct",
        "llama",
        [8192, 28_672, 80, 64, 8, 128, 128_256],
    ),
    (
        "meta-llama/Llama-3.1-405B-Instruct",
        "llama",
        [16_384, 53_248, 126, 128, 8, 128, 128_256],
    ),
    (
        "Qwen/Qwen3-8B",
        "qwen3",
        [4096, 12_288, 36, 32, 8, 128, 151_936],
    ),
    (
        "Qwen/Qwen3-14B",
        "qwen3",
        [5120, 17_408, 40, 40, 8, 128, 151_936],
    ),
    (
        "Qwen/Qwen3-32B",
        "qwen3",
        [5120, 25_600, 64, 64, 8, 128, 151_936],
    ),
    (
        "google/gemma-3-12b-it",
        "gemma3_text",
        [3840, 15_360, 48, 16, 8, 256, 262_208],
    ),
    (
        "google/gemma-3-27b-it",
        "gemma3_text",
        [5376, 21_504, 62, 32, 16, 128, 262_208],
    ),
];

fn architecture(model: &str) -> Architecture {
    let (_, kind, sizes) = SERVED.iter().find(|(name, ..)| *name == model).unwrap();
    let [hidden, inner, layers, heads, kv_heads, head_dim, vocabulary] = sizes;
    let class = match *kind {
        "llama" => "LlamaForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "Gemma3ForCausalLM",
    };
    let gemma = *kind == "gemma3_text";
    let mut config = serde_json::json!({
        "architectures": [class], "model_type": kind, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocabulary, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
        "tie_word_embeddings": gemma, "torch_dtype": "bfloat16",
    });
    if gemma {
        config["hidden_activation"] = "gelu_pytorch_tanh".into();
        config["query_pre_attn_scalar"] = (*head_dim).into();
        config["sliding_window"] = 1024.into();
    } else {
        config["hidden_act"] = "silu".into();
    }
    Architecture::from_config(&config).unwrap()
}

/// Errors of joules per generated token, in order, of the rows of a card with at most `sequences` sequences. Prompts of the chats have
/// about 200 tokens; of several cards each streams its share, which costs what one card takes for all.
fn decoding_errors(gpu: &str, sequences: usize) -> Vec<f64> {
    let profile = Profile::named(if gpu == "H100" {
        "nvidia-h100-sxm5-80gb"
    } else {
        "nvidia-b200-sxm-180gb"
    });
    let profile = profile.unwrap();
    let mut reader = csv::Reader::from_path("tests/fixtures/decode_energy.csv").unwrap();
    let rows = reader.deserialize().map(|row| -> Decoding { row.unwrap() });
    rows.filter(|row| row.gpu == gpu && row.max_num_seqs <= sequences)
        .map(|row| {
            let architecture = architecture(&row.model);
            let counted = architecture.parameters() as f64;
            assert!(
                (counted / row.parameters - 1.0).abs() < 0.05,
                "{}: {counted}",
                row.model
            );
            let size = RequestSize {
                prompt: 200,
                generated: row.avg_output_tokens.round() as usize,
                batch: row.avg_batch.round() as usize,
            };
            let shape = ServedShape::new(&architecture, Precision::Bf16);
            let energy = RequestCost::new(&profile, &shape, size).energy();
            let error = energy.0 / size.generated as f64 / row.joule_per_output_token - 1.0;
            eprintln!(
                "{gpu} {} x {}: {:+.1} %",
                row.model,
                size.batch,
                100.0 * error
            );
            error
        })
        .collect()
}

#[test]
fn counted_decoding_is_near_measured_decoding() {
    for (gpu, sequences, most) in [
        ("H100", 16, 0.08),
        ("H100", 64, 0.15),
        ("B200", 16, 0.16),
        ("B200", 64, 0.18),
    ] {
        let errors = decoding_errors(gpu, sequences);
        let mean = errors.iter().map(|error| error.abs()).sum::<f64>() / errors.len() as f64;
        let bias = errors.iter().sum::<f64>() / errors.len() as f64;
        eprintln!(
            "{gpu}, at most {sequences}: mean error {:.1} % ({:+.1} %) of {}",
            100.0 * mean,
            100.0 * bias,
            errors.len()
        );
        assert!(
            errors.len() >= 13 && mean <= most,
            "{gpu} {sequences}: {mean}"
        );
    }
}
