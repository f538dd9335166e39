//! Guests of a few instructions, started by the real command: how they end, what they may do, where their output goes.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use support::tiny::*;
use support::*;

/// Start `image` with `options`; output on the pipes.
fn start(scratch: &Scratch, image: &[u8], options: &[&str]) -> Guest {
    let kernel = scratch.file("kernel", image);
    let mut args = vec!["run", "--accel", "soft", "--memory", "64M", "--kernel", text(&kernel)];
    args.extend(options);
    Guest::start(ringfort(&args))
}

#[test]
fn multiboot_and_pvh_kernels_print_and_end_with_a_status_of_their_own() {
    let scratch = Scratch::new("tiny-status");
    let code = Code::new().print("hello from the guest\n").outb(DEBUG_EXIT, 0x2a).halt();
    for image in [code.multiboot(), code.pvh()] {
        let mut g = start(&scratch, &image, &[]);
        g.expect("hello from the guest");
        assert_eq!(g.wait().code(), Some(0x2a << 1 | 1));
    }
}

#[test]
fn a_guest_that_says_it_panicked_is_status_4() {
    let scratch = Scratch::new("tiny-panic");
    let code = Code::new().outb(PVPANIC, 1).halt();
    assert_eq!(start(&scratch, &code.multiboot(), &[]).wait().code(), Some(4));
}

#[test]
fn acpi_power_off_is_status_0() {
    let scratch = Scratch::new("tiny-off");
    assert_eq!(start(&scratch, &Code::new().power_off().multiboot(), &[]).wait().code(), Some(0));
}

#[test]
fn a_triple_fault_and_every_other_reset_boot_again_or_are_status_3() {
    let scratch = Scratch::new("tiny-reset");
    let resets = [
        ("triple fault", Code::new().triple_fault()),
        ("reset control register", Code::new().outb(0xcf9, 2).outb(0xcf9, 6).halt()),
        ("keyboard controller", Code::new().outb(0x64, 0xfe).halt()),
        ("system control port A", Code::new().outb(0x92, 1).halt()),
    ];
    for (how, reset) in resets {
        let image = Code::new().print("started\n").raw_code(&reset).multiboot();
        let mut g = start(&scratch, &image, &["--no-reboot"]);
        g.expect("started");
        assert_eq!(g.wait().code(), Some(3), "{how}");
        let mut g = start(&scratch, &image, &[]);
        for _ in 0..3 {
            g.expect("started");
        }
        g.send("\x01x");
        assert_eq!(g.wait().code(), Some(0), "{how}");
    }
}

#[test]
fn a_vcpu_that_halts_for_good_still_obeys_the_escape_key() {
    let scratch = Scratch::new("tiny-halt");
    for code in [Code::new().print("up\n").halt(), Code::new().print("up\n").raw(&[0xfa, 0xeb, 0xfe])] {
        let mut g = start(&scratch, &code.multiboot(), &["--cpus", "2"]);
        g.expect("up");
        g.send("\x01x");
        assert_eq!(g.wait().code(), Some(0));
    }
}

#[test]
fn help_and_the_escape_key_itself_are_there_to_type() {
    let scratch = Scratch::new("tiny-keys");
    let mut g = start(&scratch, &Code::new().print("up\n").echo().multiboot(), &[]);
    g.expect("up");
    g.send("\x01h");
    g.expect("Ctrl-A x");
    g.send("a\x01ab\x01\x01c");
    g.expect("a\x01b\x01c");
    g.send("\x01r");
    g.expect("up");
    g.send("\x01x");
    assert_eq!(g.wait().code(), Some(0));
}

#[test]
fn a_long_paste_arrives_whole() {
    let scratch = Scratch::new("tiny-paste");
    let mut g = start(&scratch, &Code::new().print("up\n").echo().multiboot(), &[]);
    g.expect("up\n");
    let paste: String = (0..4000).map(|n| format!("line {n}\n")).collect();
    g.send(&paste);
    g.expect(&paste);
    g.send("\x01x");
    assert_eq!(g.wait().code(), Some(0));
}

#[test]
fn the_power_button_raises_its_event() {
    let scratch = Scratch::new("tiny-button");
    // Wait for the status bit in the PM1 event block: in ax, 600h; test ah, 1; jz.
    let wait = Code::new().raw(&[0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9]);
    let mut g = start(&scratch, &Code::new().print("up\n").raw_code(&wait).power_off().multiboot(), &[]);
    g.expect("up");
    g.send("\x01p");
    assert_eq!(g.wait().code(), Some(0));
}

/// All devices there are, so that rubbish finds them.
fn with_devices(scratch: &Scratch) -> Vec<String> {
    let disk = scratch.disk("disk.img", 1 << 20);
    ["--no-reboot", "--console", "pty", "--disk", &format!("path={}", text(&disk))].map(String::from).to_vec()
}

fn start_with_devices(scratch: &Scratch, code: &Code) -> Guest {
    let options = with_devices(scratch);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    start(scratch, &code.multiboot(), &options)
}

#[test]
fn rubbish_on_every_port_does_no_harm() {
    let scratch = Scratch::new("tiny-ports");
    // Ports that do something final, as they should, with the three below that a wide access reaches them from: keyboard
    // controller and port 92h (reset), debug-exit, pvpanic, ACPI events and control, reset control register.
    let keep = [(0x60, 0x64), (0x92, 0x92), (0xf4, 0xf7), (0x505, 0x505), (0x600, 0x607), (0xcf9, 0xcf9)];
    let mut code = Code::new().print("up\n").seed(1);
    for _ in 0..3 {
        let mut first = 0u16;
        for (from, to) in keep {
            code = code.rubbish_ports(first, from - 4);
            first = to + 1;
        }
        code = code.rubbish_ports(first, 0xfffc);
    }
    let mut g = start_with_devices(&scratch, &code.power_off());
    g.expect("up");
    assert_eq!(g.wait().code(), Some(0));
}

/// Where [`place_bars`] puts a PCI device's structures.
fn bar(device: u32) -> u32 {
    0xd000_0000 + device * 0x1_0000
}

/// Switch every PCI device on, with BARs at known places (virtio devices have BAR 1 for MSI-X and BAR 4 for the rest).
fn place_bars(mut code: Code) -> Code {
    for device in 1..31 {
        code = code
            .pci(device, 0x14, bar(device) + 0x8000)
            .pci(device, 0x20, bar(device))
            .pci(device, 0x24, 0)
            .pci(device, 4, 6);
    }
    code
}

#[test]
fn rubbish_in_every_bar_and_ring_does_no_harm() {
    const RINGS: u32 = 0x20_0000;
    let scratch = Scratch::new("tiny-bars");
    let mut round = Code::new();
    for high in [0, 0xffff] {
        // Descriptors that lead to 16 to 48 MiB, with upper halves of addresses that make them wild or do not.
        round = round.fill(RINGS, 0x1_0000, (0x01ff_ffff, 0x0100_0000), (high | 0x0007_0000, 0));
        round = round.fill(RINGS + 0x2_0000, 0x4000, (0xffff_ffff, 0), (0xffff_ffff, 0));
        for device in 1..8 {
            let at = bar(device);
            round = round.store(at + 0x14, 0, 1).store(at + 0x14, 1, 1).store(at + 0x14, 3, 1);
            // VIRTIO_F_VERSION_1.
            round = round.store(at + 8, 1, 4).store(at + 12, 1, 4).store(at + 0x14, 11, 1);
            for queue in 0..4 {
                let ring = RINGS + queue * 0x4000;
                round = round.store(at + 0x16, queue, 2).store(at + 0x1a, queue, 2);
                for (field, area) in [(0x20, ring), (0x28, ring + 0x1000), (0x30, ring + 0x2_0000)] {
                    round = round.store(at + field, area, 4).store(at + field + 4, 0, 4);
                }
                round = round.store(at + 0x1c, 1, 2);
            }
            round = round.store(at + 0x14, 15, 1);
            for queue in 0..4 {
                round = round.store(at + 0x3000 + queue * 4, queue, 2);
            }
        }
    }
    let mut code = place_bars(Code::new().print("up\n").seed(2)).repeat(16, swap_counter(round));
    for device in 1..8 {
        code = code.rubbish_memory(bar(device), 0x4000, 20_000);
    }
    code = code.rubbish_memory(0xfed0_0000, 0x1000, 20_000).print("alive\n").power_off();
    let mut g = start_with_devices(&scratch, &code);
    g.expect("up");
    g.expect("alive");
    assert_eq!(g.wait().code(), Some(0));
}

/// `body` with the outer loop's counter put away: push ebp; body; pop ebp, on a stack at 512 KiB.
fn swap_counter(body: Code) -> Code {
    Code::new().raw(&[0xbc, 0, 0, 8, 0, 0x55]).raw_code(&body).raw(&[0x5d])
}

#[test]
fn rubbish_in_interrupt_controllers_and_configuration_space_ends_as_hardware_would() {
    let scratch = Scratch::new("tiny-apic");
    let code = place_bars(Code::new().print("up\n").seed(3));
    let mut wild = code.clone().rubbish_memory(0xfec0_0000, 0x1000, 20_000);
    for device in 1..8 {
        wild = wild.rubbish_memory(bar(device) + 0x8000, 0x1000, 5_000);
    }
    wild = wild.rubbish_memory(0xe000_0000, 0x10_0000, 100_000).rubbish_memory(0xfee0_0000, 0x1000, 20_000);
    // An interrupt, NMI or INIT that this provokes finds no handler: a reset, unless it comes through to the end. An INIT
    // leaves the vCPU waiting for a start-up message that never comes; the escape key ends that.
    let mut g = start_with_devices(&scratch, &wild.print("alive\n").power_off());
    g.expect("up");
    let ended = g.wait_or(std::time::Duration::from_secs(20), |g| g.send("\x01x"));
    assert!(matches!(ended.code(), Some(0 | 3)), "{ended}");
}

#[test]
fn the_serial_port_leads_to_a_file() {
    let scratch = Scratch::new("tiny-file");
    let place = scratch.file("out", b"of the run before, and longer than what comes now");
    let image = Code::new().print("to the file\n").power_off().multiboot();
    let g = start(&scratch, &image, &["--serial", &format!("file:{}", text(&place))]);
    assert_eq!(g.wait().code(), Some(0));
    assert_eq!(std::fs::read(&place).expect("the file"), b"to the file\n");
}

#[test]
fn the_serial_port_leads_to_a_pseudo_terminal() {
    let scratch = Scratch::new("tiny-pty");
    let kernel = scratch.file("kernel", &Code::new().echo().multiboot());
    let mut command = ringfort(&["run", "--memory", "64M", "--kernel", text(&kernel), "--serial", "pty"]);
    let mut child = Child(command.stderr(std::process::Stdio::piped()).spawn().expect("ringfort"));
    let mut stderr = std::io::BufReader::new(child.0.stderr.take().expect("piped"));
    let name = loop {
        let mut line = String::new();
        assert_ne!(
            std::io::BufRead::read_line(&mut stderr, &mut line).expect("stderr"),
            0,
            "no name was told"
        );
        if let Some((_, name)) = line.split_once("serial port: ") {
            break name.trim().to_owned();
        }
    };
    let mut pty =
        std::fs::OpenOptions::new().read(true).write(true).open(&name).expect("the pseudo-terminal");
    pty.write_all(b"there and back").expect("typed");
    let mut back = [0; 14];
    pty.read_exact(&mut back).expect("echoed");
    assert_eq!(&back, b"there and back");
    child.signal("TERM");
    assert_eq!(child.0.wait().expect("its status").code(), Some(0));
}

#[test]
fn the_serial_port_leads_to_a_unix_socket() {
    let scratch = Scratch::new("tiny-unix");
    let place = scratch.0.join("serial.sock");
    let mut g =
        start(&scratch, &Code::new().echo().multiboot(), &["--serial", &format!("unix:{}", text(&place))]);
    // One client after another.
    for _ in 0..2 {
        let mut client = loop {
            match UnixStream::connect(&place) {
                Ok(c) => break c,
                Err(_) => assert!(g.is_running(), "it ended early"),
            }
        };
        client.write_all(b"there and back").expect("typed");
        let mut back = [0; 14];
        client.read_exact(&mut back).expect("echoed");
        assert_eq!(&back, b"there and back");
    }
    g.signal("TERM");
    assert_eq!(g.wait().code(), Some(0));
    assert!(!place.exists(), "the socket stayed");
}

#[test]
fn remarks_bear_the_name_of_the_machine() {
    let scratch = Scratch::new("tiny-name");
    // Firmware's debug port goes to standard error.
    let code = "remark\n".bytes().fold(Code::new(), |c, b| c.outb(0x402, b)).power_off();
    let kernel = scratch.file("kernel", &code.multiboot());
    let out = ringfort(&["run", "--memory", "64M", "--kernel", text(&kernel), "--name", "web-1"]).output();
    let out = out.expect("ringfort");
    assert_eq!(out.status.code(), Some(0));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("ringfort: web-1: remark"), "{said}");
}
