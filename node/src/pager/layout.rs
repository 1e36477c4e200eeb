//! Where a VMM has mapped its guest's memory, and the arithmetic between both sides. Pure.
//!
//! A VMM may map one memfd in several pieces, at file offsets of its own choice, or the same bytes
//! twice. The pieces are found in the text of `/proc/<pid>/maps` by the memfd's device and inode;
//! a name proves nothing there.

use std::ops::Range;

use crate::pager::region::{ImageOffset, PAGE_BYTES, Region};

/// An address in the VMM's own address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(pub u64);

/// One mapping of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// Where it begins in the VMM.
    pub hva: Hva,
    /// What of the image it shows there.
    pub image: ImageOffset,
    /// How long it is.
    pub bytes: u64,
}

/// Why mappings make no sense together. The VMM is not what we took it for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The memory is not mapped at all.
    #[error("the VMM has not mapped the guest's memory")]
    Unmapped,
    /// A mapping does not lie on pages, or ends past the last address.
    #[error("the mapping at {hva:#x} is no run of whole pages")]
    Ragged {
        /// Where it begins.
        hva: u64,
    },
    /// A mapping shows more than there is.
    #[error("the mapping at {hva:#x} ends past the guest's memory")]
    PastTheEnd {
        /// Where it begins.
        hva: u64,
    },
    /// Two mappings share addresses.
    #[error("the mapping at {hva:#x} begins inside another")]
    Overlaps {
        /// Where it begins.
        hva: u64,
    },
}

/// A file as the kernel's list of mappings names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// Major and minor number of its device.
    pub device: (u64, u64),
    /// Its inode.
    pub inode: u64,
}

/// All mappings of one guest's memory, in order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    mappings: Vec<Mapping>,
}

impl Layout {
    /// Checks `mappings` against the memory they show.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(region: Region, mut mappings: Vec<Mapping>) -> Result<Self, LayoutError> {
        mappings.sort_unstable();
        let mut free_from = 0;
        for mapping in &mappings {
            let hva = mapping.hva.0;
            let ends = (
                hva.checked_add(mapping.bytes),
                mapping.image.0.checked_add(mapping.bytes),
            );
            let whole = [hva, mapping.image.0, mapping.bytes]
                .iter()
                .all(|number| number.is_multiple_of(PAGE_BYTES));
            let ((Some(end), Some(image_end)), true, true) = (ends, whole, mapping.bytes > 0)
            else {
                return Err(LayoutError::Ragged { hva });
            };
            if image_end > region.bytes() {
                return Err(LayoutError::PastTheEnd { hva });
            }
            if hva < free_from {
                return Err(LayoutError::Overlaps { hva });
            }
            free_from = end;
        }
        if mappings.is_empty() {
            return Err(LayoutError::Unmapped);
        }
        Ok(Self { mappings })
    }

    /// The shared mappings of `file` that `maps`, the text of `/proc/<pid>/maps`, lists.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn from_maps(maps: &str, file: FileId, region: Region) -> Result<Self, LayoutError> {
        Self::new(
            region,
            maps.lines()
                .filter_map(|line| mapping_of(line, file))
                .collect(),
        )
    }

    /// The mappings.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// What of the image `hva` shows; `None` outside every mapping.
    #[must_use]
    pub fn image_of(&self, hva: Hva) -> Option<ImageOffset> {
        let after = self
            .mappings
            .partition_point(|mapping| mapping.hva.0 <= hva.0);
        let mapping = self.mappings.get(after.checked_sub(1)?)?;
        let within = hva.0 - mapping.hva.0;
        (within < mapping.bytes).then(|| ImageOffset(mapping.image.0 + within))
    }

    /// Every place where a part of `image` is mapped, with the part.
    pub fn places(&self, image: Range<ImageOffset>) -> impl Iterator<Item = Mapping> + '_ {
        self.mappings.iter().filter_map(move |mapping| {
            let start = image.start.0.max(mapping.image.0);
            let end = image.end.0.min(mapping.image.0 + mapping.bytes);
            (start < end).then(|| Mapping {
                hva: Hva(mapping.hva.0 + (start - mapping.image.0)),
                image: ImageOffset(start),
                bytes: end - start,
            })
        })
    }
}

/// The mapping that one line describes, if it is a shared one of `file`:
/// `7f0000000000-7f0010000000 rw-s 00000000 00:01 1234 /memfd:name (deleted)`.
fn mapping_of(line: &str, file: FileId) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let shared = words.next()?.ends_with('s');
    let image = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode: u64 = words.next()?.parse().ok()?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let ours = (hex(major)?, hex(minor)?) == file.device && inode == file.inode;
    let (start, end) = (hex(start)?, hex(end)?);
    Some(Mapping {
        hva: Hva(start),
        image: ImageOffset(hex(image)?),
        bytes: end.checked_sub(start)?,
    })
    .filter(|_| shared && ours)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::units::Mib;

    use super::*;

    const FILE: FileId = FileId {
        device: (0, 1),
        inode: 1234,
    };

    fn mapping(hva: u64, image: u64, bytes: u64) -> Mapping {
        Mapping {
            hva: Hva(hva),
            image: ImageOffset(image),
            bytes,
        }
    }

    #[test]
    fn mappings_are_known_by_device_and_inode_and_not_by_name() {
        let maps = "\
5500-5501 r--p 00000000 08:01 1234 /usr/bin/qemu
7f0000100000-7f0000180000 rw-s 00080000 00:01 1234 /memfd:anything (deleted)
7f0000000000-7f0000080000 rw-s 00000000 00:01 1234 /memfd:wrenn guest (deleted)
7f0000200000-7f0000280000 rw-s 00000000 00:01 99 /memfd:wrenn guest (deleted)
7f0000300000-7f0000380000 rw-p 00000000 00:01 1234 /memfd:wrenn guest (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
garbage
";
        let layout = Layout::from_maps(maps, FILE, Region::new(Mib(1))).expect("sound");
        let expected = [
            mapping(0x7f00_0000_0000, 0, 0x80000),
            mapping(0x7f00_0010_0000, 0x80000, 0x80000),
        ];
        assert_eq!(layout.mappings(), expected);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let region = Region::new(Mib(1));
        let refused = |mappings| Layout::new(region, mappings).expect_err("refused");
        assert_eq!(refused(vec![]), LayoutError::Unmapped);
        let ragged = refused(vec![mapping(4096, 0, 100)]);
        assert_eq!(ragged, LayoutError::Ragged { hva: 4096 });
        let last = u64::MAX - 4095;
        let past_all = refused(vec![mapping(last, 0, 8192)]);
        assert_eq!(past_all, LayoutError::Ragged { hva: last });
        let past = refused(vec![mapping(4096, 1 << 20, 4096)]);
        assert_eq!(past, LayoutError::PastTheEnd { hva: 4096 });
        let twice = refused(vec![mapping(4096, 0, 8192), mapping(8192, 0, 4096)]);
        assert_eq!(twice, LayoutError::Overlaps { hva: 8192 });
    }

    #[test]
    fn bytes_mapped_twice_have_two_places() {
        let mappings = vec![
            mapping(0x10000, 0, 0x4000),
            mapping(0x20000, 0x2000, 0x4000),
        ];
        let layout = Layout::new(Region::new(Mib(1)), mappings).expect("sound");
        let places: Vec<_> = layout
            .places(ImageOffset(0x3000)..ImageOffset(0x5000))
            .collect();
        let expected = [
            mapping(0x13000, 0x3000, 0x1000),
            mapping(0x21000, 0x3000, 0x2000),
        ];
        assert_eq!(places, expected);
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        let pieces = prop::collection::vec((0_u64..8, 1_u64..8, 0_u64..8), 1..6);
        pieces.prop_map(|pieces| {
            let mut hva = 0x1000;
            let mappings = pieces
                .into_iter()
                .map(|(gap, pages, image)| {
                    let made = mapping(
                        hva + gap * PAGE_BYTES,
                        image * PAGE_BYTES,
                        pages * PAGE_BYTES,
                    );
                    hva = made.hva.0 + made.bytes;
                    made
                })
                .collect();
            Layout::new(Region::new(Mib(1)), mappings).expect("made sound")
        })
    }

    proptest! {
        #[test]
        fn an_address_and_its_image_offset_lead_back_to_each_other(
            layout in layouts(), page in 0_u64..128
        ) {
            let hva = Hva(page * PAGE_BYTES);
            if let Some(image) = layout.image_of(hva) {
                let ends = ImageOffset(image.0 + PAGE_BYTES);
                prop_assert!(layout.places(image..ends).any(|place| place.hva == hva));
            }
            let image = ImageOffset(page * PAGE_BYTES);
            for place in layout.places(image..ImageOffset(image.0 + PAGE_BYTES)) {
                prop_assert_eq!(layout.image_of(place.hva), Some(place.image));
            }
        }

        #[test]
        fn no_text_makes_the_reader_panic(maps in ".*") {
            let _ = Layout::from_maps(&maps, FILE, Region::new(Mib(1)));
        }

        #[test]
        fn no_line_of_the_right_shape_makes_the_reader_panic(
            start: u64, end: u64, image: u64
        ) {
            let line = format!("{start:x}-{end:x} rw-s {image:x} 00:01 1234 x");
            let _ = Layout::from_maps(&line, FILE, Region::new(Mib(1)));
        }
    }
}
