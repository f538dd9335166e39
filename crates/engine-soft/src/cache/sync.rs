//! Telling other vCPUs that a page now holds code.
//!
//! A vCPU that decodes from a page which held no code so far must make sure that every other vCPU's stores to the page are noticed. Those
//! may have a fast store path to it. So it posts the page to each of them; at its next instruction boundary (or before it executes again
//! after a sleep) such a vCPU drops the path and then moves the page's code generation on, since stores before that went unseen: the
//! block is decoded once more. A vCPU that sleeps is not disturbed: when it wakes and the epoch has moved, it drops all fast store paths. A
//! serialising instruction on the decoding vCPU waits until no post is outstanding, so code that another vCPU wrote
//! before it is seen after it (Intel SDM 3A section 9.1.3).

use crate::cpu::Cpu;
use crate::vcpu::{Env, request};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Posts of one VM.
#[derive(Debug, Default)]
pub struct CodeSync {
    /// Posts not acted on, and vCPUs that may be about to make some.
    outstanding: AtomicU64,
    /// Moves with every announcement.
    epoch: AtomicU64,
}

impl CodeSync {
    /// A page is about to be declared one with code. Until [`CodeSync::end`] nobody takes it for granted that all posts are made.
    pub fn begin(&self) {
        self.outstanding.fetch_add(1, Ordering::SeqCst);
    }

    /// The page's posts, if it takes any, are made.
    pub fn end(&self) {
        self.outstanding.fetch_sub(1, Ordering::SeqCst);
    }

    /// Post `gpa` (a page address) to all vCPUs but the caller's.
    pub fn announce(&self, env: &Env, gpa: u64) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for other in env.vm.vcpus().iter() {
            // Whoever is seen asleep here will see the new epoch when it wakes.
            if !Arc::ptr_eq(other, &env.me) && !other.asleep.load(Ordering::SeqCst) {
                self.outstanding.fetch_add(1, Ordering::SeqCst);
                other.post_code_page(gpa);
                other.request(request::CODE_PAGES);
            }
        }
    }

    /// Moves with every announcement.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether every post has been made and acted on.
    pub fn settled(&self) -> bool {
        self.outstanding.load(Ordering::SeqCst) == 0
    }
}

impl Cpu {
    /// Act on the posts of other vCPUs ([`request::CODE_PAGES`]).
    pub fn take_code_posts(&mut self) {
        let pages = self.env.me.take_code_pages();
        for &gpa in &pages {
            self.mmu.drop_writes_to(gpa);
            if let Some((slot, offset)) = self.mmu.ram.find(gpa) {
                slot.tracker.outdate_code(offset >> ringfort_memory::PAGE_SHIFT);
            }
        }
        self.env.vm.code_sync.outstanding.fetch_sub(pages.len() as u64, Ordering::SeqCst);
    }

    /// A serialising instruction (CPUID, IRET, writes to control registers...): code that other vCPUs wrote before now is seen from now on.
    pub fn serialize(&mut self) {
        let mut spins = 0u32;
        while !self.env.vm.code_sync.settled() {
            // The others may be waiting for this one just so.
            self.take_code_posts();
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(256) {
                // The one that is waited for may have no host CPU.
                std::thread::yield_now();
            }
        }
    }

    /// Before sleeping: from here on other vCPUs do not wait for this one. Gives what [`Cpu::leave_sleep`] wants.
    pub fn enter_sleep(&mut self) -> u64 {
        let epoch = self.env.vm.code_sync.epoch();
        self.env.me.asleep.store(true, Ordering::SeqCst);
        self.take_code_posts();
        epoch
    }

    /// After sleeping, before any guest instruction runs.
    pub fn leave_sleep(&mut self, epoch: u64) {
        self.env.me.asleep.store(false, Ordering::SeqCst);
        if self.env.vm.code_sync.epoch() != epoch {
            self.mmu.drop_all_writes();
        }
    }
}
