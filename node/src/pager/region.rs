//! Address arithmetic on one piece of guest memory. Pure.

use std::ops::Range;

use proto::units::Mib;

/// The smallest unit of guest memory.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes from the start of a memory image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageOffset(pub u64);

/// One contiguous piece of guest memory, as long as its memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    bytes: u64,
}

impl Region {
    /// The region of a guest with `size` of memory. A MiB is a whole number of pages.
    #[must_use]
    pub const fn new(size: Mib) -> Self {
        Self {
            bytes: size.bytes(),
        }
    }

    /// Its length.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// How many pages it has.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// The page around `offset`, or `None` past the end.
    #[must_use]
    pub fn page_around(self, offset: ImageOffset) -> Option<Range<ImageOffset>> {
        if offset.0 >= self.bytes {
            return None;
        }
        let start = offset.0 - offset.0 % PAGE_BYTES;
        Some(ImageOffset(start)..ImageOffset(start + PAGE_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mib_has_256_pages() {
        assert_eq!(Region::new(Mib(1)).pages(), 256);
    }

    #[test]
    fn every_byte_lies_in_exactly_one_page() {
        let region = Region::new(Mib(1));
        let page = |offset| region.page_around(ImageOffset(offset));
        assert_eq!(page(0), Some(ImageOffset(0)..ImageOffset(4096)));
        assert_eq!(page(4095), page(0));
        assert_eq!(page(4096), Some(ImageOffset(4096)..ImageOffset(8192)));
        assert_eq!(page(region.bytes()), None);
    }
}
