//! Places on this machine, of which a test program has a few: whoever has one uses what goes with
//! its number, and the next one waits until it is free.

use std::sync::{Condvar, Mutex, PoisonError};

/// Places that are numbered from 0.
#[derive(Debug)]
pub(crate) struct Places<const N: usize> {
    taken: Mutex<[bool; N]>,
    freed: Condvar,
}

/// The right to be in one place, or in all.
#[derive(Debug)]
pub(crate) struct Place<const N: usize> {
    of: &'static Places<N>,
    number: usize,
    is_all: bool,
}

impl<const N: usize> Places<N> {
    pub(crate) const fn new() -> Self {
        Self {
            taken: Mutex::new([false; N]),
            freed: Condvar::new(),
        }
    }

    /// Waits for a place.
    pub(crate) fn take(&'static self) -> Place<N> {
        self.wait(|taken| {
            let number = taken.iter().position(|taken| !taken)?;
            taken[number] = true;
            Some(Place {
                of: self,
                number,
                is_all: false,
            })
        })
    }

    /// Waits until nobody has one, and keeps all others away.
    pub(crate) fn take_all(&'static self) -> Place<N> {
        self.wait(|taken| {
            (*taken == [false; N]).then(|| {
                *taken = [true; N];
                Place {
                    of: self,
                    number: 0,
                    is_all: true,
                }
            })
        })
    }

    fn wait(&'static self, mut grab: impl FnMut(&mut [bool; N]) -> Option<Place<N>>) -> Place<N> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(place) = grab(&mut taken) {
                return place;
            }
            taken = self
                .freed
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<const N: usize> Place<N> {
    /// Below `N`, and nobody else's.
    pub(crate) fn number(&self) -> u16 {
        u16::try_from(self.number).expect("there are few places")
    }
}

impl<const N: usize> Drop for Place<N> {
    fn drop(&mut self) {
        let mut taken = self.of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match self.is_all {
            true => *taken = [false; N],
            false => taken[self.number] = false,
        }
        self.of.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::Places;

    #[test]
    fn nobody_shares_a_place_and_who_takes_all_is_alone() {
        static PLACES: Places<2> = Places::new();
        let (first, second) = (PLACES.take(), PLACES.take());
        assert_ne!(first.number(), second.number());
        let waits = thread::spawn(|| PLACES.take_all().number());
        drop(second);
        assert_eq!(PLACES.take().number(), 1, "all are not free yet");
        drop(first);
        assert_eq!(waits.join().expect("it gets all"), 0);
        assert_eq!(PLACES.take().number(), 0);
    }
}
