//! From a configuration to a machine: engine, CPUs, memory, devices, kernel.

use crate::config::{KvmIrqchip, Placement, VmConfig};
use crate::disk::OnTrouble;
use crate::error::VmmError;
use crate::lines::{self, Hold, Lines, Room};
use crate::net::{Card, Place};
use crate::saved::{OpenDisk, Saved};
use crate::time::{MachineClock, TimerService};
use crate::vcpus::{VcpuEvent, Vcpus};
use ringfort_base::threads;
use ringfort_bus::{IrqLine, MsiSink};
use ringfort_devices::e1000e::E1000e;
use ringfort_devices::pci::PciFunction;
use ringfort_devices::power::PowerSink;
use ringfort_devices::{debug_exit, debugcon};
use ringfort_engine::{EngineError, Vcpu, Vm};
use ringfort_machine_pc::boot::{Entry, ImageFile, Module};
use ringfort_machine_pc::layout::Layout;
use ringfort_machine_pc::{Identity, Pc, PcConfig, PcError, SerialPort};
use ringfort_memory::RamMap;
use ringfort_net::{MacAddr, NetBackend};
use ringfort_virtio::VirtioDevice;
use ringfort_virtio::balloon::{Balloon, BalloonOptions, HostRelease};
use ringfort_virtio::blk::Blk;
use ringfort_virtio::pci::VirtioPci;
use ringfort_virtio::rng::Rng;
use ringfort_virtio::served::QueueServer;
use ringfort_x86::cpuid::{CpuBuilder, CpuidTable};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

/// Everything of one VM, paused.
pub struct Machine {
    /// Dropped first: see there.
    _unplug: Unplug,
    pub(crate) config: VmConfig,
    /// Name of the engine.
    pub(crate) engine: &'static str,
    cpus: CpuBuilder,
    /// What CPUID says on each vCPU.
    pub(crate) cpuid: Vec<CpuidTable>,
    pub(crate) tsc_khz: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) clock: Arc<MachineClock>,
    pub(crate) pc: Arc<Pc>,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) vcpus: Vcpus,
    /// Disks first, in the order of the configuration.
    virtio: Vec<Arc<VirtioPci>>,
    /// Network cards, in the order of the configuration.
    cards: Vec<Card>,
    pub(crate) disks: Vec<OpenDisk>,
    /// Their devices.
    blks: Vec<Arc<Blk>>,
    /// Keeps input away while paused.
    hold: Arc<Hold>,
    /// Dropped after the vCPUs, so that what the guest said last is written.
    lines: Lines,
    timers: TimerService,
}

/// Takes devices off the machine when it goes. The machine and the engine's VM hold each other, so what the devices have of the host
/// (links, sockets, files) would otherwise stay until the process ends, and then be left behind.
struct Unplug(Arc<Pc>);

impl Drop for Unplug {
    fn drop(&mut self) {
        for (bdf, _) in self.0.pci().functions() {
            self.0.pci().remove(bdf);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody may be at a device that goes.
        self.pause();
    }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> VmmError {
    move |source| VmmError::Host { what, source }
}

impl Machine {
    /// Build the machine that `config` describes, and load its kernel, or take over what was `saved` ([`Machine::load`] is to follow then). `say` gets a line about what was chosen or is missing.
    ///
    /// # Errors
    /// [`VmmError`]; nothing is left behind.
    pub fn build(
        config: &VmConfig,
        saved: Option<&Saved>,
        mut lines: Lines,
        power: Arc<dyn PowerSink>,
        report: impl Fn(usize, VcpuEvent) + Send + Sync + 'static,
        trouble: &OnTrouble,
        say: &mut dyn FnMut(&str),
    ) -> Result<Machine, VmmError> {
        let config = &with_addresses(config);
        let engine = crate::engine::open_for(config, saved, say)?;
        let mut cpus = crate::cpus::describe(config, engine.as_ref(), saved.is_some(), say)?;
        let offered = engine.capabilities();
        let cpuid: Vec<CpuidTable> = match saved {
            None => apic_ids(&cpus).map(|id| cpus.table(id)).collect(),
            Some(s) => {
                let tables = s.cpuid(engine.name(), offered)?;
                if let Some(note) = s.idle_mitigations(engine.name(), offered) {
                    say(&note);
                }
                if let Some(l) = tables.first().and_then(|t| t.find(0x8000_0008, 0)) {
                    cpus.set_physical_bits(l.eax & 0xff);
                }
                tables
            }
        };
        let layout = Layout::new(config.memory, cpus.physical_bits())?;
        let memory = layout.allocate_with(&config.backing.backing())?;

        let clock = MachineClock::new();
        let timers = TimerService::start(clock.clone()).map_err(host("starting the timer thread"))?;
        let log = Arc::new(crate::log::GuestLog::new(&config.name));
        let room = Room::default();
        let hold = Arc::new(Hold::default());
        if saved.is_some() {
            // What is typed from now on is for the guest as it will be.
            hold.hold();
        }
        let debug_log = log.clone();
        let config_of_pc = PcConfig {
            layout,
            memory: memory.clone(),
            clock: clock.clone(),
            power,
            serial: vec![SerialPort { sink: lines::sink(&lines.serial), room: room.caller() }],
            debugcon: Some((debugcon::PORT, Box::new(move |bytes| debug_log.bytes(bytes)))),
            debug_exit: Some(debug_exit::PORT),
            pvpanic: true,
            // The same under every engine, so that a saved machine finds its devices.
            hpet: config.kvm.irqchip == KvmIrqchip::Split,
            host_irqchip: engine.name() == "kvm" && config.kvm.irqchip == KvmIrqchip::Kernel,
            log: Arc::new(move |line| log.line(line)),
        };
        let pc = Pc::new(config_of_pc, &timers)?;
        let unplug = Unplug(pc.clone());
        if let Some(port) = pc.serial().first() {
            lines::join_serial(port, &mut lines.serial, &room, &hold).map_err(VmmError::Serial)?;
        }

        let ram = Arc::new(RamMap::new(&memory));
        let (mut virtio, mut disks, mut blks) = (Vec::new(), Vec::new(), Vec::new());
        for (number, disk) in config.disks.iter().enumerate() {
            let (device, open) =
                crate::disk::open(number, disk, config.cpus, trouble, say).map_err(VmmError::Disk)?;
            disks.push(open);
            blks.push(device.clone());
            virtio.push(add_virtio(&pc, &ram, device)?);
        }
        let mut cards = Vec::new();
        for (n, nic) in config.nets.iter().enumerate() {
            let mut place = Slots { engine: engine.name(), pc: &pc, ram: &ram, virtio: &mut virtio };
            cards.push(Card::new(config, n, nic, &mut place, say).map_err(VmmError::Net)?);
        }
        virtio.push(add_virtio(&pc, &ram, Arc::new(Rng::new()))?);
        let balloon = Balloon::new(BalloonOptions::default(), Arc::new(HostRelease::new(ram.clone())));
        virtio.push(add_virtio(&pc, &ram, Arc::new(balloon))?);
        if let Some(console) = &mut lines.console {
            let device = lines::console(console, &hold).map_err(VmmError::Console)?;
            virtio.push(add_virtio(&pc, &ram, device)?);
        }

        let vm = engine.create_vm(memory.clone(), pc.clone())?;
        pc.connect(vm.clone());
        let vcpus: Vec<Box<dyn Vcpu>> = apic_ids(&cpus)
            .zip(&cpuid)
            .map(|(id, table)| vm.create_vcpu(id, table.clone()))
            .collect::<Result<_, _>>()?;
        let vcpus = Vcpus::start(vcpus, report).map_err(host("starting the vCPU threads"))?;
        place(&vcpus, &config.placement)?;

        let mut machine = Machine {
            _unplug: unplug,
            config: config.clone(),
            engine: engine.name(),
            cpus,
            cpuid,
            tsc_khz: saved.map_or(offered.tsc_khz, Saved::tsc_khz),
            uuid: match saved {
                Some(s) => s.uuid(),
                None => random_uuid().map_err(host("reading random bytes"))?,
            },
            clock,
            pc,
            vm,
            vcpus,
            virtio,
            cards,
            disks,
            blks,
            hold,
            lines,
            timers,
        };
        if saved.is_none() {
            machine.power_on()?;
            machine.commit(false)?;
        }
        Ok(machine)
    }

    /// The machine is about to run: files that take its output lose what they had, or if `append` are written on.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn commit(&mut self, append: bool) -> Result<(), VmmError> {
        self.lines.serial.commit(append).map_err(VmmError::Serial)?;
        if let Some(console) = &mut self.lines.console {
            console.commit(append).map_err(VmmError::Console)?;
        }
        Ok(())
    }

    /// APIC IDs of all vCPUs.
    pub(crate) fn apic_ids(&self) -> impl Iterator<Item = u32> {
        apic_ids(&self.cpus)
    }

    /// What firmware does: place BARs, write tables, load the kernel, set up the boot vCPU.
    fn power_on(&self) -> Result<(), VmmError> {
        let entry = self.load_kernel()?;
        let answers = self.vcpus.with_each(move |number, vcpu| {
            vcpu.reset()?;
            if number == 0 {
                let mut state = vcpu.state()?;
                entry.apply(&mut state);
                vcpu.set_state(&state)?;
            }
            Ok::<(), EngineError>(())
        });
        answers.into_iter().collect::<Result<(), _>>()?;
        Ok(())
    }

    /// Start over, as after a press of the reset button. The machine is paused before and after.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn reset(&self) -> Result<(), VmmError> {
        self.pause();
        self.pc.reset();
        self.power_on()
    }

    /// Let vCPUs and devices run.
    pub fn resume(&self) {
        for v in &self.virtio {
            v.core().resume();
        }
        self.cards.iter().for_each(Card::resume);
        self.clock.resume();
        self.vm.set_time_running(true);
        self.timers.release();
        self.vcpus.resume();
        self.hold.release();
    }

    /// Stop vCPUs and devices, and wait until they have stopped: nothing touches guest memory or changes a device from then on.
    pub fn pause(&self) {
        self.hold.hold();
        self.vcpus.pause();
        self.timers.hold();
        self.vm.set_time_running(false);
        self.clock.pause();
        for v in &self.virtio {
            v.core().pause();
        }
        self.cards.iter().for_each(Card::pause);
        if let Some(e) = self.vm.eventfds() {
            // It fails only for a VM that is broken; then its vCPUs say so.
            let _ = e.settle();
        }
    }

    /// Change the size of disk `number`, in the order of the configuration, to `bytes` (a multiple of 512) and tell its
    /// driver. The machine may run or stand; no request is under way meanwhile.
    ///
    /// # Errors
    /// [`VmmError::Disk`]: no such disk, or its image cannot have that size; then nothing has changed.
    pub fn resize_disk(&self, number: usize, bytes: u64) -> Result<(), VmmError> {
        let found = self.blks.get(number).zip(self.virtio.get(number)).zip(self.config.disks.get(number));
        let Some(((blk, place), disk)) = found else {
            let count = self.blks.len();
            return Err(VmmError::Disk(format!("there is no disk number {number}; the machine has {count}")));
        };
        let path = disk.path.display();
        let fail = |why: &dyn std::fmt::Display| {
            VmmError::Disk(format!("{path}: cannot be resized to {bytes} bytes: {why}"))
        };
        if bytes == 0 || !bytes.is_multiple_of(512) || bytes > i64::MAX as u64 {
            return Err(fail(&"give a multiple of 512"));
        }
        if disk.readonly {
            return Err(fail(&"the machine has it readonly=on"));
        }
        if disk.snapshot {
            return Err(fail(&"a throw-away layer (snapshot=on) keeps its size"));
        }
        place.core().while_paused(|| blk.resize(bytes)).map_err(|e| fail(&e))
    }

    /// Press the power button.
    pub fn power_button(&self) {
        self.pc.power_button();
    }

    /// Pull the cables of all network cards, or plug them in again if they are out; gives what they are afterwards. `None` if there is no
    /// card.
    pub fn toggle_links(&self) -> Option<bool> {
        let up = !self.cards.first()?.link();
        self.cards.iter().for_each(|c| c.set_link(up));
        Some(up)
    }

    /// The guest may be in another place of its networks than before: its drivers say where.
    pub fn announce(&self) {
        self.cards.iter().for_each(Card::announce);
    }

    /// Counters of the engine, and of the network cards as `net0_queue0_rx_frames`.
    pub fn statistics(&self) -> Vec<(String, u64)> {
        let mut all = self.vm.statistics();
        all.extend(self.net_statistics());
        all
    }

    /// Counters of the network cards.
    pub fn net_statistics(&self) -> Vec<(String, u64)> {
        let of_card = |(n, c): (usize, &Card)| {
            c.statistics().into_iter().map(move |(name, value)| (format!("net{n}_{name}"), value))
        };
        self.cards.iter().enumerate().flat_map(of_card).collect()
    }

    fn load_kernel(&self) -> Result<Entry, VmmError> {
        let boot = &self.config.boot;
        let mut kernel = open_file("--kernel", &boot.kernel)?;
        let mut initrd = boot.initrd.as_deref().map(|p| open_file("--initrd", p)).transpose()?;
        let modules =
            initrd.iter_mut().map(|f| Module { file: f as &mut dyn ImageFile, cmdline: String::new() });
        let id = Identity {
            cpu: &self.cpus,
            tsc_khz: self.tsc_khz,
            uuid: self.uuid,
            version: env!("CARGO_PKG_VERSION"),
            serial: "",
        };
        match self.pc.boot_kernel(&id, &mut kernel, modules.collect(), &boot.cmdline) {
            Ok(loaded) => Ok(loaded.entry),
            Err(PcError::Boot(e)) => {
                let initrd =
                    boot.initrd.as_deref().map_or(String::new(), |i| format!(" with {}", i.display()));
                Err(VmmError::Boot(format!("{}{initrd}: {e}", boot.kernel.display())))
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// Put the vCPUs' threads where `placement` says.
fn place(vcpus: &Vcpus, placement: &Placement) -> Result<(), VmmError> {
    let fail = |what: String| Err(VmmError::Cpus(what));
    if !placement.pin.is_empty() {
        let pin = placement.pin.clone();
        let done = vcpus.with_each(move |n, _| pin.get(n).map_or(Ok(()), |&cpu| threads::pin(cpu)));
        let failed = placement.pin.iter().zip(done).find_map(|(cpu, d)| Some((cpu, d.err()?)));
        if let Some((cpu, e)) = failed {
            let usable: Vec<String> =
                threads::usable_cpus().unwrap_or_default().iter().map(u32::to_string).collect();
            return fail(format!(
                "pin: no vCPU can run on host CPU {cpu} ({e}); usable are {}",
                usable.join(", ")
            ));
        }
    }
    if let Some(priority) = placement.realtime
        && let Some(e) =
            vcpus.with_each(move |_, _| threads::real_time(priority)).into_iter().find_map(Result::err)
    {
        return fail(format!(
            "realtime={priority}: {e}; run with the capability CAP_SYS_NICE or raise the limit (ulimit -r), or leave it out"
        ));
    }
    Ok(())
}

/// The configuration with the addresses of all network cards in it, so that a saved machine keeps them.
fn with_addresses(config: &VmConfig) -> VmConfig {
    let mut config = config.clone();
    for (n, nic) in config.nets.iter_mut().enumerate() {
        nic.mac = Some(nic.address(&config.name, n));
    }
    config
}

/// A random UUID (RFC 9562 section 5.4).
fn random_uuid() -> std::io::Result<[u8; 16]> {
    let mut uuid = [0; 16];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut uuid)?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// APIC IDs of all vCPUs, the boot processor's first.
fn apic_ids(cpus: &CpuBuilder) -> impl Iterator<Item = u32> {
    let topology = cpus.topology();
    (0..topology.cpus()).map(move |n| topology.apic_id(n))
}

fn open_file(option: &str, path: &Path) -> Result<File, VmmError> {
    let fail = |e: &dyn std::fmt::Display| VmmError::Boot(format!("{option} {}: {e}", path.display()));
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let kind = std::fs::metadata(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => fail(&"no such file; check the path"),
        _ => fail(&e),
    })?;
    if kind.is_dir() {
        return Err(fail(&"is a directory; name a file"));
    }
    if !kind.is_file() {
        return Err(fail(&"is no regular file; copy what it gives to a file and name that"));
    }
    File::open(path).map_err(|e| match e.kind() {
        ErrorKind::PermissionDenied => fail(&"may not be read; change its permissions or name another"),
        _ => fail(&e),
    })
}

fn add_virtio(pc: &Pc, ram: &Arc<RamMap>, device: Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, VmmError> {
    let mut made = None;
    pc.add_pci(None, |msi: Arc<dyn MsiSink>, line: Arc<dyn IrqLine>| {
        let function =
            VirtioPci::new(device, ram.clone(), msi, line).map_err(|e| VmmError::Machine(e.to_string()))?;
        let function = Arc::new(function.with_doorbells(pc.doorbells()));
        made = Some(function.clone());
        Ok::<Arc<dyn PciFunction>, VmmError>(function)
    })?;
    made.ok_or_else(|| VmmError::Machine("a device was not placed".into()))
}

/// Free places for network cards.
struct Slots<'a> {
    engine: &'static str,
    pc: &'a Pc,
    ram: &'a Arc<RamMap>,
    virtio: &'a mut Vec<Arc<VirtioPci>>,
}

impl Place for Slots<'_> {
    fn vhost_net(&self, taps: &[BorrowedFd<'_>]) -> Result<Arc<dyn QueueServer>, String> {
        // What a kernel thread writes the software engine does not hear of, whose translations go by it.
        if self.engine != "kvm" {
            return Err(format!(
                "the engine is {}, and only a guest of kvm's has memory that the kernel may write",
                self.engine
            ));
        }
        Ok(Arc::new(ringfort_virtio::vhost::open_net(taps, self.pc.memory(), self.ram)?))
    }

    fn virtio(&mut self, device: Arc<dyn VirtioDevice>) -> Result<(), String> {
        self.virtio.push(add_virtio(self.pc, self.ram, device).map_err(|e| e.to_string())?);
        Ok(())
    }

    fn e1000e(&mut self, backend: Arc<dyn NetBackend>, mac: MacAddr) -> Result<Arc<E1000e>, String> {
        let mut made = None;
        let placed = self.pc.add_pci(None, |msi, line| {
            let card = E1000e::new(backend, mac, self.pc.memory().clone(), msi, line)
                .map_err(|e| VmmError::Machine(e.to_string()))?;
            made = Some(card.clone());
            Ok::<Arc<dyn PciFunction>, VmmError>(card)
        });
        placed.map_err(|e| e.to_string())?;
        made.ok_or_else(|| "a card was not placed".into())
    }
}

impl From<PcError> for VmmError {
    fn from(e: PcError) -> VmmError {
        VmmError::Machine(e.to_string())
    }
}
