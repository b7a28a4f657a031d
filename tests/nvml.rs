//! Energy of GPUs through the C interface of NVML, against a fake library built from `nvml/driver.rs`.
//!
//! The library path is fixed when a process starts, so a test that meters restarts itself with the fake library in its path
//! (`Driver::start`). Not covered, because only a real GPU has them: the update rate of the counter and the cost of a reading.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use wattune::energy::Computing;
use wattune::energy::sensor::{NvmlSensor, Sensor, gpu_name};
use wattune::energy::{
    Account, Budget, Counters, Ledger, Limits, MeterKind, Meters, Phase, Profile, Rates,
};
use wattune::units::{GramsPerKwh, Joules, MicroJoules, Pue};
use wattune::work::{Precision, Work};

/// Names the file with the fake GPUs.
const GPUS: &str = "WATTUNE_TEST_CARDS";
/// Variables that select GPUs.
const SELECTION: [&str; 2] = ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"];

/// The directory of the fake library, built once.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvml");
        std::fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvml/driver.rs");
        let temporary = folder.join(format!("{}.so", std::process::id()));
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let mut command = Command::new(rustc);
        command
            .args([
                "--edition",
                "2024",
                "--crate-type",
                "cdylib",
                "--crate-name",
                "nvml",
                "-o",
            ])
            .arg(&temporary)
            .arg(source);
        let built = command.output().unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        std::fs::rename(temporary, folder.join("libnvidia-ml.so.1")).unwrap();
        folder
    })
}

/// `program` on a machine with these GPUs, whose file is in `folder`.
fn with_gpus(program: impl AsRef<std::ffi::OsStr>, folder: &Path, cards: &str) -> Command {
    let file = folder.join("cards");
    std::fs::write(&file, cards).unwrap();
    let mut command = Command::new(program);
    SELECTION
        .iter()
        .for_each(|variable| _ = command.env_remove(variable));
    command
        .env("LD_LIBRARY_PATH", library())
        .env(GPUS, file)
        .env("WATTUNE_POWERCAP", folder.join("no-powercap"));
    command
}

/// The fake driver of this process.
struct Driver(PathBuf);

impl Driver {
    /// The driver, in a process that was restarted by a test; else restarts the test with these GPUs and variables and returns `None`.
    fn start(test: &str, cards: &str, variables: &[(&str, &str)]) -> Option<Driver> {
        if let Some(file) = std::env::var_os(GPUS) {
            return Some(Driver(file.into()));
        }
        let folder = tempfile::tempdir().unwrap();
        let mut restarted = with_gpus(std::env::current_exe().unwrap(), folder.path(), cards);
        let output = restarted
            .args(["--exact", test, "--nocapture"])
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && stdout.contains("1 passed"),
            "{stdout}\n{stderr}"
        );
        None
    }

    /// Replaces the GPUs' readings atomically.
    fn set(&self, cards: &str) {
        let temporary = self.0.with_extension("next");
        std::fs::write(&temporary, cards).unwrap();
        std::fs::rename(temporary, &self.0).unwrap();
    }
}

fn open(ordinal: u32) -> NvmlSensor {
    NvmlSensor::open(ordinal).unwrap_or_else(|absent| panic!("{absent:?}"))
}

/// Runs the program on a machine with these GPUs.
fn wattune(cards: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = with_gpus(env!("CARGO_BIN_EXE_wattune"), folder.path(), cards);
    command
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .unwrap()
}

fn sensors(cards: &str) -> Vec<Value> {
    let output = wattune(cards, &["devices", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let all = document["sensors"].as_array().unwrap();
    all.iter()
        .filter(|sensor| sensor["name"].as_str().unwrap().starts_with("nvml"))
        .cloned()
        .collect()
}

#[test]
fn devices_lists_every_gpu_with_its_sensor_or_the_reason_for_none() {
    // A counter; power only (NVML_ERROR_NOT_SUPPORTED is 3); neither; a GPU that fell off the bus (NVML_ERROR_GPU_IS_LOST, 15).
    let cards = "GPU-a;NVIDIA H100 80GB HBM3;7000+;90000\nGPU-b;Tesla P100;!3;40000\nGPU-c;Tesla K80;!3;!4\n!15;NVIDIA T4;1;1\n";
    let found = sensors(cards);
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(
        (&found[0]["available"], &found[0]["covers"]),
        (
            &true.into(),
            &"NVIDIA H100 80GB HBM3, energy counter".into()
        )
    );
    let covers = "Tesla P100, no energy counter: its power is sampled";
    assert_eq!(
        (
            &found[1]["available"],
            &found[1]["covers"],
            &found[1]["name"]
        ),
        (&true.into(), &covers.into(), &"nvml:1".into())
    );
    let why = |at: usize| {
        (
            found[at]["available"].as_bool().unwrap(),
            found[at]["reason"].as_str().unwrap(),
        )
    };
    let (available, reason) = why(2);
    assert!(
        !available
            && reason.contains("not available on the target device")
            && reason.contains("permission"),
        "{reason}"
    );
    let (available, reason) = why(3);
    assert!(
        !available && reason.starts_with("the driver knows no device 3: "),
        "{reason}"
    );
    // The library without a driver (NVML_ERROR_DRIVER_NOT_LOADED, 9).
    let found = sensors("!9\n");
    let (name, available) = (&found[0]["name"], &found[0]["available"]);
    assert_eq!(
        (found.len(), name, available),
        (1, &"nvml".into(), &false.into())
    );
    assert!(
        found[0]["reason"]
            .as_str()
            .unwrap()
            .starts_with("no NVIDIA driver: "),
        "{found:?}"
    );
}

#[test]
fn a_cpu_run_does_not_use_the_gpus_counter() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/quickstart.toml");
    let arguments = [
        "train",
        recipe,
        "--device",
        "cpu",
        "--set",
        "energy.meter=measured",
        "--out",
        "run",
    ];
    let output = wattune("GPU-a;NVIDIA T4;1000;30000\n", &arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(
        message.contains("energy cannot be measured here") && message.contains("powercap"),
        "{message}"
    );
}

#[test]
fn each_gpu_is_counted_once_and_a_reloaded_driver_is_a_gap() {
    let test = "each_gpu_is_counted_once_and_a_reloaded_driver_is_a_gap";
    let Some(driver) = Driver::start(
        test,
        "GPU-a;NVIDIA T4;1000;1\nGPU-b;NVIDIA T4;50000;1\n",
        &[],
    ) else {
        return;
    };
    // As opened by four ranks on two GPUs.
    let ranks = [0, 1, 0, 1].map(|ordinal| Box::new(open(ordinal)) as Box<dyn Sensor>);
    let mut counters = Counters::new(ranks.into());
    assert_eq!(
        counters.names(),
        [
            "nvml:0 (NVIDIA T4, energy counter)",
            "nvml:1 (NVIDIA T4, energy counter)"
        ]
    );
    let snapshot = counters.snapshot();
    // 2.5 J and 4 J.
    driver.set("GPU-a;NVIDIA T4;3500;1\nGPU-b;NVIDIA T4;54000;1\n");
    assert_eq!(counters.energy_since(&snapshot), Ok(MicroJoules(6_500_000)));
    // The first GPU's driver was reloaded: its counter starts at zero.
    driver.set("GPU-a;NVIDIA T4;10;1\nGPU-b;NVIDIA T4;54001;1\n");
    let gap = counters.energy_since(&snapshot).unwrap_err();
    assert!(
        gap.lost && gap.reason.starts_with("nvml:0: ") && gap.reason.contains("reset"),
        "{gap:?}"
    );
}

#[test]
fn a_gpu_without_a_counter_has_its_power_sampled() {
    let test = "a_gpu_without_a_counter_has_its_power_sampled";
    let Some(driver) = Driver::start(test, "GPU-a;Tesla P100;!3;100000\n", &[]) else {
        return;
    };
    let mut counters = Counters::new(vec![Box::new(open(0))]);
    assert_eq!(
        counters.names(),
        ["nvml:0 (Tesla P100, no energy counter: its power is sampled)"]
    );
    // Constant 100 W: the interval between the two readings is between these two.
    let (outer, snapshot, inner) = (Instant::now(), counters.snapshot(), Instant::now());
    std::thread::sleep(Duration::from_millis(100));
    let least = inner.elapsed().as_secs_f64();
    let energy = counters.energy_since(&snapshot).unwrap().joules().0;
    let most = outer.elapsed().as_secs_f64();
    assert!(
        (100.0 * least..=100.0 * most).contains(&energy),
        "{energy} J in {least} to {most} s"
    );
    // 300 W that end before the next snapshot: only the sampling thread reads them.
    let snapshot = counters.snapshot();
    driver.set("GPU-a;Tesla P100;!3;300000\n");
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(900));
    driver.set("GPU-a;Tesla P100;!3;100000\n");
    let (energy, wall) = (
        counters.energy_since(&snapshot).unwrap().joules().0,
        start.elapsed().as_secs_f64(),
    );
    assert!(
        energy > 150.0 * wall && energy < 300.0 * wall,
        "{energy} J in {wall} s"
    );
}

#[test]
fn a_lost_gpu_leaves_named_gaps_and_no_zero() {
    let test = "a_lost_gpu_leaves_named_gaps_and_no_zero";
    let Some(driver) = Driver::start(test, "GPU-a;NVIDIA T4;1000;1\n", &[]) else {
        return;
    };
    let profile = Profile::named("nvidia-t4").unwrap();
    let step = Work::product(2048, 2048, 2048, Precision::F32);
    let counted = profile.charge(&step).energy.0;
    let meters = Meters::without_counters(profile).with_counters(vec![Box::new(open(0))], None);
    let (rates, folder) = (
        Rates {
            grid: GramsPerKwh(473.0),
            pue: Pue::ONE,
            price: None,
        },
        tempfile::tempdir().unwrap(),
    );
    let (budget, path) = (
        Budget::new(Limits::default(), rates).unwrap(),
        folder.path().join("ledger.jsonl"),
    );
    let mut account = Account::new(
        budget,
        meters,
        Ledger::create(&path, "run").unwrap(),
        MeterKind::Measured,
    );
    // 5 J; then the GPU is lost within a step and during the next; then it is back, with 3 J in the last step.
    let readings = ["6000", "!15", "!15", "20000", "23000"];
    for (number, millijoules) in (1..).zip(readings) {
        account.begin();
        driver.set(&format!("GPU-a;NVIDIA T4;{millijoules};1\n"));
        // A gap is filled with no more than the device can draw in its time.
        std::thread::sleep(Duration::from_millis(5));
        account.charge(Phase::Train, number, &step).unwrap();
    }
    // The fourth step's window began while the GPU was lost: it is unknown too. Each is filled with the ratio of the first.
    let gaps: Vec<_> = account.gaps().collect();
    let reason = "nvml:0: the driver gave no reading: ";
    assert!(
        gaps.len() == 1 && gaps[0].1.starts_with(reason) && gaps[0].2.entries == 3,
        "{gaps:?}"
    );
    assert!(
        gaps[0].2.energy.0.abs_diff(15_000_000) <= 3,
        "{gaps:?} of {counted}"
    );
    assert_eq!(
        account.totals().energy_j.measured,
        Some(MicroJoules(8_000_000))
    );
    assert_eq!(
        account.spent().energy,
        MicroJoules(8_000_000) + gaps[0].2.energy
    );
    let text = std::fs::read_to_string(&path).unwrap();
    // After the run's digest and the first entry.
    let entry: Value = serde_json::from_str(text.lines().nth(2).unwrap()).unwrap();
    assert!(
        entry["energy_j"]["measured"].is_null() && entry["gap"]["filled"] == "counted",
        "{entry}"
    );
    assert!(
        entry["gap"]["reason"].as_str().unwrap().starts_with(reason),
        "{entry}"
    );
}

#[test]
fn the_computing_gpu_is_metered() {
    let test = "the_computing_gpu_is_metered";
    let cards = "GPU-a1;NVIDIA T4;1000;1\nGPU-b2;NVIDIA H100 80GB HBM3;2000+;1\n";
    let Some(driver) = Driver::start(test, cards, &[("CUDA_VISIBLE_DEVICES", "GPU-b")]) else {
        return;
    };
    assert_eq!(
        (gpu_name(0).unwrap().as_str(), open(0).device()),
        ("NVIDIA H100 80GB HBM3", "GPU-b2")
    );
    assert_eq!(
        Profile::of_machine(Computing::Nvidia(0)).unwrap().name,
        "nvidia-h100-sxm5-80gb"
    );
    // All meters of a run: the GPU, and its modelled host if that has no counter.
    let mut meters = Meters::open(
        Profile::of_machine(Computing::Nvidia(0)).unwrap(),
        Computing::Nvidia(0),
        None,
    );
    let by = meters.measured_by();
    assert!(
        by.len() == 2
            && by[0] == "nvml:1 (NVIDIA H100 80GB HBM3, energy counter)"
            && by[1].contains("modelled at"),
        "{by:?}"
    );
    assert_eq!(meters.resolve(None).unwrap(), MeterKind::Measured);
    let window = meters.begin();
    driver.set("GPU-a1;NVIDIA T4;9999;1\nGPU-b2;NVIDIA H100 80GB HBM3;4000+;1\n");
    let reading = meters.end(window, &Work::default());
    let measured = reading.energies().measured.unwrap().joules();
    // 2 J of the GPU; a host draws less than a kilowatt.
    assert!(
        measured >= Joules(2.0) && measured.0 < 2.1 + 1000.0 * reading.wall.0,
        "{measured} in {:?}",
        reading.wall
    );
    assert!(
        NvmlSensor::open(1)
            .err()
            .unwrap()
            .reason
            .contains("no entry 1")
    );
}

#[test]
fn mig_slices_and_gpus_of_ambiguous_order_are_refused() {
    let test = "mig_slices_and_gpus_of_ambiguous_order_are_refused";
    let cards = "GPU-a;NVIDIA T4;1000;1\nGPU-b;NVIDIA A40;2000;1\n";
    let Some(_) = Driver::start(test, cards, &[("CUDA_VISIBLE_DEVICES", "MIG-5c89,1")]) else {
        return;
    };
    let meters = Meters::open(
        Profile::named("nvidia-t4").unwrap(),
        Computing::Nvidia(0),
        None,
    );
    assert!(
        meters.absent().unwrap().reason.contains("slice of a GPU")
            && meters.measured_by().is_empty()
    );
    assert!(
        NvmlSensor::open(1)
            .err()
            .unwrap()
            .remedy
            .contains("PCI_BUS_ID")
    );
}
