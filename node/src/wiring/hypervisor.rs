//! Which hypervisor runs this node's guests, and under what.
//!
//! What is asked for has to work, and is refused by name where it does not. Left to the node, it is
//! Cloud Hypervisor where there is one that boots our kernel under KVM and lets itself be saved
//! ([`crate::vmm::probe`]), and QEMU everywhere else. The choice is made at each start; a guest
//! stays with the hypervisor that it began with, since that is part of its hardware.

use std::path::{Path, PathBuf};

use tokio::task;
use tracing::info;

use super::RunError;
use crate::base::chain::chain;
use crate::config::{AcceleratorChoice, Config, VmmChoice};
use crate::store::DataPaths;
use crate::template::{Catalog, GuestImages};
use crate::vmm::probe::{Attempt, ProbeOutcome, ProbeRequest, probe, prove_kvm as prove};
use crate::vmm::{Accelerator, Driver, Hardware, hardware_of};

/// The choice of hypervisor, and what led to it.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    /// Which it is.
    pub(super) driver: Driver,
    /// Its executable.
    pub(super) program: PathBuf,
    /// Its version, in its own words.
    pub(super) version: String,
    /// What it runs guests under.
    pub(super) accelerator: Accelerator,
    /// What new guests get.
    pub(super) hardware: Hardware,
}

/// Decides what runs guests, by running one.
pub(super) async fn choose(
    config: &Config,
    catalog: &Catalog,
    paths: &DataPaths,
) -> Result<Chosen, RunError> {
    let (config, guest) = (config.clone(), catalog.guest().clone());
    let cache = paths.cache();
    let chosen = task::spawn_blocking(move || decide(&config, &guest, Some(&cache))).await;
    let (chosen, _) = chosen.map_err(|err| RunError::Broke(err.to_string()))??;
    Ok(chosen)
}

/// As [`choose`], remembering nothing; with what was tried, for people.
pub(super) fn try_out(
    config: &Config,
    guest: &GuestImages,
) -> Result<(Chosen, Vec<String>), RunError> {
    decide(config, guest, None)
}

fn decide(
    config: &Config,
    guest: &GuestImages,
    cache: Option<&Path>,
) -> Result<(Chosen, Vec<String>), RunError> {
    let mut tried = Vec::new();
    let cloud = request(Driver::CloudHypervisor, config, guest, cache);
    match config.vmm {
        VmmChoice::CloudHypervisor => {
            let chosen = run(&cloud, config, &mut tried)?;
            return Ok((chosen, tried));
        }
        VmmChoice::Auto if wanted_if_it_works(&cloud, config) => {
            match run(&cloud, config, &mut tried) {
                Ok(chosen) => return Ok((chosen, tried)),
                Err(err) => {
                    let why = chain(&err);
                    info!(why, "Cloud Hypervisor does not run guests here");
                    tried.push(format!("cloud-hypervisor: {why}"));
                }
            }
        }
        VmmChoice::Auto | VmmChoice::Qemu => {}
    }
    let qemu = request(Driver::Qemu, config, guest, cache);
    let chosen = run(&qemu, config, &mut tried)?;
    Ok((chosen, tried))
}

/// Runs the smallest guest under KVM by the hypervisor that is wanted, and says so in a sentence.
pub(super) fn prove_kvm(config: &Config) -> Result<String, String> {
    let cloud = find_program(&config.cloud_hypervisor);
    let driver = match config.vmm {
        VmmChoice::CloudHypervisor => Driver::CloudHypervisor,
        VmmChoice::Auto if cloud.is_file() => Driver::CloudHypervisor,
        VmmChoice::Auto | VmmChoice::Qemu => Driver::Qemu,
    };
    let (program, saved) = match driver {
        Driver::CloudHypervisor => (cloud, ", was saved and went on"),
        Driver::Qemu => (find_program(&config.qemu), ""),
    };
    let name = driver.name();
    match prove(driver, &program) {
        Ok(took) => Ok(format!("a guest ran in {name}{saved}, all in {took:.0?}")),
        Err(why) => Err(format!("{name}: {why}")),
    }
}

/// Whether it is worth ten seconds to see whether it runs guests.
fn wanted_if_it_works(cloud: &ProbeRequest, config: &Config) -> bool {
    cloud.program.is_file() && config.accelerator != AcceleratorChoice::Tcg
}

fn run(
    request: &ProbeRequest,
    config: &Config,
    tried: &mut Vec<String>,
) -> Result<Chosen, RunError> {
    let outcome = probe(request)?;
    let driver = request.driver;
    for attempt in &outcome.attempts {
        note(driver, attempt, outcome.remembered);
        let (name, detail) = (&attempt.accelerator, &attempt.detail);
        tried.push(format!("{} under {name}: {detail}", driver.name()));
    }
    let accelerator = pick(config.accelerator, &outcome)?;
    Ok(Chosen {
        driver,
        program: request.program.clone(),
        hardware: hardware_of(driver, &outcome.version, accelerator)?,
        version: outcome.version,
        accelerator,
    })
}

fn note(driver: Driver, attempt: &Attempt, remembered: bool) {
    let (name, ok, detail) = (&attempt.accelerator, attempt.ok, &attempt.detail);
    let vmm = driver.name();
    info!(
        vmm,
        accelerator = name,
        ok,
        detail,
        remembered,
        "tried to run a guest"
    );
}

fn request(
    driver: Driver,
    config: &Config,
    guest: &GuestImages,
    cache: Option<&Path>,
) -> ProbeRequest {
    let (program, remembered) = match driver {
        Driver::Qemu => (&config.qemu, "probe.json"),
        Driver::CloudHypervisor => (&config.cloud_hypervisor, "probe-cloud-hypervisor.json"),
    };
    ProbeRequest {
        driver,
        program: find_program(program),
        kernel: guest.kernel.clone(),
        initramfs: guest.initramfs.clone(),
        cache: cache.map(|dir| dir.join(remembered)),
        forgoable: driver != Driver::Qemu && config.vmm == VmmChoice::Auto,
    }
}

fn pick(choice: AcceleratorChoice, outcome: &ProbeOutcome) -> Result<Accelerator, RunError> {
    let wanted = match choice {
        AcceleratorChoice::Auto => return Ok(outcome.accelerator),
        AcceleratorChoice::Kvm => Accelerator::Kvm,
        AcceleratorChoice::Tcg => Accelerator::Tcg,
    };
    let tried = outcome
        .attempts
        .iter()
        .find(|attempt| attempt.accelerator == wanted.name());
    match tried {
        Some(attempt) if !attempt.ok => Err(RunError::Accelerator {
            wanted: wanted.name(),
            why: attempt.detail.clone(),
        }),
        // Emulation is not tried where KVM works; it needs nothing that KVM does not.
        Some(_) | None => Ok(wanted),
    }
}

/// Where a program lies; a bare name is looked up in `PATH`, as a shell would.
pub(super) fn find_program(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(program));
    places
        .find(|place| place.is_file())
        .unwrap_or_else(|| program.to_owned())
}
