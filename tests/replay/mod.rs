//! A simulated device with a counter that fails on demand.
//!
//! A test draws energy from the device, or power over time as in a trace; the sensor returns what a hardware counter would. Traces are rows of the Zeus power measurements (ml-energy/zeus, Apache-2.0; You et al., NSDI 2023), each with the
//! mean power and the time of one epoch.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use wattune::energy::sensor::{Gap, Sensor};
use wattune::units::{MicroJoules, Seconds, Watts};

/// The device; clones share its state.
#[derive(Clone, Default)]
pub struct Device(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    spent: u64,
    failing: bool,
    resets: u64,
}

impl Device {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Draws energy.
    pub fn spend(&self, energy: MicroJoules) {
        self.state().spent += energy.0;
    }

    /// Draws power for a time.
    pub fn draw(&self, power: Watts, time: Seconds) {
        self.spend((power * time).rounded());
    }

    /// The energy drawn, independent of the counter.
    pub fn spent(&self) -> MicroJoules {
        MicroJoules(self.state().spent)
    }

    /// Makes reading the counter fail, or succeed again.
    pub fn fail(&self, failing: bool) {
        self.state().failing = failing;
    }

    /// Resets the counter to zero.
    pub fn reset(&self) {
        self.state().resets += 1;
    }

    /// A counter of this device, opened now.
    pub fn sensor(&self) -> Box<dyn Sensor> {
        let (last, resets) = {
            let state = self.state();
            (state.spent, state.resets)
        };
        Box::new(Replay {
            device: self.clone(),
            last,
            resets,
            total: 0,
        })
    }
}

struct Replay {
    device: Device,
    last: u64,
    resets: u64,
    total: u64,
}

impl Sensor for Replay {
    fn name(&self) -> &str {
        "replay"
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        let state = self.device.state();
        if state.failing {
            return Err(Gap::unread("the counter cannot be read"));
        }
        let risen = state.spent - std::mem::replace(&mut self.last, state.spent);
        if state.resets > std::mem::replace(&mut self.resets, state.resets) {
            return Err(Gap::lost("the counter was reset"));
        }
        self.total += risen;
        Ok(MicroJoules(self.total))
    }
}

/// The directory of recorded traces; `None`, with a line on stderr, if absent.
pub fn traces(test: &str) -> Option<PathBuf> {
    let shared = match std::env::var_os("WATTUNE_ASSETS") {
        Some(assets) => PathBuf::from(assets)
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    let folder = shared.join("facts/energy/zeus_traces");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!(
        "skipped: {test} needs the Zeus power traces beside the assets folder (set WATTUNE_ASSETS)"
    );
    None
}

/// Mean power and time of an epoch, by ascending power limit: the rows of `card` that begin with `job`.
pub fn epochs(folder: &Path, card: &str, job: &str) -> Vec<(Watts, Seconds)> {
    let path = folder.join(format!("summary_power_{card}.csv"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(
        text.starts_with(
            "dataset,network,batch_size,optimizer,power_limit,time_per_epoch,average_power"
        ),
        "{}",
        path.display()
    );
    let row = |line: &str| {
        let numbers: Vec<f64> = line
            .strip_prefix(job)?
            .strip_prefix(',')?
            .split(',')
            .map(|n| n.trim().parse().unwrap())
            .collect();
        Some((numbers[0], (Watts(numbers[2]), Seconds(numbers[1]))))
    };
    let mut rows: Vec<_> = text.lines().filter_map(row).collect();
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    rows.into_iter().map(|(_, epoch)| epoch).collect()
}
