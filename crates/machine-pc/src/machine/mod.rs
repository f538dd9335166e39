//! The machine: devices on buses, interrupt lines between them, and what an engine asks of it all.
//!
//! # Locks
//! A device's lock is taken first, then those of the lines it drives (wired-or, PIRQ), then the 8259's or the I/O APIC's,
//! then the engine's. Nothing calls back the other way: power events and timers are only noted by their receivers.

mod irq;
#[cfg(test)]
mod tests;

use crate::acpi::{self, AcpiConfig, AcpiError};
use crate::boot::{self, BootError, ImageFile, Loaded, Module};
use crate::layout::{self, Layout};
use crate::mptable;
use crate::smbios::{self, SmbiosConfig, SmbiosError};
use irq::{ExtInt, Follower, VmLink, Wires};
use ringfort_bus::{
    BusError, Clock, Device, DoorbellSink, IrqLine, MmioBus, MsiSink, NoIrq, PioBus, PortIo, Section, Shared,
    StateError, Timer, TimerDevice, lock, shared,
};
use ringfort_devices::acpi_pm::{self, AcpiPm, ResetControl};
use ringfort_devices::debug_exit::{self, DebugExit};
use ringfort_devices::debugcon::DebugCon;
use ringfort_devices::hpet::{self, Hpet};
use ringfort_devices::i8042::{self, I8042};
use ringfort_devices::ioapic::IoApic;
use ringfort_devices::line::LineMux;
use ringfort_devices::pci::{
    Bdf, ConfigPorts, HostBridge, Lpc, PciBus, PciError, PciFunction, Window, Windows,
};
use ringfort_devices::pic::{self, Pic};
use ringfort_devices::pit::{self, Pit};
use ringfort_devices::power::PowerSink;
use ringfort_devices::pvpanic::{self, PvPanic};
use ringfort_devices::rtc::{self, Rtc};
use ringfort_devices::serial::{self, Serial, SerialSink};
use ringfort_devices::system_port::{self, DmaPages, PortA};
use ringfort_engine::{EngineError, MachineBus, Vm};
use ringfort_memory::GuestMemory;
use ringfort_x86::cpuid::CpuBuilder;
use std::sync::{Arc, Mutex, Weak};

/// The machine's timer service, as it is given to [`Pc::new`].
pub trait Timers {
    /// A new timer, and its number for [`Timers::bind`].
    fn timer(&self) -> (Arc<dyn Timer>, usize);
    /// When timer `number` goes off, call [`TimerDevice::timer_expired`] of `device` with `index`.
    fn bind(&self, number: usize, device: Weak<Mutex<dyn TimerDevice>>, index: u32);
}

/// Host end of a serial port.
pub struct SerialPort {
    /// Takes the bytes that the guest sends.
    pub sink: Box<dyn SerialSink>,
    /// Called when the guest has made room for more bytes after some were refused.
    pub room: Box<dyn Fn() + Send>,
}

/// Where the debug console's bytes go.
pub type DebugSink = Box<dyn FnMut(&[u8]) + Send>;

/// What a machine is made of.
pub struct PcConfig {
    /// Memory map.
    pub layout: Layout,
    /// RAM, allocated by that layout.
    pub memory: GuestMemory,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Power-off, reset, panic, debug exit.
    pub power: Arc<dyn PowerSink>,
    /// Serial ports, COM1 first; at most four.
    pub serial: Vec<SerialPort>,
    /// Debug console: port and sink.
    pub debugcon: Option<(u16, DebugSink)>,
    /// Debug exit device: its port.
    pub debug_exit: Option<u16>,
    /// pvpanic device.
    pub pvpanic: bool,
    /// High-precision event timer. Not beside controllers in the engine's host: it takes the timer's interrupt over.
    pub hpet: bool,
    /// 8259, I/O APIC and 8254 are in the engine's host ([`ringfort_engine::Irqchip`]); here is only their state while nothing runs.
    pub host_irqchip: bool,
    /// One-line remarks about the guest.
    pub log: Arc<dyn Fn(&str) + Send + Sync>,
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum PcError {
    /// Two devices want one address.
    #[error("machine: {0}")]
    Bus(#[from] BusError),
    /// A PCI function has no place.
    #[error("machine: {0}")]
    Pci(#[from] PciError),
    /// More serial ports than there are.
    #[error("machine: {0} serial ports are too many; at most 4 are possible")]
    Serial(usize),
    /// All PCI slots are taken.
    #[error("machine: all 31 PCI slots are taken; use fewer devices")]
    Slots,
    /// ACPI tables.
    #[error("machine: {0}")]
    Acpi(#[from] AcpiError),
    /// SMBIOS tables.
    #[error("machine: {0}")]
    Smbios(#[from] SmbiosError),
    /// RAM is not where the layout says.
    #[error("machine: guest memory: {0}")]
    Memory(String),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// What the firmware tables say about CPUs and the machine.
pub struct Identity<'a> {
    /// The vCPUs; their number is the topology's.
    pub cpu: &'a CpuBuilder,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// UUID, in the order it is written in.
    pub uuid: [u8; 16],
    /// Version of the product.
    pub version: &'a str,
    /// Serial number; empty for none.
    pub serial: &'a str,
}

/// 8259 inputs that PIRQ A to H lead to after reset.
const PIRQ: [u8; 8] = [10, 10, 11, 11, 10, 10, 11, 11];

/// A PC.
pub struct Pc {
    layout: Layout,
    memory: GuestMemory,
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    vm: Arc<VmLink>,
    host_irqchip: bool,
    wires: Arc<Wires>,
    pic: Shared<Pic>,
    ioapic: Shared<IoApic>,
    pit: Shared<Pit>,
    pci: Arc<PciBus>,
    config_ports: Arc<ConfigPorts>,
    pm: Shared<AcpiPm>,
    rtc: Shared<Rtc>,
    keyboard: Shared<I8042>,
    serial: Vec<Shared<Serial>>,
    pvpanic: bool,
    hpet: bool,
    /// All but PCI functions, configuration ports and the two interrupt controllers, in the order they are saved in.
    devices: Vec<Arc<Mutex<dyn Device>>>,
    _follower: Arc<Follower>,
}

/// Bind a device's timers: `numbers` of the service to indices 0, 1, ….
fn bind<T: TimerDevice + 'static>(timers: &dyn Timers, device: &Shared<T>, number: usize) {
    let d: Arc<Mutex<dyn TimerDevice>> = device.clone();
    timers.bind(number, Arc::downgrade(&d), 0);
}

impl Pc {
    /// Build the machine. It is connected to an engine's VM afterwards, by [`Pc::connect`].
    ///
    /// # Errors
    /// [`PcError`].
    pub fn new(config: PcConfig, timers: &dyn Timers) -> Result<Arc<Pc>, PcError> {
        let PcConfig { layout, memory, clock, power, .. } = config;
        let pio = Arc::new(PioBus::default());
        let mmio = Arc::new(MmioBus::default());
        let vm = Arc::new(VmLink::default());
        let host_irqchip = config.host_irqchip;
        let intr: Arc<dyn IrqLine> =
            if host_irqchip { Arc::new(NoIrq) } else { Arc::new(ExtInt(vm.clone())) };
        let pic = shared(Pic::new(intr));
        let ioapic = shared(IoApic::new(0, vm.clone()));
        let wires = if host_irqchip { Wires::to_host(&vm) } else { Wires::new(&pic, &ioapic) };
        let wires = Arc::new(wires);
        let mut devices: Vec<Arc<Mutex<dyn Device>>> = Vec::new();

        if !host_irqchip {
            for (base, len) in pic::PORTS {
                pio.insert("pic", base.into(), len.into(), pic.clone())?;
            }
            mmio.insert("ioapic", layout::IOAPIC_BASE, layout::IOAPIC_SIZE, ioapic.clone())?;
        }

        // In legacy replacement mode the HPET takes IRQ 0 and 8 over.
        let legacy = [LineMux::new(wires.isa(0)), LineMux::new(wires.isa(rtc::IRQ))];
        let (timer, number) = timers.timer();
        let irq: Arc<dyn IrqLine> = if host_irqchip { Arc::new(NoIrq) } else { legacy[0].input(false) };
        let pit = shared(Pit::new(clock.clone(), timer, irq));
        if !host_irqchip {
            bind(timers, &pit, number);
            for (base, len) in pit::PORTS {
                pio.insert("pit", base.into(), len.into(), pit.clone())?;
            }
        }
        devices.push(pit.clone());

        let (timer, number) = timers.timer();
        let rtc = shared(Rtc::new(clock.clone(), timer, legacy[1].input(false)));
        bind(timers, &rtc, number);
        pio.insert("rtc", rtc::BASE.into(), rtc::LEN.into(), rtc.clone())?;
        devices.push(rtc.clone());

        if config.hpet {
            let routed = |n: u8| if hpet::ROUTES >> n & 1 != 0 { wires.ioapic(n) } else { None };
            let out = hpet::Outputs { pins: (0..32).map(routed).collect(), legacy, msi: vm.clone() };
            let (timer, number) = timers.timer();
            let d = shared(Hpet::new(3, clock.clone(), timer, out));
            bind(timers, &d, number);
            mmio.insert("hpet", layout::HPET_BASE, layout::HPET_SIZE, d.clone())?;
            devices.push(d);
        }

        // A20 is always open, as on every chipset since the 2010s: both gates are kept and lead nowhere.
        let irqs = [wires.isa(i8042::IRQS.0), wires.isa(i8042::IRQS.1)];
        let keyboard = shared(I8042::new(irqs, Arc::new(NoIrq), power.clone()));
        for port in [i8042::DATA, i8042::COMMAND] {
            pio.insert("i8042", port.into(), 1, keyboard.clone())?;
        }
        devices.push(keyboard.clone());
        let port_a = shared(PortA::new(Arc::new(NoIrq), power.clone()));
        pio.insert("port-a", system_port::PORT_A.into(), 1, port_a.clone())?;
        devices.push(port_a);
        let pages = shared(DmaPages::new());
        pio.insert("dma-pages", system_port::PAGES.into(), system_port::PAGES_LEN.into(), pages.clone())?;
        devices.push(pages);

        if config.serial.len() > serial::COM.len() {
            return Err(PcError::Serial(config.serial.len()));
        }
        let mut ports = Vec::new();
        for ((n, port), (base, line)) in (0u32..).zip(config.serial).zip(serial::COM) {
            let (timer, number) = timers.timer();
            let uart =
                shared(Serial::new(n, base, wires.isa(line), port.sink, clock.clone(), timer, port.room));
            bind(timers, &uart, number);
            pio.insert("serial", base.into(), serial::LEN.into(), uart.clone())?;
            devices.push(uart.clone());
            ports.push(uart);
        }

        let (timer, number) = timers.timer();
        let pm_config = acpi_pm::Config { acpi_on: true, timer_32bit: false };
        let pm = shared(AcpiPm::new(pm_config, clock, timer, wires.isa(layout::SCI_IRQ), power.clone()));
        bind(timers, &pm, number);
        pio.insert("smi-command", acpi_pm::SMI_COMMAND.into(), 2, pm.clone())?;
        devices.push(pm.clone());
        let reset = shared(ResetControl::new(power.clone()));
        devices.push(reset.clone());
        if config.pvpanic {
            let d = shared(PvPanic::new(power.clone()));
            pio.insert("pvpanic", pvpanic::PORT.into(), 1, d.clone())?;
            devices.push(d);
        }
        if let Some(port) = config.debug_exit {
            let d = shared(DebugExit::new(power));
            pio.insert("debug-exit", port.into(), debug_exit::LEN.into(), d.clone())?;
            devices.push(d);
        }
        if let Some((port, sink)) = config.debugcon {
            let d = shared(DebugCon::new(sink));
            pio.insert("debugcon", port.into(), 1, d.clone())?;
            devices.push(d);
        }

        let log = config.log;
        let pci = PciBus::new(mmio.clone(), pio.clone(), move |line: &str| log(line));
        let reset: Arc<dyn PortIo> = reset;
        let config_ports = Arc::new(ConfigPorts::new(pci.clone(), Some(reset)));
        pio.insert("pci-config", ConfigPorts::BASE.into(), ConfigPorts::LEN.into(), config_ports.clone())?;
        pci.add(HostBridge::BDF, HostBridge::new(&pci, Some(layout::ECAM_BASE)))?;
        let lpc = Lpc::new(Some(layout::PM_BASE), PIRQ.map(Some));
        let follower = Arc::new(Follower {
            wires: wires.clone(),
            pio: pio.clone(),
            pm: pm.clone(),
            at: Mutex::new(None),
        });
        lpc.set_listener(follower.clone());
        pci.add(Lpc::BDF, lpc)?;

        let pc = Pc {
            layout,
            memory,
            pio,
            mmio,
            vm,
            host_irqchip,
            wires,
            pic,
            ioapic,
            pit,
            pci,
            config_ports,
            pm,
            rtc,
            keyboard,
            serial: ports,
            pvpanic: config.pvpanic,
            hpet: config.hpet,
            devices,
            _follower: follower,
        };
        pc.set_cmos();
        Ok(Arc::new(pc))
    }

    /// Connect the engine's VM: interrupts go there from now on. Once only; later calls change nothing.
    pub fn connect(&self, vm: Arc<dyn Vm>) {
        // A second VM for one machine is a caller's slip that must not redirect the first one's interrupts.
        if self.vm.0.set(vm).is_ok() {
            lock(&self.ioapic).set_listener(self.vm.clone());
            self.vm.queue_stores(self.host_irqchip);
        }
    }

    /// Where message-signalled interrupts of devices go.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        self.vm.clone()
    }

    /// Where devices have their doorbells connected.
    pub fn doorbells(&self) -> Arc<dyn DoorbellSink> {
        self.vm.clone()
    }

    /// The interrupt line of pin `pin` (1 to 4) of a PCI device on bus 0.
    pub fn intx(&self, device: u8, pin: u8) -> Arc<dyn IrqLine> {
        self.wires.intx(device, pin)
    }

    /// Put a PCI function made by `make` (from its MSI sink and its INTA line) in slot `slot`, or in the first free one.
    ///
    /// # Errors
    /// What `make` says, or [`PcError`] when there is no place.
    pub fn add_pci<E: From<PcError>>(
        &self,
        slot: Option<u8>,
        make: impl FnOnce(Arc<dyn MsiSink>, Arc<dyn IrqLine>) -> Result<Arc<dyn PciFunction>, E>,
    ) -> Result<Bdf, E> {
        let bdf = match slot {
            Some(n) => Bdf::new(0, n, 0),
            None => self.pci.free_slot(1).ok_or(PcError::Slots)?,
        };
        let function = make(self.msi(), self.intx(bdf.device, 1))?;
        self.pci.add(bdf, function).map_err(PcError::from)?;
        Ok(bdf)
    }

    /// The PCI segment.
    pub fn pci(&self) -> &Arc<PciBus> {
        &self.pci
    }

    /// RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Memory map.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Serial ports, COM1 first, for feeding input.
    pub fn serial(&self) -> &[Shared<Serial>] {
        &self.serial
    }

    /// Keyboard and mouse.
    pub fn keyboard(&self) -> &Shared<I8042> {
        &self.keyboard
    }

    /// The power button is pressed. Gives whether the guest listens.
    pub fn power_button(&self) -> bool {
        let mut pm = lock(&self.pm);
        pm.power_button();
        pm.power_button_enabled()
    }

    /// The sleep button is pressed.
    pub fn sleep_button(&self) {
        lock(&self.pm).sleep_button();
    }

    /// Do what firmware would have done before a kernel: place BARs, write ACPI, SMBIOS and MP tables.
    /// Gives the RSDP's address. To be called before each boot, after [`Pc::reset`] in case of a reset.
    ///
    /// # Errors
    /// [`PcError`].
    pub fn prepare(&self, id: &Identity<'_>) -> Result<u64, PcError> {
        let mut windows = Windows {
            io: Window::new(layout::PCI_IO.0, layout::PCI_IO.1),
            mem32: Window::new(layout::PCI_MEM32.0, layout::PCI_MEM32.1),
            mem64: Some(Window::new(self.layout.pci_mem64().0, self.layout.pci_mem64().1)),
        };
        self.pci.assign(&mut windows, |bdf, pin| {
            let input = layout::pci_gsi(bdf.device, pin) - layout::PCI_GSI_BASE;
            PIRQ[input as usize & 7]
        })?;
        let topology = id.cpu.topology();
        let apic_ids: Vec<u32> = (0..topology.cpus()).map(|n| topology.apic_id(n)).collect();
        let serial: Vec<(u16, u8)> = serial::COM.iter().copied().take(self.serial.len()).collect();
        let tables = acpi::build(&AcpiConfig {
            layout: &self.layout,
            apic_ids: &apic_ids,
            serial: &serial,
            hpet: self.hpet,
            i8042: true,
            pvpanic: self.pvpanic,
            s5_type: acpi_pm::sleep_type::S5,
            smi_command: None,
            pm_timer_32: false,
            pirq: PIRQ,
        })?;
        let rsdp = tables.install(&self.memory)?;

        let first = id.cpu.table(0);
        let (signature, features) = first.find(1, 0).map_or((0, 0), |l| (l.eax, l.edx));
        let vendor = String::from_utf8_lossy(id.cpu.vendor().id()).into_owned();
        let smbios = smbios::build(&SmbiosConfig {
            layout: &self.layout,
            topology: (topology.sockets, topology.cores, topology.threads),
            cpuid: (signature, features),
            cpu_vendor: &vendor,
            cpu_brand: &id.cpu.brand(),
            cpu_mhz: (id.tsc_khz / 1000).min(0xffff) as u16,
            uuid: id.uuid,
            version: id.version,
            serial: id.serial,
        })?;
        smbios::install(&self.memory, &smbios)?;
        mptable::install(&self.memory, &mptable::build(&apic_ids, signature, features))
            .map_err(|e| PcError::Memory(e.to_string()))?;
        Ok(rsdp)
    }

    /// [`Pc::prepare`], then load a kernel. The boot vCPU begins at [`Loaded::entry`].
    ///
    /// # Errors
    /// [`PcError`].
    pub fn boot_kernel<'a>(
        &'a self,
        id: &Identity<'_>,
        kernel: &mut dyn ImageFile,
        modules: Vec<Module<'a>>,
        cmdline: &'a str,
    ) -> Result<Loaded, PcError> {
        let rsdp = self.prepare(id)?;
        let mut b = boot::Boot { layout: &self.layout, cmdline, modules, rsdp: Some(rsdp) };
        Ok(boot::load(&self.memory, kernel, &mut b)?)
    }

    /// Power-on reset of all devices. RAM keeps its content. vCPUs must not run meanwhile; resetting them is the
    /// caller's.
    pub fn reset(&self) {
        for d in &self.devices {
            lock(d).reset();
        }
        self.pci.reset();
        self.config_ports.reset();
        lock(&self.pic).reset();
        lock(&self.ioapic).reset();
        // The host takes the registers that it gives, but for a VM that is broken; then its vCPUs say so.
        let _ = self.give_irqchip();
        self.set_cmos();
    }

    /// Memory sizes in CMOS RAM, as firmware and old kernels look for them.
    fn set_cmos(&self) {
        let mut rtc = lock(&self.rtc);
        let kib = self.layout.low_ram_end() >> 10;
        let extended = (kib - 1024).min(0xffff) as u16;
        let above_16m = ((kib.saturating_sub(16 << 10)) / 64).min(0xffff) as u16;
        let high = self.layout.ram().saturating_sub(layout::LOW_RAM_LIMIT) >> 16;
        let words = [(0x15, 640), (0x17, extended), (0x30, extended), (0x34, above_16m)];
        for (at, v) in words {
            rtc.set_cmos(at, v as u8);
            rtc.set_cmos(at + 1, (v >> 8) as u8);
        }
        for (at, shift) in [(0x5b, 0), (0x5c, 8), (0x5d, 16)] {
            rtc.set_cmos(at, (high >> shift) as u8);
        }
        // Equipment: x87, PS/2 mouse.
        rtc.set_cmos(0x14, 0x06);
    }

    /// Take over the registers of controllers in the engine's host. Nothing may run.
    fn fetch_irqchip(&self) -> Result<(), EngineError> {
        if let Some(chip) = self.vm.0.get().and_then(|vm| vm.irqchip()) {
            lock(&self.pic).set_registers(&chip.pics()?);
            lock(&self.ioapic).set_registers(&chip.ioapic()?);
            lock(&self.pit).set_registers(&chip.pit()?);
        }
        Ok(())
    }

    /// Give them theirs.
    fn give_irqchip(&self) -> Result<(), EngineError> {
        if let Some(chip) = self.vm.0.get().and_then(|vm| vm.irqchip()) {
            let (pics, ioapic) = (lock(&self.pic).registers(), lock(&self.ioapic).registers());
            chip.set(&pics, &ioapic, &lock(&self.pit).registers())?;
        }
        Ok(())
    }

    /// All sections of the machine but RAM and CPUs, in the order that [`Pc::load`] takes them. Nothing may run.
    ///
    /// # Errors
    /// When the engine's host does not tell the state of controllers that it has.
    pub fn save(&self) -> Result<Vec<Section>, EngineError> {
        self.fetch_irqchip()?;
        let mut all: Vec<Section> = self
            .devices
            .iter()
            .map(|d| {
                let d = lock(d);
                Section { instance: d.instance(), ..d.save() }
            })
            .collect();
        all.extend(self.pci.save());
        all.push(self.config_ports.save());
        all.push(lock(&self.pic).save());
        all.push(lock(&self.ioapic).save());
        Ok(all)
    }

    /// Take over a saved state of an equally built machine; sections of others (CPUs) are left alone. Interrupt controllers
    /// come last: what devices do to their lines on the way there is overwritten.
    ///
    /// # Errors
    /// When a section is missing, damaged or of another machine. The machine is then not to be run.
    pub fn load(&self, sections: &[Section]) -> Result<(), StateError> {
        let find = |kind: &str, instance: u32| {
            sections
                .iter()
                .find(|s| s.kind == kind && s.instance == instance)
                .ok_or_else(|| StateError::Missing(format!("{kind} #{instance}")))
        };
        self.reset();
        for d in &self.devices {
            let mut d = lock(d);
            let section = find(d.kind(), d.instance())?;
            d.load(section)?;
        }
        self.pci.load(sections)?;
        let ports = self.config_ports.save();
        self.config_ports.load(find(&ports.kind, ports.instance)?)?;
        let load = |d: &mut dyn Device| -> Result<(), StateError> { d.load(find(d.kind(), d.instance())?) };
        load(&mut *lock(&self.pic))?;
        load(&mut *lock(&self.ioapic))?;
        self.give_irqchip().map_err(|e| StateError::Stream(e.to_string()))
    }
}

impl MachineBus for Pc {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port, data);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }
    fn extint_vector(&self) -> u8 {
        lock(&self.pic).acknowledge()
    }
    fn ioapic_eoi(&self, vector: u8) {
        lock(&self.ioapic).eoi(vector);
    }
}
