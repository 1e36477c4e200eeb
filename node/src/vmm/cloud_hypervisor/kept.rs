//! The device state of a guest, as this driver keeps it: the file `state`.
//!
//! ```text
//! magic 8 | version 4 | name bytes 4 | machine's name | foundation bytes 8 | state bytes 8 | both documents
//! ```
//!
//! Little-endian. The *foundation* is what of the machine cannot be made anew on another host: the
//! processor's features that the guest was promised, and the layout of its memory. The *state* is
//! Cloud Hypervisor's own document, which we never look into. The rest of its configuration is not
//! kept at all.
//!
//! The file is covered by a digest in the snapshot's signed manifest; what is read here is checked
//! all the same, as if a stranger had written it.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::pager::post_copy::Slot;
use crate::vmm::cloud_hypervisor::config::VmConfig;
use crate::vmm::cloud_hypervisor::layout::{LayoutError, MemoryLayout};
use crate::vmm::cloud_hypervisor::offload::{MAX_CONFIG_BYTES, MAX_STATE_BYTES};
use crate::vmm::error::ForeignStateError;
use crate::vmm::hardware::Hardware;

/// What the file begins with.
pub const MAGIC: [u8; 8] = *b"WRNCHVST";
/// Its layout.
const VERSION: u32 = 1;
/// Longer than any machine's name.
const MAX_NAME_BYTES: usize = 64;
/// Bytes before the machine's name.
const BEFORE_NAME: usize = 8 + 4 + 4;
/// Bytes of a state that [`check`] looks at.
pub const HEAD_BYTES: usize = BEFORE_NAME + MAX_NAME_BYTES;
/// The largest file that can be one.
pub const MAX_BYTES: u64 = HEAD_BYTES as u64 + 16 + MAX_CONFIG_BYTES + MAX_STATE_BYTES;
/// The most entries of a processor's features: a host tells 59.
const MAX_CPUID: usize = 512;

/// One answer of the processor about its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    function: u32,
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// What of a machine has to come with its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Foundation {
    common_cpuid: Vec<CpuidEntry>,
    memory_manager_data: MemoryLayout,
}

/// The configuration that Cloud Hypervisor sends with a guest, as far as it is kept.
#[derive(Deserialize)]
struct Sent {
    common_cpuid: Vec<CpuidEntry>,
    memory_manager_data: MemoryLayout,
}

/// The configuration for the guest's next host.
#[derive(Serialize)]
struct Giving<'a> {
    vm_config: &'a VmConfig,
    common_cpuid: &'a [CpuidEntry],
    memory_manager_data: &'a MemoryLayout,
}

/// A saved guest's devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The machine's name.
    pub machine: String,
    /// What the machine is built upon.
    pub foundation: Foundation,
    /// Cloud Hypervisor's document.
    pub state: Vec<u8>,
}

/// Why documents make no saved guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptError {
    /// It is no file of ours, or of another machine.
    #[error(transparent)]
    Foreign(#[from] ForeignStateError),
    /// It is cut short, or longer than it says.
    #[error("the device state is garbled")]
    Garbled,
    /// A document is not what it should be.
    #[error("read its {what}")]
    Document {
        /// Which.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// The processor has more features than there are.
    #[error("it lists {found} groups of processor features")]
    TooManyFeatures {
        /// How many.
        found: usize,
    },
    /// The memory's layout is not the guest's.
    #[error("place the guest's memory")]
    Layout(#[from] LayoutError),
}

impl Foundation {
    /// What is kept of `config`, the document that came with a guest of `memory_bytes`.
    ///
    /// # Errors
    /// See [`KeptError`].
    pub fn of_config(config: &[u8], memory_bytes: u64) -> Result<Self, KeptError> {
        let what = "configuration";
        let sent: Sent = serde_json::from_slice(config)
            .map_err(|source| KeptError::Document { what, source })?;
        let foundation = Self {
            common_cpuid: sent.common_cpuid,
            memory_manager_data: sent.memory_manager_data.unmarked(),
        };
        foundation.check(memory_bytes)?;
        Ok(foundation)
    }

    /// Whether it is that of a guest with `memory_bytes`.
    ///
    /// # Errors
    /// See [`KeptError`].
    pub fn check(&self, memory_bytes: u64) -> Result<(), KeptError> {
        let found = self.common_cpuid.len();
        if found > MAX_CPUID {
            return Err(KeptError::TooManyFeatures { found });
        }
        Ok(self.memory_manager_data.check(memory_bytes)?)
    }

    /// The memory slots that have to be given.
    #[must_use]
    pub fn slots(&self) -> Vec<u32> {
        self.memory_manager_data.slots()
    }

    /// Where the guest sees what of its memory.
    #[must_use]
    pub fn places(&self) -> Vec<Slot> {
        self.memory_manager_data.places()
    }

    /// The document for the guest's next host, whose own machine is `machine`.
    ///
    /// # Errors
    /// Never, for what we build; a document that cannot be written.
    pub fn config_with(&self, machine: &VmConfig) -> Result<Vec<u8>, KeptError> {
        let giving = Giving {
            vm_config: machine,
            common_cpuid: &self.common_cpuid,
            memory_manager_data: &self.memory_manager_data,
        };
        let what = "configuration";
        serde_json::to_vec(&giving).map_err(|source| KeptError::Document { what, source })
    }
}

impl Kept {
    /// The file's bytes.
    ///
    /// # Errors
    /// Never, for what [`Kept::decode`] or [`Foundation::of_config`] has checked.
    pub fn encode(&self) -> Result<Vec<u8>, KeptError> {
        let what = "foundation";
        let foundation = serde_json::to_vec(&self.foundation)
            .map_err(|source| KeptError::Document { what, source })?;
        let name = self.machine.as_bytes();
        let name_bytes = u32::try_from(name.len()).map_err(|_| KeptError::Garbled)?;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + foundation.len() + self.state.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(name_bytes.to_le_bytes());
        bytes.extend(name);
        bytes.extend((foundation.len() as u64).to_le_bytes());
        bytes.extend((self.state.len() as u64).to_le_bytes());
        bytes.extend(foundation);
        bytes.extend(&self.state);
        Ok(bytes)
    }

    /// The guest in `bytes`, whose memory has `memory_bytes`.
    ///
    /// # Errors
    /// See [`KeptError`].
    pub fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, KeptError> {
        let (machine, rest) = machine_in(bytes)?;
        let (foundation_bytes, rest) = length_from(rest).ok_or(KeptError::Garbled)?;
        let (state_bytes, rest) = length_from(rest).ok_or(KeptError::Garbled)?;
        let split = rest.split_at_checked(foundation_bytes);
        let (foundation, state) = split.ok_or(KeptError::Garbled)?;
        if state.len() != state_bytes {
            return Err(KeptError::Garbled);
        }
        let document = |what| move |source| KeptError::Document { what, source };
        let foundation: Foundation =
            serde_json::from_slice(foundation).map_err(document("foundation"))?;
        foundation.check(memory_bytes)?;
        // Ours to carry and not to understand, but whole.
        serde_json::from_slice::<IgnoredAny>(state).map_err(document("state"))?;
        Ok(Self {
            machine: machine.to_owned(),
            foundation,
            state: state.to_vec(),
        })
    }
}

/// See [`crate::vmm::check_state`].
///
/// # Errors
/// See [`ForeignStateError`].
pub fn check(head: &[u8], hardware: &Hardware) -> Result<(), ForeignStateError> {
    let (found, _) = machine_in(head)?;
    if found == hardware.machine {
        return Ok(());
    }
    Err(ForeignStateError::OtherMachine {
        found: found.to_owned(),
        wanted: hardware.machine.clone(),
    })
}

fn machine_in(bytes: &[u8]) -> Result<(&str, &[u8]), ForeignStateError> {
    use ForeignStateError::NotAState;
    let rest = bytes.strip_prefix(&MAGIC).ok_or(NotAState)?;
    let (found, rest) = u32_from(rest).ok_or(NotAState)?;
    if found != VERSION {
        return Err(ForeignStateError::UnknownVersion {
            found,
            known: VERSION,
        });
    }
    let (length, rest) = u32_from(rest).ok_or(NotAState)?;
    let length = usize::try_from(length).map_err(|_| NotAState)?;
    if length > MAX_NAME_BYTES {
        return Err(NotAState);
    }
    let (name, rest) = rest.split_at_checked(length).ok_or(NotAState)?;
    let plain = name.iter().all(u8::is_ascii_graphic);
    let name = std::str::from_utf8(name).ok().filter(|_| plain);
    Ok((name.ok_or(NotAState)?, rest))
}

fn u32_from(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*word), rest))
}

fn length_from(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*word)).ok()?;
    Some((length, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::vmm::cloud_hypervisor::config::tests::spec;
    use crate::vmm::cloud_hypervisor::config::{MemoryFrom, machine};
    use crate::vmm::cloud_hypervisor::layout::tests::of;

    const BYTES: u64 = 64 << 20;

    fn sent() -> Value {
        let feature = json!({
            "function": 1, "index": 0, "flags": 0,
            "eax": 657_009, "ebx": 67_584, "ecx": 4_160_238_083_u32, "edx": 395_049_983,
        });
        json!({
            "vm_config": { "disks": [{ "path": "/etc/shadow" }] },
            "common_cpuid": [feature],
            "memory_manager_data": of(BYTES),
        })
    }

    fn kept() -> Kept {
        let config = sent().to_string();
        Kept {
            machine: "cloud-hypervisor-53/1".into(),
            foundation: Foundation::of_config(config.as_bytes(), BYTES).expect("its own"),
            state: br#"{"snapshots":{}}"#.to_vec(),
        }
    }

    fn hardware(machine: &str) -> Hardware {
        Hardware {
            machine: machine.into(),
            cpu: "host-x".into(),
        }
    }

    #[test]
    fn a_kept_guest_survives_the_file() {
        let bytes = kept().encode().expect("written");
        assert_eq!(Kept::decode(&bytes, BYTES).expect("read"), kept());
        let head = &bytes[..HEAD_BYTES.min(bytes.len())];
        check(head, &hardware("cloud-hypervisor-53/1")).expect("of this machine");
        let other = check(head, &hardware("cloud-hypervisor-54/1"));
        assert!(
            matches!(other, Err(ForeignStateError::OtherMachine { .. })),
            "{other:?}"
        );
    }

    /// The heart of the rewriting: a configuration is made of the new host's facts, the promised
    /// features and the layout. Whatever else the old host had said is gone.
    #[test]
    fn nothing_of_the_old_hosts_configuration_reaches_the_new_host() {
        let machine = machine(&spec(), MemoryFrom::HandOver).expect("can be built");
        let config = kept().foundation.config_with(&machine).expect("written");
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        let fields: Vec<_> = config.as_object().expect("an object").keys().collect();
        assert_eq!(fields, ["common_cpuid", "memory_manager_data", "vm_config"]);
        assert_eq!(
            config["vm_config"],
            serde_json::to_value(&machine).expect("JSON")
        );
        assert_eq!(config["common_cpuid"], sent()["common_cpuid"]);
        assert_eq!(config["memory_manager_data"], of(BYTES));
        assert!(!config.to_string().contains("/etc/shadow"));
    }

    #[test]
    fn documents_that_are_not_as_ours_are_refused() {
        for (path, value) in [
            ("/common_cpuid/0/eax", json!(-1)),
            ("/common_cpuid/0/eax", json!(1_u64 << 32)),
            ("/common_cpuid/0", json!({ "function": 1 })),
            ("/memory_manager_data/boot_ram", json!(0)),
            ("/memory_manager_data", json!({})),
        ] {
            let mut sent = sent();
            *sent.pointer_mut(path).expect(path) = value;
            let refused = Foundation::of_config(sent.to_string().as_bytes(), BYTES);
            assert!(refused.is_err(), "{path}");
        }
        let mut many = sent();
        many["common_cpuid"] = vec![many["common_cpuid"][0].clone(); MAX_CPUID + 1].into();
        let refused = Foundation::of_config(many.to_string().as_bytes(), BYTES);
        assert!(matches!(refused, Err(KeptError::TooManyFeatures { .. })));
    }

    #[test]
    fn a_file_cut_short_or_longer_or_of_another_version_is_refused() {
        let bytes = kept().encode().expect("written");
        for cut in 0..bytes.len() {
            assert!(Kept::decode(&bytes[..cut], BYTES).is_err(), "{cut}");
        }
        let longer = [&bytes[..], b" "].concat();
        assert!(matches!(
            Kept::decode(&longer, BYTES),
            Err(KeptError::Garbled)
        ));
        let mut newer = bytes;
        newer[8] = 2;
        let refused = Kept::decode(&newer, BYTES);
        assert!(
            matches!(
                refused,
                Err(KeptError::Foreign(ForeignStateError::UnknownVersion {
                    found: 2,
                    ..
                }))
            ),
            "{refused:?}"
        );
    }

    /// Anything that JSON can say, of some depth.
    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            "[/a-z\"{}]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z_]{1,12}", inner, 0..4).prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        /// Whatever a peer says of its machine, and whatever else it says: what the next host is told
        /// is made of that host's facts, to the byte.
        #[test]
        fn what_a_peer_says_of_its_machine_changes_nothing(
            vm_config in anything(), more in anything(), name in "[a-z]{1,9}", disk in "/[a-z]{1,20}",
        ) {
            let mut other = sent();
            other["vm_config"] = vm_config;
            other[&format!("x_{name}")] = more;
            let foundation = Foundation::of_config(other.to_string().as_bytes(), BYTES);
            let foundation = foundation.expect("its foundation is sound");
            let mut here = spec();
            here.root_disk = Some(disk.into());
            let machine = machine(&here, MemoryFrom::HandOver).expect("can be built");
            prop_assert_eq!(
                foundation.config_with(&machine).expect("written"),
                kept().foundation.config_with(&machine).expect("written")
            );
        }

        /// The promised features and the layout go over as they are, and twice is as once.
        #[test]
        fn what_is_kept_is_given_back_as_it_was(eax: u32, edx: u32, index in 0_u32..9) {
            let mut other = sent();
            other["common_cpuid"][0]["eax"] = eax.into();
            other["common_cpuid"][0]["edx"] = edx.into();
            other["common_cpuid"][0]["index"] = index.into();
            let of = |config: &[u8]| Foundation::of_config(config, BYTES).expect("sound");
            let foundation = of(other.to_string().as_bytes());
            let machine = machine(&spec(), MemoryFrom::HandOver).expect("can be built");
            let given = foundation.config_with(&machine).expect("written");
            prop_assert_eq!(of(&given), foundation);
            let given: Value = serde_json::from_slice(&given).expect("JSON");
            prop_assert_eq!(&given["common_cpuid"], &other["common_cpuid"]);
        }

        #[test]
        fn a_damaged_file_is_refused_or_another_guest_and_never_a_panic(
            at in 0_usize..4000, with: u8,
        ) {
            let mut bytes = kept().encode().expect("written");
            let at = at % bytes.len();
            bytes[at] = with;
            if let Ok(read) = Kept::decode(&bytes, BYTES) {
                prop_assert!(read.foundation.check(BYTES).is_ok());
            }
        }
    }
}
