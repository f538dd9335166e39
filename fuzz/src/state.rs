//! Saved state: whatever a file says, reading it and loading devices with it ends with a machine or an error.

use crate::Input;
use ringfort_bus::{Device as _, FakeClock, ManualTimer, Timer, TimerDevice};
use ringfort_devices::power::{PowerEvent, PowerSink};
use ringfort_devices::serial::SerialSink;
use ringfort_engine::CpuState;
use ringfort_machine_pc::layout::Layout;
use ringfort_machine_pc::{Pc, PcConfig, SerialPort, Timers};
use ringfort_state::{Section, Writer};
use ringfort_vmm::config::VmConfig;
use ringfort_vmm::saved::Saved;
use ringfort_x86::cpuid::CpuidTable;
use std::sync::{Arc, Mutex, OnceLock, Weak};

struct Nothing;

impl PowerSink for Nothing {
    fn event(&self, _: PowerEvent) {}
}
impl SerialSink for Nothing {
    fn write(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}
impl Timers for Nothing {
    fn timer(&self) -> (Arc<dyn Timer>, usize) {
        (ManualTimer::new(), 0)
    }
    fn bind(&self, _: usize, _: Weak<Mutex<dyn TimerDevice>>, _: u32) {}
}

/// A machine, and its sections as they are at first.
fn machine() -> &'static (Arc<Pc>, Vec<Section>) {
    static MACHINE: OnceLock<(Arc<Pc>, Vec<Section>)> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let layout = Layout::new(32 << 20, 40).expect("a layout");
        let config = PcConfig {
            memory: layout.allocate().expect("memory"),
            layout,
            clock: FakeClock::new(),
            power: Arc::new(Nothing),
            serial: vec![SerialPort { sink: Box::new(Nothing), room: Box::new(|| {}) }],
            debugcon: Some((0x402, Box::new(|_| {}))),
            debug_exit: Some(0xf4),
            pvpanic: true,
            hpet: true,
            host_irqchip: false,
            log: Arc::new(|_| {}),
        };
        let pc = Pc::new(config, &Nothing).expect("a machine");
        let sections = pc.save().expect("a state");
        (pc, sections)
    })
}

/// The sections of a file about a machine without disks.
fn sections() -> Vec<Section> {
    let config = serde_json_of(&VmConfig::default());
    let cpuid = vec![CpuidTable::default()];
    vec![
        // What they hold, in order, is what the encoding says as well.
        Section::new("machine", 0, 1, &("0", "soft", 0u64, config, [0u8; 16], 1u32, cpuid)),
        Section::new("clocks", 0, 1, &(0u64, 0u64)),
        Section::new("vcpu", 0, 1, &(0u32, CpuState::default())),
    ]
}

fn serde_json_of(config: &VmConfig) -> String {
    serde_json::to_string(config).expect("a configuration is plain data")
}

/// First byte: the file as it is, or one with right checksums and a section changed, or a device's section changed. Then what is put there.
pub fn state_file(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() % 4 {
        0 => read(&[b"RFSTATE1", input.rest()].concat()),
        1 => {
            let mut all = sections();
            change(&mut all, &mut input);
            let mut file = write(&all);
            file.extend_from_slice(input.rest());
            read(&file);
        }
        2 => {
            // The page streams of a file whose sections are right.
            let mut file = write(&sections());
            file.extend_from_slice(input.rest());
            read(&file);
        }
        _ => {
            let (pc, good) = machine();
            let mut all = good.clone();
            change(&mut all, &mut input);
            if let Err(e) = pc.load(&all) {
                assert!(!e.to_string().contains('\n'), "an error is one line: {e}");
            }
            // Whatever it took over, its registers answer and it can be saved again.
            use ringfort_engine::MachineBus as _;
            for port in (0..0x1000).chain([0xcf8, 0xcfc]) {
                pc.pio_read(port, &mut [0]);
            }
            for s in pc.serial() {
                let _ = ringfort_bus::lock(s).save();
            }
            assert_eq!(pc.save().expect("a state").len(), good.len());
            pc.load(good).expect("its own state");
        }
    }
}

/// Change one section: its version, or bytes of its body.
fn change(all: &mut [Section], input: &mut Input<'_>) {
    let n = usize::from(input.u8()) % all.len();
    let section = &mut all[n];
    let how = input.u8();
    if how.is_multiple_of(16) {
        section.version = u32::from(input.u8());
    }
    if how % 16 == 1 {
        section.body.truncate(usize::from(input.u16()));
    }
    for _ in 0..how / 16 {
        let at = usize::from(input.u16());
        let byte = input.u8();
        if !section.body.is_empty() {
            let at = at % section.body.len();
            section.body[at] = byte;
        }
    }
}

fn write(all: &[Section]) -> Vec<u8> {
    let mut w = Writer::new(Vec::new()).expect("memory");
    all.iter().for_each(|s| w.section(s).expect("memory"));
    w.finish().expect("memory")
}

fn read(file: &[u8]) {
    let all = Saved::read(file).and_then(|mut s| s.streams());
    if let Err(e) = all {
        let said = e.to_string();
        assert!(!said.is_empty() && !said.contains('\n'), "an error is one line: {said}");
    }
}
