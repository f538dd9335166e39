//! The machine as gdb sees it: vCPUs are threads, memory is seen through a vCPU's page tables.

use super::arch::{Reg, Regs, X86};
use crate::machine::Machine;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::{BaseStopReason, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as GdbWatch,
};
use gdbstub::target::ext::monitor_cmd::MonitorCmdOps;
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use ringfort_engine::{
    CpuState, DebugRequest, DebugStop, EngineError, MpState, PendingException, Vcpu, Watch, WatchKind,
};
use ringfort_memory::{Bytes as _, GuestAddress, PAGE_SIZE};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// INT3.
const INT3: u8 = 0xcc;
/// Vector of #BP.
const BREAKPOINT: u8 = 3;

/// What gdb wants of a vCPU when the machine goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// What gdb asked to be watched for, as one of the engine's watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Watched {
    watch: Watch,
    /// What gdb calls it: a software breakpoint whose address was not mapped, a hardware breakpoint, a watchpoint at this address.
    origin: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Software,
    Hardware,
    Watchpoint(u64, u64, GdbWatch),
}

/// Where a software breakpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In memory, at this physical address.
    Memory(u64),
    /// It was not mapped: watched for by its address.
    Address,
}

/// The target.
pub struct Debuggee {
    pub(super) machine: Rc<Machine>,
    /// The vCPU that stopped last: breakpoints are set in its address space.
    pub current: usize,
    /// Software breakpoints by linear address.
    software: BTreeMap<u64, Place>,
    /// What INT3 stands in place of, by physical address.
    patched: BTreeMap<u64, u8>,
    watches: Vec<Watched>,
    actions: BTreeMap<usize, Action>,
    /// vCPUs without an action stay stopped.
    locked: bool,
    /// Stops of other vCPUs at the same time, still to be told.
    pending: VecDeque<(usize, DebugStop)>,
    /// A stop to be told as soon as gdb waits for one.
    pub at_once: Option<MultiThreadStopReason<u64>>,
}

type Fatal = &'static str;

fn tid(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

fn vcpu_of(tid: Tid) -> usize {
    tid.get() - 1
}

impl Debuggee {
    /// Of a machine that is paused.
    pub fn new(machine: Rc<Machine>) -> Debuggee {
        Debuggee {
            machine,
            current: 0,
            software: BTreeMap::new(),
            patched: BTreeMap::new(),
            watches: Vec::new(),
            actions: BTreeMap::new(),
            locked: false,
            pending: VecDeque::new(),
            at_once: None,
        }
    }

    fn on<T: Send + 'static>(
        &self,
        vcpu: usize,
        f: impl Fn(&mut dyn Vcpu) -> Result<T, EngineError> + Send + Sync + 'static,
    ) -> Result<T, TargetError<Fatal>> {
        // Only a vCPU that has failed gives no answer.
        self.machine.vcpus.with_one(vcpu, f).and_then(Result::ok).ok_or(TargetError::NonFatal)
    }

    pub(super) fn state(&self, vcpu: usize) -> Result<CpuState, TargetError<Fatal>> {
        self.on(vcpu, |v| v.state())
    }

    fn set_state(&self, vcpu: usize, state: CpuState) -> Result<(), TargetError<Fatal>> {
        self.on(vcpu, move |v| v.set_state(&state))
    }

    pub(super) fn physical(&self, vcpu: usize, address: u64) -> Result<Option<u64>, TargetError<Fatal>> {
        self.on(vcpu, move |v| match v.debugger() {
            Some(d) => d.translate(address),
            None => Ok(None),
        })
    }

    /// Cut a range of linear addresses into pieces that lie in one page: physical address, offset, length; ends where nothing is mapped.
    fn pieces(
        &self,
        vcpu: usize,
        address: u64,
        len: usize,
    ) -> Result<Vec<(u64, usize, usize)>, TargetError<Fatal>> {
        let mut out = Vec::new();
        let mut done = 0;
        while done < len {
            let at = address.wrapping_add(done as u64);
            let n = (len - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            let Some(gpa) = self.physical(vcpu, at)? else { break };
            out.push((gpa, done, n));
            done += n;
        }
        Ok(out)
    }

    fn watch(&mut self, origin: Origin, watch: Watch) -> Result<bool, TargetError<Fatal>> {
        let most = self.on(0, |v| Ok(v.debugger().map_or(0, |d| d.max_watches())))?;
        if self.watches.len() >= most {
            return Ok(false);
        }
        self.watches.push(Watched { watch, origin });
        Ok(true)
    }

    /// Take away what is watched for `origin`; false if nothing is.
    fn unwatch(&mut self, origin: Origin, address: Option<u64>) -> bool {
        let before = self.watches.len();
        self.watches.retain(|w| w.origin != origin || address.is_some_and(|a| a != w.watch.address));
        self.watches.len() < before
    }

    /// A vCPU has stopped; the machine is paused by now. What to tell gdb, or `None` if it is to go on as it was.
    pub fn stopped(&mut self, vcpu: usize, stop: DebugStop) -> Option<MultiThreadStopReason<u64>> {
        let thread = tid(vcpu);
        let reason = match stop {
            DebugStop::Step => BaseStopReason::SignalWithThread { tid: thread, signal: Signal::SIGTRAP },
            DebugStop::Software => {
                let mut state = self.state(vcpu).ok()?;
                let here = self.physical(vcpu, state.rip).ok().flatten();
                if here.is_none_or(|gpa| !self.patched.contains_key(&gpa)) {
                    if self.byte_at(here) == Some(INT3) {
                        // The guest's own: it gets what the hardware gives it.
                        state.rip += 1;
                        state.events.exception =
                            Some(PendingException { vector: BREAKPOINT, error_code: None });
                        // A vCPU that refuses stays where it is and says so at its next run.
                        let _ = self.set_state(vcpu, state);
                    }
                    return None;
                }
                BaseStopReason::SwBreak(thread)
            }
            DebugStop::Watch(n) => match self.watches.get(n)?.origin {
                Origin::Software => BaseStopReason::SwBreak(thread),
                Origin::Hardware => BaseStopReason::HwBreak(thread),
                Origin::Watchpoint(addr, _, kind) => BaseStopReason::Watch { tid: thread, kind, addr },
            },
        };
        self.current = vcpu;
        Some(reason)
    }

    fn byte_at(&self, gpa: Option<u64>) -> Option<u8> {
        self.machine.pc.memory().read_obj(GuestAddress(gpa?)).ok()
    }

    /// One more stop, while gdb is told of another.
    pub fn also_stopped(&mut self, vcpu: usize, stop: DebugStop) {
        // Steps and INT3 happen again if gdb still wants them; by address they would be passed over.
        if matches!(stop, DebugStop::Watch(_)) {
            self.pending.push_back((vcpu, stop));
        }
    }

    /// Let go: no breakpoints, no wishes.
    pub fn release(&mut self) {
        let addresses: Vec<u64> = self.software.keys().copied().collect();
        for a in addresses {
            // Nobody is left to tell.
            let _ = self.remove_sw_breakpoint(a, 1);
        }
        self.watches.clear();
        self.pending.clear();
        self.actions.clear();
        self.locked = false;
        self.apply();
    }

    /// Give the engine what is wanted, and say which vCPUs are to run.
    fn apply(&mut self) {
        let software = !self.patched.is_empty();
        let watches: Vec<Watch> = self.watches.iter().map(|w| w.watch).collect();
        for vcpu in 0..self.machine.vcpus.len() {
            let action = self.actions.get(&vcpu).copied();
            let request =
                DebugRequest { step: action == Some(Action::Step), software, watches: watches.clone() };
            self.machine.vcpus.freeze(vcpu, self.locked && action.is_none());
            // An engine that cannot debug has refused the breakpoints already.
            let _ = self.on(vcpu, move |v| match v.debugger() {
                Some(d) => d.set_debug(&request),
                None => Ok(()),
            });
        }
    }
}

impl Target for Debuggee {
    type Arch = X86;
    type Error = Fatal;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Fatal> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut Regs, tid: Tid) -> TargetResult<(), Self> {
        *regs = Regs::of(&self.state(vcpu_of(tid))?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &Regs, tid: Tid) -> TargetResult<(), Self> {
        let mut state = self.state(vcpu_of(tid))?;
        regs.apply(&mut state);
        self.set_state(vcpu_of(tid), state)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut read = 0;
        for (gpa, at, n) in self.pieces(vcpu_of(tid), start, data.len())? {
            let part = &mut data[at..at + n];
            if self.machine.pc.memory().read_slice(part, GuestAddress(gpa)).is_err() {
                break;
            }
            for (&p, &original) in self.patched.range(gpa..gpa + n as u64) {
                part[(p - gpa) as usize] = original;
            }
            read = at + n;
        }
        if read == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(read) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let pieces = self.pieces(vcpu_of(tid), start, data.len())?;
        if pieces.iter().map(|p| p.2).sum::<usize>() < data.len() {
            return Err(TargetError::NonFatal);
        }
        for (gpa, at, n) in pieces {
            let mut bytes = data[at..at + n].to_vec();
            for (&p, original) in self.patched.range_mut(gpa..gpa + n as u64) {
                *original = std::mem::replace(&mut bytes[(p - gpa) as usize], INT3);
            }
            let memory = self.machine.pc.memory();
            memory.write_slice(&bytes, GuestAddress(gpa)).map_err(|_| TargetError::NonFatal)?;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Fatal> {
        (0..self.machine.vcpus.len()).for_each(|n| thread_is_active(tid(n)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Fatal> {
        let n = vcpu_of(tid);
        let doing = match self.state(n).map(|s| s.mp_state) {
            Ok(MpState::Runnable) => "running",
            Ok(MpState::Halted) => "halted",
            Ok(MpState::Uninitialized | MpState::WaitForSipi) => "not started",
            Err(_) => "failed",
        };
        let text = format!("vCPU {n}: {doing}");
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(&mut self, tid: Tid, reg: Reg, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let state = self.state(vcpu_of(tid))?;
        let value = reg.read(&state);
        let to = buf.get_mut(..value.len()).filter(|_| reg.is_there(&state)).ok_or(TargetError::NonFatal)?;
        to.copy_from_slice(&value);
        Ok(value.len())
    }

    fn write_register(&mut self, tid: Tid, reg: Reg, value: &[u8]) -> TargetResult<(), Self> {
        let mut state = self.state(vcpu_of(tid))?;
        if !reg.is_there(&state) {
            return Err(TargetError::NonFatal);
        }
        reg.write(&mut state, value);
        self.set_state(vcpu_of(tid), state)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Fatal> {
        while let Some((vcpu, stop)) = self.pending.pop_front() {
            if let Some(reason) = self.stopped(vcpu, stop) {
                self.at_once = Some(reason);
                return Ok(());
            }
        }
        self.apply();
        self.machine.resume();
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Fatal> {
        self.actions.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Fatal> {
        self.actions.insert(vcpu_of(tid), Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Fatal> {
        self.actions.insert(vcpu_of(tid), Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Fatal> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

fn execution(address: u64) -> Watch {
    Watch { kind: WatchKind::Execute, address, len: 1 }
}

impl SwBreakpoint for Debuggee {
    /// INT3 in memory; by its address where nothing is mapped yet, as before the guest's kernel has its page tables.
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        if self.software.contains_key(&address) {
            return Ok(true);
        }
        let place = match self.physical(self.current, address)? {
            Some(gpa) if self.byte_at(Some(gpa)).is_some() => {
                if let Some(byte) = self.byte_at(Some(gpa)).filter(|_| !self.patched.contains_key(&gpa)) {
                    let memory = self.machine.pc.memory();
                    memory.write_obj(INT3, GuestAddress(gpa)).map_err(|_| TargetError::NonFatal)?;
                    self.patched.insert(gpa, byte);
                }
                Place::Memory(gpa)
            }
            _ if self.watch(Origin::Software, execution(address))? => Place::Address,
            _ => return Ok(false),
        };
        self.software.insert(address, place);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        match self.software.remove(&address) {
            None => return Ok(false),
            Some(Place::Address) => _ = self.unwatch(Origin::Software, Some(address)),
            Some(Place::Memory(gpa)) => {
                let shared = self.software.values().any(|p| *p == Place::Memory(gpa));
                if !shared && let Some(byte) = self.patched.remove(&gpa) {
                    // What the guest has written there meanwhile stays.
                    if self.byte_at(Some(gpa)) == Some(INT3) {
                        let memory = self.machine.pc.memory();
                        memory.write_obj(byte, GuestAddress(gpa)).map_err(|_| TargetError::NonFatal)?;
                    }
                }
            }
        }
        Ok(true)
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.watch(Origin::Hardware, execution(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.unwatch(Origin::Hardware, Some(address)))
    }
}

/// Cut a range into aligned pieces of 8, 4, 2 and 1 bytes, as debug registers watch them.
fn aligned(mut address: u64, mut len: u64) -> Vec<(u64, u8)> {
    let mut out = Vec::new();
    while len > 0 && out.len() <= 8 {
        let size =
            [8u8, 4, 2, 1].into_iter().find(|&n| u64::from(n) <= len && address.is_multiple_of(n.into()));
        let size = size.unwrap_or(1);
        out.push((address, size));
        address = address.wrapping_add(size.into());
        len -= u64::from(size);
    }
    out
}

impl HwWatchpoint for Debuggee {
    /// x86 has no watchpoints for reads alone: they stop at writes as well.
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: GdbWatch) -> TargetResult<bool, Self> {
        let origin = Origin::Watchpoint(address, len, kind);
        let of = if kind == GdbWatch::Write { WatchKind::Write } else { WatchKind::Access };
        for (address, len) in aligned(address, len) {
            if !self.watch(origin, Watch { kind: of, address, len })? {
                self.unwatch(origin, None);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: GdbWatch) -> TargetResult<bool, Self> {
        Ok(self.unwatch(Origin::Watchpoint(address, len, kind), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_what_debug_registers_can_watch() {
        assert_eq!(aligned(0x1000, 8), [(0x1000, 8)]);
        assert_eq!(aligned(0x1004, 8), [(0x1004, 4), (0x1008, 4)]);
        assert_eq!(aligned(0x1001, 3), [(0x1001, 1), (0x1002, 2)]);
        assert!(aligned(0, u64::MAX).len() < 20);
    }
}
