use super::*;
use crate::testing::{Events, Ports, Wire, hammer_ports};
use ringfort_bus::{FakeClock, ManualTimer};

struct Rig {
    pm: AcpiPm,
    clock: Arc<FakeClock>,
    timer: Arc<ManualTimer>,
    sci: Arc<Wire>,
    power: Arc<Events>,
}

fn rig(acpi_on: bool, timer_32bit: bool) -> Rig {
    let (clock, timer, sci, power) =
        (FakeClock::new(), ManualTimer::new(), Wire::new(), Arc::new(Events::default()));
    let config = Config { acpi_on, timer_32bit };
    let pm = AcpiPm::new(config, clock.clone(), timer.clone(), sci.clone(), power.clone());
    Rig { pm, clock, timer, sci, power }
}

#[test]
fn power_button() {
    let mut r = rig(true, true);
    r.pm.power_button();
    assert!(!r.sci.high() && !r.pm.power_button_enabled());
    assert_eq!(r.pm.inw(0x600), 0x100);
    r.pm.outw(0x602, 0x100);
    assert!(r.sci.high() && r.pm.power_button_enabled());
    r.pm.outw(0x600, 0x100);
    assert!(!r.sci.high());
    assert_eq!(r.pm.inl(0x600), 0x100_0000);
    r.pm.outl(0x600, 0x220_0000);
    r.pm.sleep_button();
    assert!(r.sci.high());
    r.pm.reset();
    assert!(!r.sci.high());
}

#[test]
fn no_press_is_lost_while_another_event_is_served() {
    let mut r = rig(true, true);
    r.pm.outw(0x602, 0x300);
    r.pm.sleep_button();
    // The guest has read the status when the button is pressed: it clears what it saw, and the line stays.
    assert_eq!(r.pm.inw(0x600), 0x200);
    r.pm.power_button();
    r.pm.outw(0x600, 0x200);
    assert_eq!((r.pm.inw(0x600), r.sci.high()), (0x100, true));
    // Disabled for the time of its handler, as Linux does, and enabled again: pressed meanwhile, it shows.
    r.pm.outw(0x602, 0x200);
    r.pm.outw(0x600, 0x100);
    assert!(!r.sci.high());
    r.pm.power_button();
    assert!(!r.sci.high());
    r.pm.outw(0x602, 0x300);
    assert!(r.sci.high());
    // Writing the enable half alone leaves the status.
    r.pm.outb(0x603, 0x01);
    assert_eq!((r.pm.inw(0x600), r.sci.high()), (0x100, true));
    // A press after the status was cleared is a new event, with a new edge of the line.
    r.pm.outw(0x600, 0x100);
    assert!(!r.sci.high());
    r.sci.take_edges();
    r.pm.power_button();
    assert_eq!((r.sci.take_edges(), r.sci.high()), (1, true));
}

#[test]
fn acpi_is_switched_by_the_smi_port() {
    let mut r = rig(false, true);
    assert_eq!(r.pm.inw(0x604), 0);
    r.pm.outw(0x602, 0x100);
    r.pm.power_button();
    assert!(!r.sci.high());
    r.pm.outb(0xb3, 2);
    assert_eq!(r.pm.inw(0x604), 0);
    r.pm.outb(0xb2, ACPI_ENABLE);
    assert_eq!((r.pm.inw(0x604), r.sci.high()), (1, true));
    r.pm.outb(0xb2, ACPI_DISABLE);
    assert_eq!((r.pm.inw(0x604), r.sci.high(), r.pm.inb(0xb2)), (0, false, 3));
}

#[test]
fn sleep_states() {
    let mut r = rig(true, true);
    r.pm.outw(0x604, 7 << 10 | 1);
    assert!(r.power.take().is_empty(), "type without enable");
    r.pm.outw(0x604, 7 << 10 | SLEEP_ENABLE | 1);
    assert_eq!(r.power.take(), [PowerEvent::PowerOff]);
    assert_eq!(r.pm.inw(0x604), 7 << 10 | 1, "SLP_EN reads as 0");
    r.pm.outb(0x605, 0x34);
    assert_eq!(r.power.take(), [PowerEvent::Suspend], "byte access");
    assert_eq!(r.pm.inw(0x600), 0x8000, "awake at once");
    r.pm.outw(0x600, 0x8000);
    r.pm.outw(0x604, 1 << 10 | SLEEP_ENABLE);
    assert_eq!((r.pm.inw(0x600), r.power.take().len()), (0x8000, 0));
}

#[test]
fn timer_counts_and_reports_its_top_bit() {
    for (wide, top) in [(false, 23), (true, 31)] {
        let mut r = rig(true, wide);
        r.clock.advance(1_000_000_000);
        assert_eq!(r.pm.inl(0x608), TIMER_FREQUENCY as u32);
        r.pm.outw(0x602, 1);
        let due = ((1u128 << top) * 1_000_000_000).div_ceil(u128::from(TIMER_FREQUENCY)) as u64;
        assert_eq!(r.timer.deadline(), Some(due));
        r.clock.advance(due - 1_000_000_000);
        r.pm.timer_expired(0);
        assert!(r.sci.high());
        assert_eq!(r.pm.inl(0x608), 1 << top);
        r.pm.outw(0x600, 1);
        assert!(!r.sci.high());
        r.clock.advance(due + 1000);
        assert_eq!(r.pm.inw(0x600) & 1, 1);
        assert!(r.pm.inl(0x608) < 10_000, "wrapped");
    }
}

#[test]
fn general_purpose_events_and_moving() {
    let mut r = rig(true, true);
    r.pm.gpe(9);
    r.pm.gpe(99);
    assert_eq!(r.pm.inl(0x620), 0x200);
    r.pm.outb(0x629, 2);
    assert!(r.sci.high());
    r.pm.outb(0x621, 2);
    assert!(!r.sci.high());
    r.pm.set_base(0xb000);
    assert_eq!((r.pm.inb(0xb029), r.pm.inb(0x629)), (2, 0xff));
}

#[test]
fn reset_register() {
    let power = Arc::new(Events::default());
    let mut r = ResetControl::new(power.clone());
    r.outb(0xcf9, 2);
    assert!(power.take().is_empty());
    r.outb(0xcf9, 6);
    r.outb(0xcf9, 0x0e);
    assert_eq!(power.take(), [PowerEvent::Reset; 2]);
    assert_eq!(r.inb(0xcf9), 0x0a);
    crate::testing::refuses_bad_state(&mut r);
}

#[test]
fn hammer() {
    let clock = FakeClock::new();
    let c = clock.clone();
    let ports: Vec<u16> = (0x600..0x680).chain([0xb2, 0xb3]).collect();
    let make = move || {
        let config = Config { acpi_on: true, timer_32bit: false };
        AcpiPm::new(config, c.clone(), ManualTimer::new(), Wire::new(), Arc::new(Events::default()))
    };
    hammer_ports(0xac91, make, &ports, |d, r| {
        clock.advance(r.u64(..5_000_000_000));
        d.timer_expired(0);
        d.gpe(r.u8(..));
        if r.u8(..9) == 0 {
            d.power_button();
        }
    });
}
