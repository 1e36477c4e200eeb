//! Bytes of a stream as text, piece by piece, with no character torn apart.

/// Turns pieces of one stream into text. What is not UTF-8 becomes U+FFFD; a character that lies in two pieces
/// comes whole with the second.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The beginning of a character whose end has not come: three bytes at most.
    torn: Vec<u8>,
}

impl Decoder {
    /// The text of all that is complete by now.
    pub(super) fn push(&mut self, piece: &[u8]) -> String {
        let mut bytes = std::mem::take(&mut self.torn);
        bytes.extend_from_slice(piece);
        let whole = complete(&bytes);
        self.torn = bytes.split_off(whole);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of what is left when the stream has ended.
    pub(super) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.torn)).into_owned()
    }
}

/// Length of `bytes` without a character that has only begun at their end.
fn complete(bytes: &[u8]) -> usize {
    // A character has four bytes at most, so no other beginning can be open.
    let tail = bytes.len().saturating_sub(3);
    let begins = |at: &usize| {
        let open = std::str::from_utf8(&bytes[*at..]);
        open.is_err_and(|err| err.valid_up_to() == 0 && err.error_len().is_none())
    };
    (tail..bytes.len()).find(begins).unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(bytes: &[u8], sizes: &[usize]) -> String {
        let (mut decoder, mut text, mut rest) = (Decoder::default(), String::new(), bytes);
        for size in sizes {
            let (piece, later) = rest.split_at((*size).min(rest.len()));
            text += &decoder.push(piece);
            rest = later;
        }
        text + &decoder.push(rest) + &decoder.finish()
    }

    #[test]
    fn a_character_torn_in_two_comes_whole_with_its_second_half() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xe2\x82"), "a");
        assert_eq!(decoder.push(b"\xacb"), "\u{20ac}b");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn a_stray_byte_waits_for_no_more_than_the_next_piece() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xe2"), "a");
        assert_eq!(decoder.push(b"b"), "\u{fffd}b");
        assert_eq!(decoder.push(b"\xff"), "\u{fffd}");
        assert_eq!(decoder.push(b"\xf0"), "");
        assert_eq!(decoder.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn text_does_not_depend_on_where_it_was_cut(
            bytes in prop_oneof![any::<Vec<u8>>(), ".*".prop_map(String::into_bytes)],
            sizes in proptest::collection::vec(0_usize..6, 0..40),
        ) {
            prop_assert_eq!(decoded(&bytes, &sizes), String::from_utf8_lossy(&bytes));
        }
    }
}
