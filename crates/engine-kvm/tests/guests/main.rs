//! Short guests on a KVM: on the host's own, and (`in_the_lab`) on that of the lab, where this very program runs again. Where there is no
//! /dev/kvm the tests say so and do nothing.
//!
//! What a KVM that interprets guests cannot do is asked for in the lab only.

mod cpu;
mod events;
mod interrupts;
mod memory;
mod moves;
mod programs;
mod support;

use ringfort_guest::{LAB, LabRun};
use std::process::{Command, Stdio};

#[test]
fn in_the_lab() {
    if support::in_lab() {
        return;
    }
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let lab = ringfort_guest::ensure_lab(&cache, &mut ()).expect("the lab");
    let scratch = std::env::temp_dir().join(format!("ringfort-kvm-guests-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a scratch folder");
    let me = std::env::current_exe().expect("this program");
    let run = LabRun {
        script: &format!("{}=1 ./tests --test-threads=1 --skip in_the_lab", support::IN_LAB),
        files: &[("tests", &me)],
        cpus: 1,
        memory: 768,
    };
    let mut command: Command = lab.command(&run, &scratch).expect("the lab's command");
    let out = command.stdin(Stdio::null()).stderr(Stdio::null()).output().expect("the lab");
    std::fs::remove_dir_all(&scratch).expect("the scratch folder");
    let said = String::from_utf8_lossy(&out.stdout);
    println!("{said}");
    assert!(said.contains(&format!("{LAB}ready")), "the lab has no KVM");
    assert!(said.contains("test result: ok") && !said.contains("skipped: there is no"), "see above");
    assert!(said.contains(&format!("{LAB}exit 0")), "see above");
}
