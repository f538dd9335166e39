//! Tiny guests: 32-bit protected-mode programs of a few instructions, wrapped as the boot protocols want them.

/// Where a tiny guest is loaded and runs.
pub const BASE: u32 = 0x10_0000;
/// The first serial port.
const COM1: u16 = 0x3f8;
/// The debug-exit port.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The pvpanic port.
pub const PVPANIC: u16 = 0x505;
/// PM1 control register of ACPI.
pub const PM1_CONTROL: u16 = 0x604;
/// Soft off (SLP_TYP of S5) with SLP_EN, for [`PM1_CONTROL`].
const SOFT_OFF: u16 = 7 << 10 | 1 << 13;
/// Length of the Multiboot header.
const MULTIBOOT: usize = 32;
/// Length of what precedes the code in the ELF file: header, two program headers, note.
const ELF: usize = 64 + 2 * 56 + 20;

/// Code, put together instruction by instruction (Intel SDM volume 2).
#[derive(Default, Clone)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn new() -> Code {
        Code::default()
    }

    /// These bytes.
    pub fn raw(mut self, bytes: &[u8]) -> Code {
        self.0.extend(bytes);
        self
    }

    /// This other code.
    pub fn raw_code(self, other: &Code) -> Code {
        self.raw(&other.0)
    }

    fn dx(self, port: u16) -> Code {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes())
    }

    /// `in al, port`
    pub fn inb(self, port: u16) -> Code {
        self.dx(port).raw(&[0xec])
    }

    /// `out port, value`, a byte.
    pub fn outb(self, port: u16, value: u8) -> Code {
        self.dx(port).raw(&[0xb0, value, 0xee])
    }

    /// `out port, value`, two bytes.
    pub fn outw(self, port: u16, value: u16) -> Code {
        self.dx(port).raw(&[0x66, 0xb8]).raw(&value.to_le_bytes()).raw(&[0x66, 0xef])
    }

    /// `out port, value`, four bytes.
    pub fn outl(self, port: u16, value: u32) -> Code {
        self.dx(port).raw(&[0xb8]).raw(&value.to_le_bytes()).raw(&[0xef])
    }

    /// Store a value of 1, 2 or 4 bytes at an address.
    pub fn store(self, address: u32, value: u32, size: usize) -> Code {
        let op: &[u8] = match size {
            1 => &[0xc6, 0x05],
            2 => &[0x66, 0xc7, 0x05],
            _ => &[0xc7, 0x05],
        };
        self.raw(op).raw(&address.to_le_bytes()).raw(&value.to_le_bytes()[..size])
    }

    /// Print on the serial port, waiting for room as a driver does.
    pub fn print(self, text: &str) -> Code {
        text.bytes().fold(self, |c, b| {
            // Wait: in al, LSR; test al, 20h (transmitter holding register empty); jz wait.
            c.dx(COM1 + 5).raw(&[0xec, 0xa8, 0x20, 0x74, 0xfb]).outb(COM1, b)
        })
    }

    /// Send back what comes on the serial port, for ever.
    pub fn echo(self) -> Code {
        // next: in al, LSR; test al, 1 (data ready); jz next; in al, RBR; out THR, al; jmp next
        self.dx(COM1 + 5).raw(&[0xec, 0xa8, 0x01, 0x74, 0xfb]).dx(COM1).raw(&[0xec, 0xee]).raw(&[0xeb, 0xef])
    }

    /// Repeat `body` `times` times (it must leave EBP alone).
    pub fn repeat(self, times: u32, body: Code) -> Code {
        // mov ebp, times; body; dec ebp; jnz body
        let back = -(body.0.len() as i32 + 1 + 6);
        self.raw(&[0xbd])
            .raw(&times.to_le_bytes())
            .raw(&body.0)
            .raw(&[0x4d, 0x0f, 0x85])
            .raw(&back.to_le_bytes())
    }

    /// The next random number, in EAX and ESI (a linear congruential generator; its upper bits are the better ones).
    pub fn random(self) -> Code {
        // imul esi, esi, 1664525; add esi, 1013904223; mov eax, esi; rol eax, 16
        self.raw(&[0x69, 0xf6])
            .raw(&1_664_525u32.to_le_bytes())
            .raw(&[0x81, 0xc6])
            .raw(&1_013_904_223u32.to_le_bytes())
            .raw(&[0x89, 0xf0, 0xc1, 0xc0, 16])
    }

    /// Seed [`random`](Self::random).
    pub fn seed(self, seed: u32) -> Code {
        self.raw(&[0xbe]).raw(&seed.to_le_bytes())
    }

    /// Write a PCI configuration register of bus 0 through 0xCF8 and 0xCFC.
    pub fn pci(self, device: u32, register: u32, value: u32) -> Code {
        self.outl(0xcf8, 1 << 31 | device << 11 | register).outl(0xcfc, value)
    }

    /// Fault with an interrupt table of length 0: lidt [80000h]; int3.
    pub fn triple_fault(self) -> Code {
        self.store(0x8_0000, 0, 4).store(0x8_0004, 0, 4).raw(&[0x0f, 0x01, 0x1d, 0, 0, 8, 0, 0xcc])
    }

    /// Read and write every port from `first` to `last` in all sizes, with random values.
    pub fn rubbish_ports(self, first: u16, last: u16) -> Code {
        // mov ebx, first; next: random; mov edx, ebx
        let body = Code::new()
            .random()
            .raw(&[0x89, 0xda])
            // out dx, al; out dx, ax; out dx, eax; in al, dx; in ax, dx; in eax, dx; inc ebx
            .raw(&[0xee, 0x66, 0xef, 0xef, 0xec, 0x66, 0xed, 0xed, 0x43]);
        self.raw(&[0xbb]).raw(&u32::from(first).to_le_bytes()).repeat(u32::from(last - first) + 1, body)
    }

    /// Write `count` random double words to random places in the `size` bytes (a power of two) at `base`, and read them.
    pub fn rubbish_memory(self, base: u32, size: u32, count: u32) -> Code {
        assert!(size.is_power_of_two() && base.is_multiple_of(size));
        // random; and eax, size - 4; lea edi, [eax + base]; random; mov [edi], eax; mov eax, [edi]
        let body = Code::new()
            .random()
            .raw(&[0x25])
            .raw(&(size - 4).to_le_bytes())
            .raw(&[0x8d, 0xb8])
            .raw(&base.to_le_bytes())
            .random()
            .raw(&[0x89, 0x07, 0x8b, 0x07]);
        self.repeat(count, body)
    }

    /// Fill `words` double words at `base` with random values, each first masked by `and` and then given the bits of `or`: pairs for
    /// even and odd double words.
    pub fn fill(self, base: u32, words: u32, even: (u32, u32), odd: (u32, u32)) -> Code {
        let mut body = Code::new();
        for (and, or) in [even, odd] {
            // random; and eax, and; or eax, or; mov [edi], eax; add edi, 4
            body = body.random().raw(&[0x25]).raw(&and.to_le_bytes()).raw(&[0x0d]).raw(&or.to_le_bytes());
            body = body.raw(&[0x89, 0x07, 0x83, 0xc7, 4]);
        }
        self.raw(&[0xbf]).raw(&base.to_le_bytes()).repeat(words / 2, body)
    }

    /// Halt for good: cli; hlt; jmp to hlt.
    pub fn halt(self) -> Code {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// Power off by ACPI, then wait for it.
    pub fn power_off(self) -> Code {
        self.outw(PM1_CONTROL, SOFT_OFF).halt()
    }

    /// A Multiboot 1 image (specification 0.6.96, sections 3.1 and 3.3) with its addresses in the header.
    pub fn multiboot(&self) -> Vec<u8> {
        let (magic, flags) = (0x1bad_b002_u32, 1 << 16);
        let words = [
            magic,
            flags,
            0u32.wrapping_sub(magic).wrapping_sub(flags),
            BASE,
            BASE,
            0,
            0,
            BASE + MULTIBOOT as u32,
        ];
        let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        image.extend(&self.0);
        image
    }

    /// An x86-64 ELF file with a PVH entry note (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`, type 18).
    pub fn pvh(&self) -> Vec<u8> {
        let entry = u64::from(BASE) + ELF as u64;
        let mut f = b"\x7fELF\x02\x01\x01".to_vec();
        f.resize(16, 0);
        let half = |f: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| f.extend(v.to_le_bytes()));
        let word = |f: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| f.extend(v.to_le_bytes()));
        let long = |f: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| f.extend(v.to_le_bytes()));
        // ET_EXEC, EM_X86_64, version, entry, program headers behind this one, no sections, no flags, sizes.
        half(&mut f, &[2, 62]);
        word(&mut f, &[1]);
        long(&mut f, &[entry, 64, 0]);
        word(&mut f, &[0]);
        half(&mut f, &[64, 56, 2, 0, 0, 0]);
        let size = (ELF + self.0.len()) as u64;
        // PT_LOAD of the whole file, PT_NOTE.
        word(&mut f, &[1, 7]);
        long(&mut f, &[0, BASE.into(), BASE.into(), size, size, 0x1000]);
        word(&mut f, &[4, 4]);
        let note = 64 + 2 * 56;
        long(&mut f, &[note, u64::from(BASE) + note, u64::from(BASE) + note, 20, 20, 4]);
        word(&mut f, &[4, 4, 18]);
        f.extend(b"Xen\0");
        word(&mut f, &[entry as u32]);
        assert_eq!(f.len(), ELF);
        f.extend(&self.0);
        f
    }
}
