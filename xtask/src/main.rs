//! Development commands of Fulmar: `cargo xtask --help`.
//!
//! Everything here runs other tools, reads files of this workspace, and reports. Progress goes to standard error;
//! standard output carries only what a command is asked for, so `cargo xtask test` closes it with one summary line.

mod client_rig;
mod footprint;
mod fuzz;
mod instructions;
mod layering;
mod load;
mod profile;
mod rig;
mod run;
mod sim;
mod steps;
mod tally;
mod tool;

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::profile::ProfileArgs;
use crate::rig::RigArgs;
use crate::run::Workspace;
use crate::sim::{BarsArgs, DaysArgs, SimArgs};
use crate::steps::{Options, StepName};
use crate::tally::Tally;

/// Development commands of Fulmar.
///
/// On a fresh machine nothing but Rust, a C and a C++ compiler is needed. Tools that are missing (cargo-nextest,
/// cargo-deny, cargo-fuzz) are built once into target/tools; your own ~/.cargo/bin is left alone.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_long_help = "Examples:\n  \
        cargo xtask test                       every check, as CI runs it\n  \
        cargo xtask test --only fmt,clippy     before a commit\n  \
        cargo xtask test --skip crash,fuzz     everything that ends within minutes\n  \
        cargo xtask fuzz frame_decode --seconds 600\n  \
        cargo xtask crash --rounds 10000\n  \
        cargo xtask power-cut --images 100000\n  \
        cargo xtask store-kill --rounds 10000 --open-rounds 3000\n  \
        cargo xtask client-kill --rounds 10000\n  \
        cargo xtask sim --seeds 100000 --json campaign.json\n  \
        cargo xtask sim --from 131 --seeds 1 --log seed-131.log\n  \
        cargo xtask bars --only blackout\n  \
        cargo xtask days --only normal\n  \
        cargo xtask bench codec\n  \
        cargo xtask instructions --keep\n  \
        cargo xtask profile fanout\n  \
        cargo xtask load --phones 20000 --rate 0\n  \
        cargo xtask peers --only fulmar,mosquitto --work A"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the checks: quick ones first, then tests, the crash loop and short fuzzing
    ///
    /// Every step runs even if one before it failed. The last line is `N passed, N failed`: tests as their runners
    /// counted them, and each other check (fmt, clippy, a fuzz target, ..) as one. The exit status is 0 only if
    /// nothing failed.
    Test(TestArgs),
    /// Fuzz one target, or all one after the other
    ///
    /// Uses the nightly toolchain with AddressSanitizer if it is installed, else stable without. New inputs are
    /// kept under target/fuzz, findings under fuzz/artifacts.
    Fuzz {
        /// Target to fuzz, by its name in fuzz/Cargo.toml; without it, all
        target: Option<String>,
        /// Time for each target
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u64,
    },
    /// Kill a gateway under load again and again, and check each time that nothing acked is lost
    Crash {
        /// How often the gateway is killed
        #[arg(long, value_name = "N", default_value_t = 200)]
        rounds: u32,
    },
    /// Cut the power of the store at any point, open what the disk may hold then, and compare everything
    PowerCut {
        /// Images for each engine
        #[arg(long, value_name = "N", default_value_t = 2_000)]
        images: u64,
        #[command(flatten)]
        args: RigArgs,
    },
    /// Kill the store at work and while it opens, and compare what it leaves with what was acknowledged
    StoreKill {
        /// How often each engine's store is killed at work
        #[arg(long, value_name = "N", default_value_t = 200)]
        rounds: u64,
        /// How often, besides, while it opens
        #[arg(long, value_name = "N", default_value_t = 100)]
        open_rounds: u64,
        #[command(flatten)]
        args: RigArgs,
    },
    /// Kill apps that use the SDK over a bad network, again and again: what was queued is stored once and in order, and
    /// every end is told
    ClientKill {
        /// How often an app is killed
        #[arg(long, value_name = "N", default_value_t = 500)]
        rounds: u64,
        /// What every choice follows from; without it, another one each time
        #[arg(long, value_name = "S")]
        seed: Option<u64>,
    },
    /// Damage files of the store: every answer must be right, or refused with a report
    Damage {
        /// Damaged folders for each engine
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        images: u64,
        #[command(flatten)]
        args: RigArgs,
    },
    /// Run whole worlds in virtual time, one for each seed: real SDK, real gateway, bad network, faults, and a checker
    Sim {
        /// How many seeds
        #[arg(long, value_name = "N", default_value_t = 2_000)]
        seeds: u64,
        #[command(flatten)]
        args: SimArgs,
    },
    /// Measure what the weak-network bars are about, in virtual time
    Bars(BarsArgs),
    /// Measure what typical days cost a phone (packets, bytes, wake-ups, connections), in virtual time
    Days(DaysArgs),
    /// Build the smallest app with the SDK for size, and measure it and its memory against a gateway on loopback
    Footprint,
    /// Count the gateway's instructions per delivery, and compare them with those kept in benches/instructions.toml
    Instructions {
        /// Keep what is counted now
        #[arg(long)]
        keep: bool,
    },
    /// Draw a flame graph of the gateway at work, and list its busiest functions
    Profile(ProfileArgs),
    /// Run the benchmarks, each beside the floor it is measured against
    Bench {
        /// Benchmark to run, by its name in benches/Cargo.toml; without it, all
        name: Option<String>,
        /// Passed on to the benchmark
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Thousands of phones against a gateway: `cargo xtask load --help` says what they can do
    ///
    /// What follows is passed on to `fulmar-load`, which is built first, as is the gateway, both for release.
    #[command(disable_help_flag = true)]
    Load {
        /// Passed on
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Measure Fulmar and other servers at the same work, side by side: `cargo xtask peers --help` says at which
    ///
    /// What follows is passed on to `fulmar-peers`, which is built first, as is the gateway, both for release.
    #[command(disable_help_flag = true)]
    Peers {
        /// Passed on
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<std::ffi::OsString>,
    },
}

#[derive(Debug, clap::Args)]
struct TestArgs {
    /// Run only these steps
    #[arg(long, value_name = "STEPS", value_delimiter = ',', value_enum)]
    only: Vec<StepName>,
    /// Leave these steps out
    #[arg(long, value_name = "STEPS", value_delimiter = ',', value_enum)]
    skip: Vec<StepName>,
    /// Show the steps and what each of them does, and run nothing
    #[arg(long)]
    list: bool,
    /// How often the crash step kills a gateway
    #[arg(long, value_name = "N", default_value_t = 200)]
    crash_rounds: u32,
    /// Time for each fuzz target, in seconds
    #[arg(long, value_name = "N", default_value_t = 30)]
    fuzz_seconds: u64,
}

fn main() -> ExitCode {
    match carry_out(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Carries one command out; `false` is a failure that is already reported.
fn carry_out(command: Command) -> anyhow::Result<bool> {
    let workspace = Workspace::locate()?;
    match command {
        Command::Test(args) if args.list => {
            print(steps::list().trim_end());
            Ok(true)
        }
        Command::Test(args) => {
            let options = Options { crash_rounds: args.crash_rounds, fuzz_seconds: args.fuzz_seconds };
            let selected = steps::select(&args.only, &args.skip);
            anyhow::ensure!(!selected.is_empty(), "no step is left to run; see `cargo xtask test --list`");
            let total = steps::run(&workspace, &selected, options);
            print(&total.to_string());
            Ok(total.is_success())
        }
        Command::Fuzz { target, seconds } => {
            let targets = fuzz::targets(&workspace)?;
            let chosen = match target {
                None => targets,
                Some(name) if targets.contains(&name) => vec![name],
                Some(name) => {
                    anyhow::bail!("no fuzz target `{name}`; fuzz/Cargo.toml has: {}", targets.join(", "))
                }
            };
            let total = fuzz::run_all(&workspace, &chosen, seconds, fuzz::Progress::Shown)?;
            print(&total.to_string());
            Ok(total.is_success())
        }
        Command::Crash { rounds } => {
            let total = steps::crash(&workspace, Options { crash_rounds: rounds, fuzz_seconds: 0 })?;
            print(&total.to_string());
            Ok(total.is_success())
        }
        Command::PowerCut { images, args } => closed(steps::power_cut(&workspace, images, &args)?),
        Command::StoreKill { rounds, open_rounds, args } => {
            closed(steps::store_kill(&workspace, rounds, open_rounds, &args)?)
        }
        Command::ClientKill { rounds, seed } => closed(client_rig::kill(&workspace, rounds, seed, false)?),
        Command::Damage { images, args } => closed(steps::damage(&workspace, images, &args)?),
        Command::Sim { seeds, args } => closed(sim::worlds(&workspace, seeds, &args)?),
        Command::Bars(args) => sim::bars(&workspace, &args),
        Command::Days(args) => sim::days(&workspace, &args),
        Command::Footprint => {
            print(footprint::measure(&workspace)?.trim_end());
            Ok(true)
        }
        Command::Instructions { keep } => closed(instructions::count(&workspace, keep)?),
        Command::Profile(args) => {
            print(profile::draw(&workspace, args)?.trim_end());
            Ok(true)
        }
        Command::Bench { name, args } => {
            let mut command = workspace.cargo(["bench", "--package", "fulmar-benches"]);
            if let Some(name) = name {
                command.args(["--bench", &name]);
            } else {
                command.arg("--benches");
            }
            let status = command.arg("--").args(args).status().context("can't start cargo")?;
            Ok(status.success())
        }
        Command::Load { args } => {
            let mut command = load::command(&workspace, args)?;
            // In place of this process: whoever ends it means the generator.
            let error = command.exec();
            Err(error).context("the load generator can't be started")
        }
        Command::Peers { args } => {
            let packages = ["build", "--release", "--package", "fulmar-peers", "--package", "fulmar-gateway"];
            let status = workspace.cargo(packages).status().context("can't start cargo")?;
            anyhow::ensure!(status.success(), "the runner can't be built");
            let program = workspace.target().join("release/fulmar-peers");
            // In place of this process: whoever ends it means the runner, which cleans up.
            // Files are named from where we are called.
            let here = std::env::current_dir()?;
            let error = workspace.command(&program).current_dir(here).args(args).exec();
            Err(error).with_context(|| format!("{} can't be started", program.display()))
        }
    }
}

/// Ends a command with its count.
fn closed(total: Tally) -> anyhow::Result<bool> {
    print(&total.to_string());
    Ok(total.is_success())
}

/// Prints what the command was asked for.
#[expect(clippy::print_stdout, reason = "the one place that writes results to standard output")]
fn print(text: &str) {
    println!("{text}");
}
