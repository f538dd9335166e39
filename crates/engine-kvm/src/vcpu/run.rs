//! Running the guest, and what it leaves for.

use super::KvmVcpu;
use crate::error::{host, io_error};
use crate::msr::{unknown_read, unknown_write};
use crate::vm::locked;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE,
    kvm_mp_state, kvm_run,
};
use ringfort_engine::{EngineError, VcpuExit};
use std::sync::atomic::Ordering;

impl KvmVcpu {
    pub(super) fn run_loop(&mut self) -> Result<VcpuExit, EngineError> {
        self.begin_time()?;
        loop {
            self.offer_extint()?;
            let entered = self.fd.run().map(drop);
            self.take_coalesced()?;
            match entered {
                Ok(()) => {
                    if let Some(exit) = self.handle_exit()? {
                        return Ok(exit);
                    }
                }
                // EAGAIN: an application processor that waits has been started.
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    if self.target.interrupted() {
                        self.vm.counters.kicks.fetch_add(1, Ordering::Relaxed);
                        return Ok(VcpuExit::Kicked);
                    }
                }
                Err(e) => return Err(self.failed("running the guest", io_error(e))),
            }
        }
    }

    /// An error with the place that the vCPU is at.
    fn failed(&mut self, what: &str, source: std::io::Error) -> EngineError {
        EngineError::Host { what: format!("KVM: {what}, vCPU {} at {}", self.apic_id, self.place()), source }
    }

    fn stuck(&mut self, what: &str) -> EngineError {
        EngineError::Internal(format!("KVM: vCPU {} at {}: {what}", self.apic_id, self.place()))
    }

    /// CS:RIP, for messages.
    fn place(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!("{:#x}:{:#x}", s.cs.selector, r.rip),
            _ => "an unknown place".into(),
        }
    }

    /// The 8259 asks: give its vector to the CPU when that can take it, else be told when it can.
    fn offer_extint(&mut self) -> Result<(), EngineError> {
        let asked = self.vm.extint.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        if !asked {
            run.request_interrupt_window = 0;
            return Ok(());
        }
        if run.ready_for_interrupt_injection == 0 {
            run.request_interrupt_window = 1;
            return Ok(());
        }
        let mut events = self.fd.get_vcpu_events().map_err(host("reading pending events"))?;
        let busy = events.exception.injected != 0
            || events.exception.pending != 0
            || events.interrupt.injected != 0
            || events.nmi.injected != 0
            || events.interrupt.shadow != 0;
        let run = self.fd.get_kvm_run();
        if busy {
            run.request_interrupt_window = 1;
            return Ok(());
        }
        run.ready_for_interrupt_injection = 0;
        // Set as an event in flight, not by KVM_INTERRUPT, so that it is part of the state until it is delivered.
        let vector = self.vm.bus.extint_vector();
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = 0;
        events.flags = 0;
        self.fd.set_vcpu_events(&events).map_err(host("injecting an interrupt"))?;
        if self.fd.get_mp_state().is_ok_and(|m| m.mp_state == KVM_MP_STATE_HALTED) {
            let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(running).map_err(host("waking a halted vCPU"))?;
        }
        let more = self.vm.extint.load(Ordering::SeqCst);
        self.fd.get_kvm_run().request_interrupt_window = u8::from(more);
        Ok(())
    }

    /// Stores that waited in the queue, oldest first.
    fn take_coalesced(&mut self) -> Result<(), EngineError> {
        let vm = self.vm.clone();
        if !vm.coalescing.load(Ordering::Relaxed) {
            return Ok(());
        }
        // The queue is the VM's, and any vCPU may find it first.
        let _turn = locked(&vm.queue);
        self.fd.map_coalesced_mmio_ring().map_err(host("mapping the queue of stores"))?;
        while let Some(e) = self.fd.coalesced_mmio_read().map_err(host("reading the queue of stores"))? {
            let data = &e.data[..(e.len as usize).min(8)];
            // SAFETY: both views of the field are plain 32-bit numbers.
            let port = unsafe { e.__bindgen_anon_1.pio } != 0;
            vm.counters.coalesced.fetch_add(1, Ordering::Relaxed);
            if port {
                vm.bus.pio_write(e.phys_addr as u16, data);
            } else {
                vm.bus.mmio_write(e.phys_addr, data);
            }
        }
        Ok(())
    }

    /// Act on the exit that the shared page tells of. `Some` ends the run.
    fn handle_exit(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        let vm = self.vm.clone();
        let (bus, counters) = (&vm.bus, &vm.counters);
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            KVM_EXIT_IO => {
                counters.port.fetch_add(1, Ordering::Relaxed);
                let page: *mut kvm_run = run;
                // SAFETY: the exit reason says that this member of the union is the one in use.
                let io = unsafe { run.__bindgen_anon_1.io };
                let bytes = usize::from(io.size) * io.count as usize;
                // SAFETY: the kernel gives an offset into the shared pages, where it has put or wants `count` items of `size` bytes.
                let data = unsafe {
                    std::slice::from_raw_parts_mut(page.cast::<u8>().add(io.data_offset as usize), bytes)
                };
                // String instructions come with several items.
                for item in data.chunks_mut(usize::from(io.size).max(1)) {
                    if u32::from(io.direction) == KVM_EXIT_IO_IN {
                        bus.pio_read(io.port, item);
                    } else {
                        bus.pio_write(io.port, item);
                    }
                }
            }
            KVM_EXIT_MMIO => {
                counters.mmio.fetch_add(1, Ordering::Relaxed);
                // SAFETY: as above.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                let data = &mut mmio.data[..(mmio.len as usize).min(8)];
                if mmio.is_write != 0 {
                    bus.mmio_write(mmio.phys_addr, data);
                } else {
                    bus.mmio_read(mmio.phys_addr, data);
                }
            }
            KVM_EXIT_IOAPIC_EOI => {
                counters.eoi.fetch_add(1, Ordering::Relaxed);
                // SAFETY: as above.
                let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
                bus.ioapic_eoi(vector);
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                counters.msr.fetch_add(1, Ordering::Relaxed);
                let read = run.exit_reason == KVM_EXIT_X86_RDMSR;
                // SAFETY: as above.
                let msr = unsafe { &mut run.__bindgen_anon_1.msr };
                let taken = if read {
                    let value = unknown_read(msr.index, self.intel);
                    msr.data = value.unwrap_or(0);
                    value.is_some()
                } else {
                    unknown_write(msr.index, self.intel)
                };
                // Not zero: #GP(0).
                msr.error = u8::from(!taken);
            }
            KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_INTR => {}
            KVM_EXIT_DIRTY_RING_FULL => vm.dirty.sync_rings(&vm)?,
            KVM_EXIT_SHUTDOWN => return Ok(Some(VcpuExit::Shutdown)),
            KVM_EXIT_DEBUG => {
                // SAFETY: as above.
                let arch = unsafe { run.__bindgen_anon_1.debug.arch };
                return Ok(self.debug_stop(&arch).map(VcpuExit::Debug));
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let reason = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                return Err(self.stuck(&format!("the CPU refuses the guest's state, reason {reason:#x}")));
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let error = unsafe { run.__bindgen_anon_1.internal };
                let why = match error.suberror {
                    KVM_INTERNAL_ERROR_EMULATION => {
                        "this KVM cannot emulate the guest's instruction; give --accel soft"
                    }
                    KVM_INTERNAL_ERROR_SIMUL_EX => "two events at once",
                    KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
                    _ => "an internal error",
                };
                return Err(self.stuck(&format!("{why} (suberror {})", error.suberror)));
            }
            other => return Err(self.stuck(&format!("an exit that is not known here, reason {other}"))),
        }
        Ok(None)
    }
}
