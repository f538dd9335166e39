//! memtest86+ of Debian's package: patterns through all memory by 64-bit code that knows no operating system, on a Linux boot loader's state.
//!
//! It never ends by itself. Without `RINGFORT_TEST_LONG=1` it is ended where the pass has only the bit fade test left, which waits for minutes.

mod support;

use support::*;

#[test]
fn memtest86_plus_finds_nothing() {
    let _turn = one_at_a_time();
    let tree = match full_kernel::package("memtest86+") {
        Ok(tree) => tree,
        Err(why) => return eprintln!("skipped: no memtest86+: {why}"),
    };
    let long = std::env::var_os("RINGFORT_TEST_LONG").is_some_and(|v| v != "0");
    let end = if long { "Pass:  1 " } else { "[Bit fade test" };
    let program = tree.join("boot/memtest86+x64.bin");
    let mut args = vec!["run", "--accel", "soft", "--memory", "16M", "--cpus", "1"];
    args.extend(["--kernel", text(&program), "--cmdline", "console=ttyS0,115200 nosmp"]);
    let mut g = Guest::start(ringfort(&args));
    // It tells its state about once a second.
    loop {
        let said = g.expect("Errors: ");
        let errors = g.expect(" ");
        assert_eq!(errors.trim(), "0", "{}", g.tail());
        if said.contains(end) {
            break;
        }
    }
}
