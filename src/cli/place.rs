//! `wattune place`.

use std::process::ExitCode;

use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::report::place::screen_page;
use crate::run::Screen as _;
use crate::run::{PlaceRequest, place_model};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Model: hub id, directory (config.json is enough), GGUF file, embedded:tiny; or a run or adapter directory
    model: String,
    /// Device profiles (see `wattune devices`), `auto` for this machine's processor, or profile files
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    devices: Vec<String>,
    /// Limits of power or clock: none, "300 W", "60 %", "1400 MHz" [default: none, 80 %, 60 %]
    #[arg(long, value_name = "POINT", value_delimiter = ',')]
    operating_point: Vec<String>,
    /// Stored formats: f32, bf16, f16, q8_0, q6_k, q5_0, q4_0, q4_k_m, nf4, int8 [default: bf16, q8_0, q4_k_m]
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    format: Vec<String>,
    /// Requests that run together [default: 1, 8, 32]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Tokens of a request's prompt
    #[arg(long, value_name = "N", default_value_t = 256)]
    prompt_tokens: usize,
    /// Tokens of its answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    generated_tokens: usize,
    /// Seconds a request may take, one or more
    #[arg(long, value_name = "S", value_delimiter = ',')]
    deadline: Vec<f64>,
    /// Also cut the model between each device and this server
    #[arg(long, value_name = "NAME")]
    server: Option<String>,
    /// Link to the server: wifi, lte, 3g or wired, with its Mbit/s as in lte:5
    #[arg(long, value_name = "LINK", default_value = "wifi", requires = "server")]
    link: String,
    /// Blocks that have to stay on the device
    #[arg(long, value_name = "N", default_value_t = 0, requires = "server")]
    keep_on_device: usize,
}

const EXAMPLES: &str = "\
Examples:
  wattune place runs/my-run                                                what a request takes on usual devices
  wattune place ./model --devices raspberry-pi-5,nvidia-l4 --deadline 2,10   the cheapest within 2 and within 10 seconds
  wattune place ./model --devices raspberry-pi-5 --server nvidia-l4 --link lte   on the device, on the server, or cut between them

Every combination is counted on device profiles; nothing is loaded, and config.json alone is enough.";

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let request = PlaceRequest {
        model: arguments.model.clone(),
        devices: arguments.devices.clone(),
        operating_points: arguments.operating_point.clone(),
        formats: arguments.format.clone(),
        batches: arguments.batch.clone(),
        prompt_tokens: arguments.prompt_tokens,
        generated_tokens: arguments.generated_tokens,
        deadlines: arguments.deadline.clone(),
        server: arguments.server.clone(),
        link: arguments.link.clone(),
        keep_on_device: arguments.keep_on_device,
    };
    let screen = Terminal::new(common.quiet);
    let placement = place_model(&request, screen.downloads())?;
    if common.json {
        out_json(&placement)
    } else {
        out(&screen_page(&placement))
    }
}
