//! Boots in a row, none of which may hang.
//!
//! `RINGFORT_TEST_BOOTS` is their number with each number of vCPUs; `RINGFORT_TEST_LONG=1` makes it 50 and adds as many of the whole
//! Debian disk to its login.

mod support;

use ringfort_guest::TEST_READY;
use support::*;

#[test]
fn boots_in_a_row() {
    let _turn = one_at_a_time();
    let long = std::env::var_os("RINGFORT_TEST_LONG").is_some_and(|v| v != "0");
    let given = std::env::var("RINGFORT_TEST_BOOTS").ok().and_then(|n| n.parse().ok());
    let times: u32 = given.unwrap_or(if long { 50 } else { 1 });
    let guest = test_guest();
    let cmdline = format!("{} ringfort.init=poweroff", guest.cmdline);
    for cpus in ["1", "2", "4"] {
        for n in 1..=times {
            let mut args = vec!["run", "--accel", "soft", "--memory", "512M", "--cpus", cpus];
            args.extend([
                "--cmdline",
                &cmdline,
                "--kernel",
                text(&guest.kernel),
                "--initrd",
                text(&guest.initrd),
            ]);
            let mut g = Guest::start(ringfort(&args));
            g.expect(TEST_READY);
            assert_eq!(g.wait().code(), Some(0), "boot {n} with {cpus} vCPUs");
        }
    }
    if long {
        debian_in_a_row(times);
    }
}

/// The whole Debian disk to its login prompt.
fn debian_in_a_row(times: u32) {
    let guest = debian_guest();
    let disk = format!("path={},snapshot=on", text(&guest.disk));
    for cpus in ["1", "2", "4"] {
        for _ in 0..times {
            let mut args = vec!["run", "--accel", "soft", "--memory", "1G", "--cpus", cpus, "--disk", &disk];
            args.extend(["--kernel", text(&guest.kernel), "--initrd", text(&guest.initrd)]);
            args.extend(["--cmdline", &guest.cmdline]);
            let mut g = Guest::start(ringfort(&args));
            g.expect("login: ");
        }
    }
}
