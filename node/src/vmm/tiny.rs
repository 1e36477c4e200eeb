//! The smallest guest there is: it says one line and stops. Pure.
//!
//! It shows that a KVM runs guests at all, without a kernel, an initramfs or a template, within some
//! milliseconds, and even where Linux would not start. It is entered by the PVH boot protocol, in
//! 32-bit mode without paging, and needs a serial port and nothing else.
//!
//! ```text
//! ELF header | segment: all of it, at 2 MiB | segment: the note | note: the entry | code | line
//! ```

use super::probe::OK_LINE;

/// Where it is loaded: what lies below 1 MiB is the VMM's.
const LOAD: u32 = 0x20_0000;
const HEADER_BYTES: u16 = 64;
const SEGMENT_BYTES: u16 = 56;
/// Three numbers, a name of four bytes, and the address of the entry.
const NOTE_BYTES: u32 = 20;
/// Where the note is, in the file.
const NOTE_AT: u32 = HEADER_BYTES as u32 + 2 * SEGMENT_BYTES as u32;
/// Where the code is, in the file.
const CODE_AT: u32 = NOTE_AT + NOTE_BYTES;
/// The code, up to the address of what it says.
const BEFORE_TEXT: [u8; 3] = [
    0xfa, // cli
    0xfc, // cld
    0xbe, // mov esi, ...
];
/// The code after that.
const AFTER_TEXT: [u8; 16] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz end
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
    0xf4, // end: hlt
    0xeb, 0xfd, // jmp end
    0x90, // nop
];
/// Where what it says is, in the file.
const TEXT_AT: u32 = CODE_AT + CODE_BYTES;
/// Length of the code, with the address in its middle.
const CODE_BYTES: u32 = 23;
const _: () = assert!(BEFORE_TEXT.len() + 4 + AFTER_TEXT.len() == CODE_BYTES as usize);

/// The guest, as a kernel for any VMM that knows PVH.
#[must_use]
pub fn kernel() -> Vec<u8> {
    let text = format!("{OK_LINE}\n\0");
    let bytes = u64::from(TEXT_AT) + text.len() as u64;
    let mut file = header();
    let (load, note) = (1, 4);
    file.extend(segment(load, 0, bytes));
    file.extend(segment(note, NOTE_AT, NOTE_BYTES.into()));
    // Of owner "Xen", the 18th kind: the entry.
    for number in [4, 4, 18] {
        file.extend(u32::to_le_bytes(number));
    }
    file.extend(b"Xen\0");
    file.extend((LOAD + CODE_AT).to_le_bytes());
    file.extend(BEFORE_TEXT);
    file.extend((LOAD + TEXT_AT).to_le_bytes());
    file.extend(AFTER_TEXT);
    file.extend(text.as_bytes());
    file
}

/// An executable of 64 bits, as VMMs want it, for x86-64.
fn header() -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    let (executable, x86_64, version) = (2_u16, 62_u16, 1_u32);
    header.extend(executable.to_le_bytes());
    header.extend(x86_64.to_le_bytes());
    header.extend(version.to_le_bytes());
    header.extend(u64::from(LOAD + CODE_AT).to_le_bytes());
    // Where the segments are described, and where sections are: there are none.
    header.extend(u64::from(HEADER_BYTES).to_le_bytes());
    header.extend(0_u64.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    for number in [HEADER_BYTES, SEGMENT_BYTES, 2, 0, 0, 0] {
        header.extend(number.to_le_bytes());
    }
    header
}

/// `bytes` of the file from `at` on, as far into the guest's memory.
fn segment(kind: u32, at: u32, bytes: u64) -> Vec<u8> {
    let all_rights = 7_u32;
    let mut segment = kind.to_le_bytes().to_vec();
    segment.extend(all_rights.to_le_bytes());
    let address = u64::from(LOAD + at);
    for number in [u64::from(at), address, address, bytes, bytes, 4] {
        segment.extend(number.to_le_bytes());
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_is_made_of_lies_where_it_says() {
        let kernel = kernel();
        assert_eq!(header().len(), usize::from(HEADER_BYTES));
        assert_eq!(segment(1, 0, 1).len(), usize::from(SEGMENT_BYTES));
        let from = |at: u32| &kernel[usize::try_from(at).expect("small")..];
        assert_eq!(from(NOTE_AT)[12..16], *b"Xen\0");
        assert!(from(CODE_AT).starts_with(&BEFORE_TEXT));
        assert!(from(TEXT_AT).starts_with(OK_LINE.as_bytes()));
        assert_eq!(kernel.last(), Some(&0));
    }
}
