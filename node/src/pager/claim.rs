//! The pages of a window that one thread has won and is to fill.

use std::ops::Range;

use crate::pager::layout::Mapping;
use crate::pager::region::{PageIndex, WINDOW_PAGES};

const WINDOW_PAGES_BITS: u32 = 16;
const _: () = assert!(WINDOW_PAGES == WINDOW_PAGES_BITS as u64);

/// Pages of one mapping, all in one window, that this thread has won.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) place: Mapping,
    /// Bit n: the page n of the window.
    pub(super) pages: u16,
}

/// The pages of the window that a claim holds, as runs.
pub(super) fn runs_of(claim: &Claim) -> impl Iterator<Item = Range<u64>> + use<> {
    let mut left = claim.pages;
    std::iter::from_fn(move || {
        let start = left.trailing_zeros();
        if start >= WINDOW_PAGES_BITS {
            return None;
        }
        let length = (left >> start).trailing_ones();
        let run = start..start + length;
        // Clears the run; shifting by all sixteen bits would not.
        left &= u16::MAX.checked_shl(run.end).unwrap_or(0);
        Some(u64::from(run.start)..u64::from(run.end))
    })
}

pub(super) fn for_each_page(claims: &[Claim], mut act: impl FnMut(PageIndex)) {
    for claim in claims {
        let window = claim.place.image.page().window();
        for run in runs_of(claim) {
            run.for_each(|page| act(PageIndex(window.0 * WINDOW_PAGES + page)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pager::layout::Hva;
    use crate::pager::region::{ImageOffset, WINDOW_BYTES, WindowIndex};

    fn claim(pages: u16) -> Claim {
        Claim {
            place: Mapping {
                hva: Hva(0x10000),
                image: ImageOffset(3 * WINDOW_BYTES),
                bytes: WINDOW_BYTES,
            },
            pages,
        }
    }

    proptest! {
        #[test]
        fn the_runs_of_a_claim_are_its_pages(pages: u16) {
            let mut seen = 0_u16;
            let mut last_end = None;
            for run in runs_of(&claim(pages)) {
                prop_assert!(last_end.is_none_or(|end| end < run.start));
                last_end = Some(run.end);
                run.for_each(|page| seen |= 1 << page);
            }
            prop_assert_eq!(seen, pages);
            let mut count = 0;
            for_each_page(&[claim(pages)], |page| {
                count += 1;
                assert_eq!(page.window(), WindowIndex(3));
            });
            prop_assert_eq!(count, pages.count_ones());
        }
    }
}
