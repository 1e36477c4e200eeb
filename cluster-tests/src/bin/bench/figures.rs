//! Samples, and the lines they become.

use std::time::Duration;

/// Values measured in runs of the same thing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    values: Vec<f64>,
}

impl Samples {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self { values: Vec::new() }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Adds one.
    pub(crate) fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Adds a time, in milliseconds.
    pub(crate) fn add_ms(&mut self, time: Duration) {
        self.add(ms(time));
    }

    /// The median; of an even number, the mean of the two in the middle.
    pub(crate) fn p50(&self) -> f64 {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    /// The 99th percentile by nearest rank; with fewer than a hundred samples, the largest.
    pub(crate) fn p99(&self) -> f64 {
        let sorted = self.sorted();
        let rank = (sorted.len() * 99).div_ceil(100);
        let at = rank.checked_sub(1).and_then(|at| sorted.get(at));
        at.copied().unwrap_or(f64::NAN)
    }

    /// Prints the median.
    pub(crate) fn print_p50(&self, name: &str, unit: &str) {
        figure(&format!("{name}_p50"), self.p50(), unit);
    }

    /// Prints the median and the 99th percentile.
    pub(crate) fn print(&self, name: &str, unit: &str) {
        self.print_p50(name, unit);
        figure(&format!("{name}_p99"), self.p99(), unit);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self {
            values: values.into_iter().collect(),
        }
    }
}

/// A time in milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Prints a measured value.
pub(crate) fn figure(name: &str, value: f64, unit: &str) {
    println!("FIGURE {name} {value:.3} {unit}");
}

/// Prints a measured value over what it is compared with; it holds up to `goal`.
pub(crate) fn ratio(name: &str, measured: f64, compared_with: f64, goal: f64) {
    println!("RATIO {name} {:.3} {goal:.3}", measured / compared_with);
}

/// Prints a measured value over the most it may be.
pub(crate) fn at_most(name: &str, measured: f64, limit: f64) {
    ratio(name, measured, limit, 1.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: impl IntoIterator<Item = u32>) -> Samples {
        values.into_iter().map(f64::from).collect()
    }

    #[test]
    fn the_median_lies_in_the_middle_whatever_the_order() {
        assert_eq!(samples([9, 1, 5]).p50().to_string(), "5");
        assert_eq!(samples([9, 1, 5, 7]).p50().to_string(), "6");
    }

    #[test]
    fn the_99th_percentile_of_few_samples_is_the_largest() {
        assert_eq!(samples([3, 8, 1]).p99().to_string(), "8");
        assert_eq!(samples(1..=200).p99().to_string(), "198");
    }

    #[test]
    fn nothing_measured_is_not_a_number() {
        assert!(samples([]).p50().is_nan() && samples([]).p99().is_nan());
    }
}
