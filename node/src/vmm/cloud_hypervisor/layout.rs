//! Where the guest sees its memory, as Cloud Hypervisor notes it for itself. Pure.
//!
//! It comes with a saved guest and decides what of the memfd is mapped where, so it is believed only
//! where it says what it must: one zone, every byte of the memory once, no slot twice. A slot that
//! was left out would be no error at the VMM: the guest would run on zeros.

use serde::{Deserialize, Serialize};

use crate::pager::post_copy::Slot;
use crate::vmm::cloud_hypervisor::config::ZONE;
use crate::vmm::cloud_hypervisor::offload::MAX_SLOTS;

/// What a page is to every layout.
const PAGE_BYTES: u64 = 4096;
/// As many as Cloud Hypervisor has places for hot-plugged memory, of which we use none.
const MAX_LIST: usize = 64;

/// The layout, in Cloud Hypervisor's own words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryLayout {
    memory_ranges: Ranges,
    guest_ram_mappings: Vec<RamMapping>,
    start_of_device_area: u64,
    boot_ram: u64,
    current_ram: u64,
    arch_mem_regions: Vec<ArchRegion>,
    hotplug_slots: Vec<HotplugSlot>,
    next_memory_slot: u32,
    selected_slot: usize,
    next_hotplug_slot: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ranges {
    data: Vec<Range>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    gpa: u64,
    length: u64,
}

/// A memory slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RamMapping {
    slot: u32,
    gpa: u64,
    size: u64,
    zone_id: String,
    virtio_mem: bool,
    file_offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ArchRegion {
    base: u64,
    size: u64,
    r_type: RegionType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum RegionType {
    Ram,
    SubRegion,
    Reserved,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HotplugSlot {
    base: u64,
    length: u64,
    active: bool,
    inserting: bool,
    removing: bool,
}

/// Why a layout is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A number of it is not that of the guest.
    #[error("its {what} is {found}, and must be {wanted}")]
    Differs {
        /// Which.
        what: &'static str,
        /// What it says.
        found: u64,
        /// What the guest has.
        wanted: u64,
    },
    /// A slot is not as ours are.
    #[error("memory slot {slot} {what}")]
    Slot {
        /// Which.
        slot: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There are more of something than any guest of ours has.
    #[error("it has too many {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
    },
    /// A part of the memory is in no slot.
    #[error("memory from {from:#x} on is in no slot, or in two")]
    Gap {
        /// Where.
        from: u64,
    },
}

impl MemoryLayout {
    /// As it is for a guest that has never been saved: a save notes in it which ranges it would
    /// write into a file, which is for another way of saving.
    #[must_use]
    pub fn unmarked(mut self) -> Self {
        self.memory_ranges.data.clear();
        self
    }

    /// Whether it is that of a guest with `memory_bytes`.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn check(&self, memory_bytes: u64) -> Result<(), LayoutError> {
        for (what, found, wanted) in [
            ("memory at boot", self.boot_ram, memory_bytes),
            ("memory now", self.current_ram, memory_bytes),
            ("hot-plugged memory", self.next_hotplug_slot as u64, 0),
            ("inline memory", self.memory_ranges.data.len() as u64, 0),
        ] {
            if found != wanted {
                return Err(LayoutError::Differs {
                    what,
                    found,
                    wanted,
                });
            }
        }
        for (what, count, most) in [
            ("slots", self.guest_ram_mappings.len(), MAX_SLOTS),
            ("regions", self.arch_mem_regions.len(), MAX_LIST),
            ("places for memory", self.hotplug_slots.len(), MAX_LIST),
        ] {
            if count > most {
                return Err(LayoutError::TooMany { what });
            }
        }
        if self
            .hotplug_slots
            .iter()
            .any(|it| it.active || it.length > 0)
        {
            let what = "pieces of hot-plugged memory";
            return Err(LayoutError::TooMany { what });
        }
        self.guest_ram_mappings.iter().try_for_each(check_slot)?;
        self.check_cover(memory_bytes)
    }

    /// The slots' numbers. They need not be those of an earlier save.
    #[must_use]
    pub fn slots(&self) -> Vec<u32> {
        self.guest_ram_mappings.iter().map(|it| it.slot).collect()
    }

    /// Every byte of the memfd is in one slot, and no two slots share an address or a number.
    fn check_cover(&self, memory_bytes: u64) -> Result<(), LayoutError> {
        let mut by_offset: Vec<_> = self.guest_ram_mappings.iter().collect();
        by_offset.sort_by_key(|it| it.file_offset);
        let mut from = 0;
        for mapping in by_offset {
            let end = mapping.file_offset.checked_add(mapping.size);
            match end.filter(|end| *end <= memory_bytes && mapping.file_offset == from) {
                Some(end) => from = end,
                None => return Err(LayoutError::Gap { from }),
            }
        }
        if from != memory_bytes {
            return Err(LayoutError::Gap { from });
        }
        let mut by_address: Vec<_> = self.guest_ram_mappings.iter().collect();
        by_address.sort_by_key(|it| it.gpa);
        for pair in by_address.windows(2) {
            if pair[0].gpa + pair[0].size > pair[1].gpa {
                let (slot, what) = (pair[1].slot, "begins inside another");
                return Err(LayoutError::Slot { slot, what });
            }
        }
        let mut numbers = self.slots();
        numbers.sort_unstable();
        match numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(LayoutError::Slot {
                slot: pair[0],
                what: "is there twice",
            }),
            None => Ok(()),
        }
    }
}

impl MemoryLayout {
    /// Where the guest sees what of its memory.
    #[must_use]
    pub fn places(&self) -> Vec<Slot> {
        let place = |mapping: &RamMapping| Slot {
            gpa: mapping.gpa,
            bytes: mapping.size,
            image: mapping.file_offset,
        };
        self.guest_ram_mappings.iter().map(place).collect()
    }
}

fn check_slot(mapping: &RamMapping) -> Result<(), LayoutError> {
    let numbers = [mapping.gpa, mapping.size, mapping.file_offset];
    let whole = numbers.iter().all(|it| it.is_multiple_of(PAGE_BYTES));
    let what = if mapping.zone_id != ZONE {
        "is of another zone"
    } else if mapping.virtio_mem {
        "is hot-plugged"
    } else if !whole || mapping.size == 0 {
        "is not made of whole pages"
    } else if mapping.gpa.checked_add(mapping.size).is_none() {
        "ends past the last address"
    } else {
        return Ok(());
    };
    let slot = mapping.slot;
    Err(LayoutError::Slot { slot, what })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const GIB: u64 = 1 << 30;

    /// What Cloud Hypervisor 53 says of a guest with `bytes`.
    pub(in super::super) fn of(bytes: u64) -> Value {
        let gap = (3 * GIB).min(bytes);
        let mut mappings = vec![mapping(0, 0, gap, 0)];
        if bytes > gap {
            mappings.push(mapping(1, 4 * GIB, bytes - gap, gap));
        }
        let free = json!({
            "base": 0, "length": 0, "active": false, "inserting": false, "removing": false,
        });
        json!({
            "memory_ranges": { "data": [] },
            "guest_ram_mappings": mappings,
            "start_of_device_area": 4_294_967_296_u64,
            "boot_ram": bytes, "current_ram": bytes,
            "arch_mem_regions": [
                { "base": 0, "size": 3_221_225_472_u64, "r_type": "Ram" },
                { "base": 4_294_967_296_u64, "size": u64::MAX, "r_type": "Ram" },
                { "base": 3_221_225_472_u64, "size": 671_088_640, "r_type": "SubRegion" },
                { "base": 3_892_314_112_u64, "size": 268_435_456, "r_type": "Reserved" },
            ],
            "hotplug_slots": vec![free; 8],
            "next_memory_slot": 2, "selected_slot": 0, "next_hotplug_slot": 0,
        })
    }

    fn mapping(slot: u32, gpa: u64, size: u64, file_offset: u64) -> Value {
        json!({
            "slot": slot, "gpa": gpa, "size": size, "zone_id": "ram", "virtio_mem": false,
            "file_offset": file_offset,
        })
    }

    fn parsed(document: Value) -> MemoryLayout {
        serde_json::from_value(document).expect("a layout")
    }

    fn with_mappings(bytes: u64, mappings: Vec<Value>) -> MemoryLayout {
        let mut document = of(bytes);
        document["guest_ram_mappings"] = mappings.into();
        parsed(document)
    }

    #[test]
    fn the_layouts_of_small_and_large_guests_are_believed() {
        for bytes in [64 << 20, 3 * GIB, 8 * GIB] {
            let layout = parsed(of(bytes));
            layout.check(bytes).expect("its own");
            assert!(layout.check(bytes + PAGE_BYTES).is_err());
            let again = serde_json::to_value(&layout).expect("JSON");
            assert_eq!(again, of(bytes));
            let mut saved = of(bytes);
            saved["memory_ranges"]["data"] = json!([{ "gpa": 0, "length": bytes }]);
            assert_eq!(parsed(saved).unmarked(), layout);
        }
        assert_eq!(parsed(of(8 * GIB)).slots(), [0, 1]);
    }

    #[test]
    fn memory_in_no_slot_or_in_two_is_not_believed() {
        let bytes = 8 * GIB;
        for mappings in [
            vec![],
            vec![mapping(0, 0, 3 * GIB, 0)],
            vec![
                mapping(0, 0, 3 * GIB, 0),
                mapping(1, 4 * GIB, 5 * GIB, 4 * GIB),
            ],
            vec![
                mapping(0, 0, 3 * GIB, 0),
                mapping(1, 4 * GIB, 6 * GIB, 2 * GIB),
            ],
            vec![
                mapping(0, 0, 3 * GIB, 0),
                mapping(1, 4 * GIB, u64::MAX - 4095, 3 * GIB),
            ],
        ] {
            let refused = with_mappings(bytes, mappings).check(bytes);
            assert!(refused.is_err(), "{refused:?}");
        }
    }

    #[test]
    fn slots_that_share_an_address_or_a_number_are_not_believed() {
        let bytes = 8 * GIB;
        let address = vec![
            mapping(0, 0, 3 * GIB, 0),
            mapping(1, 2 * GIB, 5 * GIB, 3 * GIB),
        ];
        let number = vec![
            mapping(1, 0, 3 * GIB, 0),
            mapping(1, 4 * GIB, 5 * GIB, 3 * GIB),
        ];
        for mappings in [address, number] {
            let refused = with_mappings(bytes, mappings).check(bytes);
            assert!(
                matches!(refused, Err(LayoutError::Slot { .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn what_we_never_make_is_not_believed() {
        let bytes = 64 << 20;
        for (path, value) in [
            ("/guest_ram_mappings/0/zone_id", json!("disk")),
            ("/guest_ram_mappings/0/virtio_mem", json!(true)),
            ("/guest_ram_mappings/0/gpa", json!(1)),
            ("/hotplug_slots/0/active", json!(true)),
            ("/next_hotplug_slot", json!(1)),
            ("/current_ram", json!(0)),
            ("/memory_ranges/data", json!([{ "gpa": 0, "length": 4096 }])),
        ] {
            let mut document = of(bytes);
            *document.pointer_mut(path).expect(path) = value;
            assert!(parsed(document).check(bytes).is_err(), "{path}");
        }
        let mut newer = of(bytes);
        newer["new"] = json!(1);
        assert!(serde_json::from_value::<MemoryLayout>(newer).is_err());
    }

    proptest! {
        #[test]
        fn a_layout_that_is_believed_covers_each_byte_once(
            cuts in prop::collection::vec((0_u64..64, 0_u64..64, 0_u64..64, 0_u32..4), 0..4)
        ) {
            const MIB: u64 = 1 << 20;
            let mappings = cuts.iter().map(|&(gpa, size, offset, slot)| {
                mapping(slot, gpa * MIB, size * MIB, offset * MIB)
            });
            let layout = with_mappings(64 * MIB, mappings.collect());
            if layout.check(64 * MIB).is_ok() {
                for byte in 0..64 {
                    let holders = cuts.iter().filter(|cut| (cut.2..cut.2 + cut.1).contains(&byte));
                    prop_assert_eq!(holders.count(), 1);
                }
            }
        }
    }
}
