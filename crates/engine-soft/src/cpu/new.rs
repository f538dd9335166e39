//! Making and resetting a vCPU.

use super::*;
use crate::vcpu::Env;
use ringfort_memory::RamMap;
use ringfort_x86::msr::{AMD_OSVW_ID_LENGTH, AMD_OSVW_STATUS, IA32_ARCH_CAPABILITIES};
use ringfort_x86::segment::{ACCESSED, CODE, PRESENT, RW, S};

impl Cpu {
    /// A vCPU in its power-on state.
    pub fn new(ram: RamMap, cpuid: CpuidTable, env: Env) -> Box<Cpu> {
        let maxphyaddr = cpuid.find(0x8000_0008, 0).map_or(40, |l| l.eax & 0xff);
        let features = crate::decode::FeatureSet::from_cpuid(&cpuid);
        let mut cpu = Box::new(Cpu {
            regs: [0; 18],
            arith: 0x200,
            trap: TrapInfo::default(),
            sys_flags: 0,
            cpl: 0,
            code_size: CodeSize::Bits16,
            seg: [Segment::real(0); 6],
            block_end: std::ptr::null(),
            current: std::ptr::null(),
            mode: crate::decode::Mode { code: CodeSize::Bits16, stack: 2, flat: false, real: true },
            mode_key: 0,
            hot: crate::translate::Hot::new(&env.me.requests),
            translator: None,
            vec: Vectors { ymm: [Ymm::default(); 16], mxcsr: 0x1f80 },
            fpu: Fpu { image: [0; 512], fip: 0, fcs: 0, fdp: 0, fds: 0, fop: 0 },
            mmu: Mmu::new(ram, maxphyaddr),
            tr: Segment::default(),
            ldtr: Segment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: XCR0_X87,
            pdptrs: [0; 4],
            dr: [0; 4],
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            pending_db: 0,
            sysenter: [0; 3],
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            msrs: BTreeMap::new(),
            shadow: Shadow::None,
            nmi_blocked: false,
            activity: Activity::Running,
            no_step_trap: false,
            local: crate::apic::Local::new(&cpuid),
            ext: 0,
            amd: super::cpuid::is_amd(&cpuid),
            masks: ControlMasks::from_cpuid(&cpuid),
            pauses: 0,
            debugger: crate::vcpu::Debugger::default(),
            cache: crate::cache::BlockCache::default(),
            features,
            decode_options: crate::decode::options(&cpuid),
            cpuid,
            env,
        });
        if cpu.declares(7, 3, 29) {
            cpu.msrs.insert(IA32_ARCH_CAPABILITIES, crate::flaws::arch_capabilities());
        }
        cpu.reset(false);
        cpu
    }

    /// Power-on reset, or INIT (which keeps what Intel SDM 3A table 9-1 says it keeps: x87, SSE, MSRs, CR0.CD/NW, TSC).
    pub fn reset(&mut self, init: bool) {
        let cpuid_1 = self.cpuid.find(1, 0).map_or(0, |l| l.eax);
        self.regs = [0; 18];
        self.regs[gpr::RDX] = u64::from(cpuid_1);
        self.regs[usize::from(RIP)] = 0xfff0;
        self.set_rflags_raw(0);
        self.seg = [Segment::real(0); 6];
        self.seg[CS] = Segment {
            selector: 0xf000,
            attrs: PRESENT | S | CODE | RW | ACCESSED,
            limit: 0xffff,
            base: 0xffff_0000,
        };
        self.tr = Segment { selector: 0, attrs: PRESENT | 11, limit: 0xffff, base: 0 };
        self.ldtr = Segment { selector: 0, attrs: PRESENT | 2, limit: 0xffff, base: 0 };
        self.gdtr = TableRegister { base: 0, limit: 0xffff };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        let kept = if init { self.cr0 & (CR0_CD | CR0_NW) } else { CR0_CD | CR0_NW };
        self.cr0 = CR0_ET | kept;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.dr = [0; 4];
        self.dr6 = DR6_FIXED;
        self.dr7 = DR7_FIXED;
        self.pending_db = 0;
        self.update_watched();
        self.shadow = Shadow::None;
        self.nmi_blocked = false;
        self.cpl = 0;
        if !init {
            self.xcr0 = XCR0_X87;
            self.vec = Vectors { ymm: [Ymm::default(); 16], mxcsr: 0x1f80 };
            self.fpu = Fpu { image: [0; 512], fip: 0, fcs: 0, fdp: 0, fds: 0, fop: 0 };
            // FCW after reset (FNINIT leaves 0x37f): Intel SDM 3A table 9-1.
            self.fpu.image[0] = 0x40;
            self.sysenter = [0; 3];
            self.star = 0;
            self.lstar = 0;
            self.cstar = 0;
            self.sfmask = 0;
            self.kernel_gs_base = 0;
            self.tsc_aux = 0;
            // What is told of the CPU does not change with a reset.
            self.msrs
                .retain(|n, _| matches!(*n, IA32_ARCH_CAPABILITIES | AMD_OSVW_ID_LENGTH | AMD_OSVW_STATUS));
        }
        self.activity = Activity::Running;
        self.apic_reset(init);
        self.mmu.flush_all();
        self.update_decode_mode();
        self.update_mmu_mode();
    }
}
