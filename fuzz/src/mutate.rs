//! Damaged bytes out of sound ones: a pure function of samples, a seed and a number.
//!
//! The damage is of the kinds that parsers trip over: flipped bits, numbers replaced by the largest,
//! the least and their neighbours in both byte orders, parts cut out, doubled, swapped or taken
//! from another sample, ends cut off, rubbish behind the end, long digits in texts.

/// Most that is done to one sample: one thing mostly, to get past checks, and sometimes many.
const MOST_STEPS: u64 = 6;
/// Most bytes that one step adds.
const MOST_ADDED: u64 = 64;
/// Longest input that is made: longer ones find nothing that these do not, and take their time.
pub const MAX_BYTES: usize = 64 << 10;

/// Numbers that do not depend on anything but a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of case `number` under `seed`.
    #[must_use]
    pub fn of(seed: u64, number: u64) -> Self {
        let mut random = Self(seed ^ number.wrapping_mul(0xd1b5_4a32_d192_ed03));
        random.next();
        random
    }

    /// The next number.
    #[allow(
        clippy::should_implement_trait,
        reason = "it never ends, and is no iterator"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One below `bound`; 0 where that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// A place in what is so long, its end included.
    fn place(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64 + 1)).unwrap_or(0)
    }

    /// A piece of what is so long.
    fn piece(&mut self, length: usize) -> std::ops::Range<usize> {
        let (one, other) = (self.place(length), self.place(length));
        let start = one.min(other);
        // Short pieces are fields, and fields are what there is to damage.
        let short = start + self.place(16);
        start..if self.below(2) == 0 {
            one.max(other)
        } else {
            short.min(length)
        }
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// The input of case `number` under `seed`.
#[must_use]
pub fn input(samples: &[Vec<u8>], seed: u64, number: u64) -> Vec<u8> {
    let mut random = Random::of(seed, number);
    let mut bytes = any(samples, &mut random).to_vec();
    let steps = match random.below(3) {
        0 => random.below(MOST_STEPS) + 1,
        _ => 1,
    };
    for _ in 0..steps {
        step(&mut bytes, samples, &mut random);
    }
    bytes.truncate(MAX_BYTES);
    bytes
}

fn any<'a>(samples: &'a [Vec<u8>], random: &mut Random) -> &'a [u8] {
    let at = usize::try_from(random.below(samples.len() as u64)).unwrap_or(0);
    samples.get(at).map_or(&[], Vec::as_slice)
}

fn step(bytes: &mut Vec<u8>, samples: &[Vec<u8>], random: &mut Random) {
    match random.below(12) {
        0..=1 => flip(bytes, random),
        2..=4 => number(bytes, random),
        5 => bytes.truncate(random.place(bytes.len())),
        6 => {
            let piece = random.piece(bytes.len());
            bytes.drain(piece);
        }
        7 => double(bytes, random),
        8 => {
            let donor = any(samples, random);
            let piece = donor[random.piece(donor.len())].to_vec();
            let at = random.piece(bytes.len());
            bytes.splice(at, piece);
        }
        9 => {
            let at = random.place(bytes.len());
            let fill = random.byte();
            let added = (0..=random.below(MOST_ADDED)).map(|_| fill);
            bytes.splice(at..at, added.collect::<Vec<_>>());
        }
        10 => {
            for at in random.piece(bytes.len()) {
                bytes[at] = random.byte();
            }
        }
        _ => digits(bytes, random),
    }
}

fn flip(bytes: &mut [u8], random: &mut Random) {
    let at = random.place(bytes.len());
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// A number that sums, products and comparisons go wrong with.
fn telling(random: &mut Random) -> u64 {
    let edge = match random.below(4) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        _ => random.below(300),
    };
    match random.below(3) {
        0 => edge,
        1 => edge.wrapping_sub(1),
        _ => edge.wrapping_add(random.below(8)),
    }
}

/// Replaces a field of 1, 2, 4 or 8 bytes, mostly on its border, in either byte order; or changes it
/// by a little.
fn number(bytes: &mut [u8], random: &mut Random) {
    let width = 1_usize << random.below(4);
    let at = random.place(bytes.len());
    let at = if random.below(4) == 0 {
        at
    } else {
        at - at % width.min(4)
    };
    let Some(field) = bytes.get_mut(at..at + width) else {
        return;
    };
    let mut old = [0; 8];
    old[..width].copy_from_slice(field);
    let new = match random.below(3) {
        0 => u64::from_le_bytes(old)
            .wrapping_add(random.below(5))
            .wrapping_sub(2),
        _ => telling(random),
    };
    if random.below(3) == 0 {
        field.copy_from_slice(&new.to_be_bytes()[8 - width..]);
    } else {
        field.copy_from_slice(&new.to_le_bytes()[..width]);
    }
}

fn double(bytes: &mut Vec<u8>, random: &mut Random) {
    let piece = random.piece(bytes.len());
    let copy = bytes[piece.clone()].to_vec();
    let times = 1 + random.below(4);
    for _ in 0..times {
        if bytes.len() + copy.len() <= MAX_BYTES {
            bytes.splice(piece.end..piece.end, copy.iter().copied());
        }
    }
}

/// Replaces digits of a text, if it is one.
fn digits(bytes: &mut Vec<u8>, random: &mut Random) {
    let from = random.place(bytes.len());
    let behind = bytes[from..].iter().position(u8::is_ascii_digit);
    let Some(start) = behind.map(|at| from + at) else {
        return flip(bytes, random);
    };
    let length = bytes[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit());
    let end = start + length.count();
    let text = match random.below(4) {
        0 => format!("-{}", telling(random)),
        1 => format!("{}.5e{}", telling(random), random.below(400)),
        _ => telling(random).to_string(),
    };
    bytes.splice(start..end, text.into_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Vec<u8>> {
        vec![
            b"{\"version\":1,\"next\":64}".to_vec(),
            vec![0; 100],
            vec![],
        ]
    }

    #[test]
    fn the_same_seed_and_number_make_the_same_input() {
        for number in 0..1000 {
            let once = input(&samples(), 7, number);
            assert_eq!(once, input(&samples(), 7, number));
            assert!(once.len() <= MAX_BYTES);
        }
    }

    #[test]
    fn most_inputs_of_a_seed_differ() {
        let inputs = (0..1000).map(|number| input(&samples()[..1], 7, number));
        let distinct = inputs.collect::<std::collections::HashSet<_>>();
        assert!(distinct.len() > 700, "{}", distinct.len());
    }

    #[test]
    fn nothing_can_be_damaged_too() {
        for number in 0..100 {
            let _any = input(&[], 1, number);
            let _any = input(&[vec![]], 1, number);
        }
    }
}
