//! The `Range` header. Pure.

/// What part of a file is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it: no range, or one this server need not honour.
    Whole,
    /// `length` bytes from `start`; never empty.
    Bytes {
        /// Offset of the first byte.
        start: u64,
        /// How many bytes follow.
        length: u64,
    },
    /// A range that lies outside the file.
    Unsatisfiable,
}

/// Reads a `Range` header for a file of `size` bytes. Several ranges at once and anything that is
/// not a byte range are answered with the whole file, as the protocol allows.
#[must_use]
pub fn parse(header: &str, size: u64) -> Part {
    let Some(range) = header.trim().strip_prefix("bytes=") else {
        return Part::Whole;
    };
    let Some((first, last)) = range.split_once('-').filter(|_| !range.contains(',')) else {
        return Part::Whole;
    };
    match (number(first), number(last)) {
        (Bound::Absent, Bound::At(suffix)) => part(size.saturating_sub(suffix), u64::MAX, size),
        (Bound::At(start), Bound::Absent) => part(start, u64::MAX, size),
        (Bound::At(start), Bound::At(end)) if start <= end => part(start, end, size),
        _ => Part::Whole,
    }
}

enum Bound {
    Absent,
    At(u64),
    Malformed,
}

fn number(text: &str) -> Bound {
    let text = text.trim();
    if text.is_empty() {
        return Bound::Absent;
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Bound::Malformed;
    }
    // A number too large for us is past the end of any file.
    Bound::At(text.parse().unwrap_or(u64::MAX))
}

fn part(start: u64, end: u64, size: u64) -> Part {
    if start >= size {
        return Part::Unsatisfiable;
    }
    let past = end.saturating_add(1).min(size);
    Part::Bytes {
        start,
        length: past - start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_of_a_ten_byte_file() {
        let bytes = |start, length| Part::Bytes { start, length };
        for (header, expected) in [
            ("bytes=0-0", bytes(0, 1)),
            ("bytes=2-5", bytes(2, 4)),
            ("bytes=5-", bytes(5, 5)),
            ("bytes=5-99999999999999999999999", bytes(5, 5)),
            ("bytes=-3", bytes(7, 3)),
            ("bytes=-30", bytes(0, 10)),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,4-5", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=-", Part::Whole),
            ("lines=1-2", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(parse(header, 10), expected, "{header}");
        }
        assert_eq!(parse("bytes=0-", 0), Part::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn a_part_lies_inside_the_file(header in "bytes=[0-9]{0,22}-[0-9]{0,22}", size: u64) {
            if let Part::Bytes { start, length } = parse(&header, size) {
                prop_assert!(length > 0);
                prop_assert!(start.checked_add(length).is_some_and(|end| end <= size));
            }
        }

        #[test]
        fn any_header_is_parsed_without_panic(header in ".{0,40}", size: u64) {
            let _ = parse(&header, size);
        }
    }
}
