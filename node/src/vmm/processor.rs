//! The host's own processor, by a name that says what it can.

use std::fs;

/// The beginning of the name of a host's own processor.
pub const HOST_PREFIX: &str = "host-";

/// The name of this host's own processor.
#[must_use]
pub fn host_processor() -> String {
    let told = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    host_processor_in(&told)
}

/// Vendor, family, model and stepping: what decides on a processor's features. The kernel's list
/// of them would change with the kernel.
fn host_processor_in(told: &str) -> String {
    let word = |name: &str| {
        let fields = told.lines().filter_map(|line| line.split_once(':'));
        let mut values = fields.filter(|(field, _)| field.trim() == name);
        values.next().map_or("unknown", |(_, value)| value.trim())
    };
    let words = ["vendor_id", "cpu family", "model", "stepping"].map(word);
    format!("{HOST_PREFIX}{}", words.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_processor_is_named_by_what_decides_on_its_features() {
        let told = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\n\
                    model name\t: AMD EPYC\nstepping\t: 1\nmicrocode\t: 0xffff\n";
        assert_eq!(host_processor_in(told), "host-AuthenticAMD-25-1-1");
        assert_eq!(
            host_processor_in(""),
            "host-unknown-unknown-unknown-unknown"
        );
    }
}
