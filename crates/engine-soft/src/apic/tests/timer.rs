//! The timer and the TSC.

use super::*;

/// Wait (for at most 5 s) until the timer has posted `v`; how long it took.
fn wait_for(c: &mut Cpu, v: u8) -> Duration {
    let start = Instant::now();
    while !c.irr(v) {
        assert!(start.elapsed() < Duration::from_secs(5), "the timer does not go off");
        if let Some(left) = c.timer_wait() {
            std::thread::sleep(left);
        }
        c.check_timer();
    }
    start.elapsed()
}

#[test]
fn one_shot_timer() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.write(reg::LVT_TIMER, 0x40);
    // Divide by 16: 1_000_000 counts are 16 ms.
    c.write(reg::DIVIDE, 3);
    c.write(reg::INITIAL_COUNT, 1_000_000);
    let first = c.read(reg::CURRENT_COUNT);
    assert!((900_000..=1_000_000).contains(&first), "{first}");
    assert!(wait_for(c, 0x40) >= Duration::from_millis(15));
    assert_eq!((c.read(reg::CURRENT_COUNT), c.read(reg::INITIAL_COUNT)), (0, 1_000_000));
    assert_eq!(c.timer_wait(), None);
    // Masked: it runs down without an interrupt, and nobody is woken for it.
    c.takes();
    c.write(reg::LVT_TIMER, LVT_MASKED | 0x40);
    c.write(reg::INITIAL_COUNT, 1);
    assert_eq!(c.timer_wait(), None);
    std::thread::sleep(Duration::from_millis(1));
    c.check_timer();
    assert!(!c.irr(0x40) && c.read(reg::CURRENT_COUNT) == 0);
    // Zero stops it.
    c.write(reg::LVT_TIMER, 0x40);
    c.write(reg::INITIAL_COUNT, u32::MAX);
    c.write(reg::INITIAL_COUNT, 0);
    assert_eq!((c.timer_wait(), c.read(reg::CURRENT_COUNT)), (None, 0));
}

#[test]
fn divide_configuration() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.write(reg::LVT_TIMER, LVT_MASKED);
    for (dcr, div) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        c.write(reg::DIVIDE, dcr);
        c.write(reg::LVT_TIMER, 0x40);
        c.write(reg::INITIAL_COUNT, 1 << 30);
        let ns = c.timer_wait().unwrap().as_nanos() as f64;
        let want = f64::from(1 << 30) * f64::from(div);
        assert!((ns / want - 1.0).abs() < 0.02, "{dcr}: {ns} {want}");
    }
    // A change on the way: the count stays, the pace changes.
    c.write(reg::DIVIDE, 0);
    let left = c.read(reg::CURRENT_COUNT);
    assert!(left > 1 << 29, "{left}");
    let ns = c.timer_wait().unwrap().as_nanos() as f64;
    assert!((ns / (f64::from(left) * 2.0) - 1.0).abs() < 0.02);
}

#[test]
fn periodic_timer_keeps_its_beat() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.write(reg::DIVIDE, 11);
    c.write(reg::LVT_TIMER, 1 << 17 | 0x40);
    let start = Instant::now();
    c.write(reg::INITIAL_COUNT, 2_000_000);
    for _ in 0..10 {
        wait_for(c, 0x40);
        assert_eq!(c.takes(), Some(0x40));
        c.write(reg::EOI, 0);
        assert!(c.read(reg::CURRENT_COUNT) <= 2_000_000);
    }
    assert!(start.elapsed() >= Duration::from_millis(20));
    // Missed periods are one interrupt, and the next one is in the future.
    std::thread::sleep(Duration::from_millis(15));
    c.check_timer();
    assert_eq!(c.takes(), Some(0x40));
    c.write(reg::EOI, 0);
    assert!(c.timer_wait().unwrap() <= Duration::from_millis(2));
    // The shortest period does not hang.
    c.write(reg::INITIAL_COUNT, 1);
    c.check_timer();
    c.read(reg::CURRENT_COUNT);
}

#[test]
fn tsc_deadline() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    // Ignored in another mode.
    c.wr(msr::IA32_TSC_DEADLINE, 5).unwrap();
    assert_eq!(c.rd(msr::IA32_TSC_DEADLINE), Ok(0));
    c.write(reg::LVT_TIMER, 2 << 17 | 0x40);
    c.write(reg::INITIAL_COUNT, 1000);
    assert_eq!((c.read(reg::INITIAL_COUNT), c.read(reg::CURRENT_COUNT)), (0, 0));
    let at = c.tsc() + c.local.clock.hz() / 100;
    c.wr(msr::IA32_TSC_DEADLINE, at).unwrap();
    assert_eq!(c.rd(msr::IA32_TSC_DEADLINE), Ok(at));
    wait_for(c, 0x40);
    assert!(c.tsc() >= at && c.tsc() - at < c.local.clock.hz() / 10);
    assert_eq!(c.rd(msr::IA32_TSC_DEADLINE), Ok(0));
    c.takes();
    c.write(reg::EOI, 0);
    // In the past: at once. Far away: never overflows. Zero: disarmed.
    c.wr(msr::IA32_TSC_DEADLINE, 1).unwrap();
    assert_eq!(c.takes(), Some(0x40));
    c.write(reg::EOI, 0);
    c.wr(msr::IA32_TSC_DEADLINE, u64::MAX).unwrap();
    assert!(c.timer_wait().unwrap() > Duration::from_secs(86400));
    c.check_timer();
    assert!(!c.irr(0x40));
    // Moving the TSC past the deadline lets it expire.
    let (deadline, now) = (c.tsc() + (1 << 40), c.tsc());
    c.wr(msr::IA32_TSC_DEADLINE, deadline).unwrap();
    c.wr(msr::IA32_TSC, now + (1 << 41)).unwrap();
    c.check_timer();
    assert_eq!(c.takes(), Some(0x40));
    // Leaving the mode disarms.
    c.wr(msr::IA32_TSC_DEADLINE, u64::MAX).unwrap();
    c.write(reg::LVT_TIMER, 0x40);
    assert_eq!((c.timer_wait(), c.rd(msr::IA32_TSC_DEADLINE)), (None, Ok(0)));
}

#[test]
fn tsc_and_adjustment_move_together() {
    let mut vm = vm(&[0, 1]);
    let (t0, t1) = (vm.cpus[0].tsc(), vm.cpus[1].tsc());
    assert!(t1 >= t0 && t1 - t0 < vm.cpus[0].local.clock.hz());
    let c = &mut vm.cpus[0];
    c.wr(msr::IA32_TSC_ADJUST, 1000 << 32).unwrap();
    assert!(c.tsc() >= 1000 << 32);
    let before = c.rd(msr::IA32_TSC_ADJUST).unwrap();
    c.wr(msr::IA32_TSC, 0).unwrap();
    let after = c.rd(msr::IA32_TSC_ADJUST).unwrap();
    assert!((after as i64) < before as i64 && c.tsc() < c.local.clock.hz());
    c.wr(msr::IA32_TSC_ADJUST, 0).unwrap();
    assert!(c.tsc() >= t0 && c.tsc() < t0 + 10 * c.local.clock.hz());
    // A saved value goes on, for all vCPUs alike; the second one's copy was read a moment later and changes nothing.
    let day = 86400 * c.local.clock.hz();
    c.restore_tsc(day, 0);
    vm.cpus[1].restore_tsc(day + 12345, 0);
    assert_eq!(vm.cpus[0].tsc_offset, vm.cpus[1].tsc_offset);
    assert!(vm.cpus[1].tsc() >= day);
}

#[test]
fn a_count_that_runs_down_unseen_is_in_the_saved_state() {
    let mut vm = vm(&[0]);
    let c = &mut vm.cpus[0];
    c.write(reg::DIVIDE, 11);
    c.write(reg::LVT_TIMER, 0x40);
    c.write(reg::INITIAL_COUNT, 1000);
    std::thread::sleep(Duration::from_millis(1));
    // Nobody has looked at the timer since.
    let page = c.to_state().apic;
    let word = |n: usize| u32::from_le_bytes(page[n * 16..n * 16 + 4].try_into().unwrap());
    assert_eq!((word(reg::IRR + 2), word(reg::CURRENT_COUNT)), (1, 0));
    c.takes();
    c.write(reg::EOI, 0);
    // While time stands still, nothing runs down, and what is left is left afterwards as well.
    c.write(reg::INITIAL_COUNT, u32::MAX);
    c.env.vm.time.set_running(false);
    let left = |c: &mut Cpu| {
        let page = c.to_state().apic;
        u32::from_le_bytes(page[reg::CURRENT_COUNT * 16..][..4].try_into().unwrap())
    };
    let stood = left(c);
    std::thread::sleep(Duration::from_millis(40));
    assert!(stood > 0 && left(c) == stood, "{stood}");
    let ran = Instant::now();
    c.env.vm.time.set_running(true);
    c.begin_time();
    c.env.vm.time.set_running(false);
    let ran = ran.elapsed().as_nanos() as u32;
    let (now, least) = (left(c), stood - ran - 1000);
    assert!((least..=stood).contains(&now), "{least} to {stood}: {now}");
}
