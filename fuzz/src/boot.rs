//! Kernel images: whatever the file says, loading it ends with a machine state or an error.

use std::{io::Cursor, sync::OnceLock};

use ringfort_machine_pc::{
    boot::{self, Boot, Module},
    layout::Layout,
};
use ringfort_memory::GuestMemory;

use crate::Input;

/// Small, so that the limits are near.
const RAM: u64 = 32 << 20;

fn machine() -> &'static (Layout, GuestMemory) {
    static MACHINE: OnceLock<(Layout, GuestMemory)> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let layout = Layout::new(RAM, 40).expect("a layout");
        let memory = layout.allocate().expect("memory");
        (layout, memory)
    })
}

/// First byte: which loader, and whether there is a module. Then the kernel.
pub fn boot_loader(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.u8();
    let (layout, memory) = machine();
    let mut kernel = Cursor::new(input.rest());
    let mut initrd = Cursor::new([0x5a_u8; 5000]);
    let modules = if choice & 4 != 0 {
        vec![Module { file: &mut initrd, cmdline: "module".into() }]
    } else {
        Vec::new()
    };
    let mut what = Boot { layout, cmdline: "console=ttyS0", modules, rsdp: Some(0xe_0000) };
    let loaded = match choice & 3 {
        0 => boot::load(memory, &mut kernel, &mut what),
        1 => boot::load_bzimage(memory, &mut kernel, &mut what),
        2 => boot::load_elf(memory, &mut kernel, &mut what),
        _ => boot::load_multiboot(memory, &mut kernel, &mut what),
    };
    match loaded {
        Ok(loaded) => {
            let (base, end) = loaded.kernel;
            assert!(base <= end && end <= RAM, "kernel outside RAM: {base:#x} to {end:#x}");
            for (base, size) in loaded.modules {
                assert!(base.checked_add(size).is_some_and(|end| end <= RAM), "module outside RAM");
                assert!(base + size <= loaded.kernel.0 || base >= loaded.kernel.1, "module over the kernel");
            }
        }
        Err(e) => assert!(!e.to_string().contains('\n'), "an error is one line: {e}"),
    }
}
