//! A machine in the foreground: the main loop.

use crate::chardev::{Chardev, Command};
use crate::config::{Serial, VmConfig};
use crate::control;
use crate::control::command::Wanted;
use crate::control::events::{Cause, Events};
use crate::disk::{DiskTrouble, OnTrouble};
use crate::error::VmmError;
use crate::gdb::{After, GdbEvent, GdbOption, Server, Session};
use crate::halt::{Act, Halt};
use crate::lines::Lines;
use crate::machine::Machine;
use crate::saved::{SaveTarget, Saved};
use crate::vcpus::VcpuEvent;
use ringfort_base::signals::SignalFd;
use ringfort_base::{EventLoop, Handle, Interest, RawTerminal};
use ringfort_devices::power::{PowerEvent, PowerSink};
use ringfort_engine::DebugStop;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The user or a signal ended it.
    Quit,
    /// The guest reset and was not to be booted again.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// The state was saved to this file.
    Saved(PathBuf),
    /// The guest wrote to the debug-exit device; the exit status.
    DebugExit(u8),
}

/// What the main loop hears of.
enum Event {
    Power(PowerEvent),
    Command(Command),
    /// By the control socket.
    Ordered(Command),
    Disk(DiskTrouble),
    Vcpu(usize, VcpuEvent),
    Gdb(GdbEvent),
    Control(control::Request),
    Signal,
    SaveSignal,
}

impl Event {
    /// Whether it comes from the user and not from the guest.
    fn is_from_user(&self) -> bool {
        matches!(
            self,
            Event::Command(_)
                | Event::Ordered(_)
                | Event::Signal
                | Event::SaveSignal
                | Event::Gdb(_)
                | Event::Control(_)
        )
    }
}

/// Post events to the main loop, from any thread.
#[derive(Clone)]
struct Post {
    events: Sender<Event>,
    wake: Handle,
}

impl Post {
    fn send(&self, event: Event) {
        // The loop is gone only when the machine is.
        let _ = self.events.send(event);
        self.wake.wake();
    }
}

/// A [`Post`] for places that want `Sync`.
struct Shared(Mutex<Post>);

impl PowerSink for Shared {
    fn event(&self, event: PowerEvent) {
        ringfort_bus::lock(&self.0).send(Event::Power(event));
    }
}

/// How a run tells its user things.
pub trait Ui {
    /// A one-line remark.
    fn say(&mut self, line: &str);
    /// Something takes time: what, bytes done, bytes in all.
    fn progress(&mut self, what: &'static str, done: u64, total: u64) {
        let _ = (what, done, total);
    }
    /// What took time is over.
    fn progress_ends(&mut self) {}
}

/// What a run is to do beside what the configuration says.
#[derive(Default)]
pub struct Options {
    /// Where Ctrl-A s and SIGUSR1 save the state; by default the machine's name in the current folder.
    pub save: Option<SaveTarget>,
    /// Go on with a saved machine instead of starting one. The configuration is [`Saved::config`].
    pub restore: Option<Saved>,
    /// Write the counters of the engine and the network cards here at the end, as JSON; `-` is standard error.
    pub stats: Option<PathBuf>,
    /// Let the software engine tell Linux perf where its translations lie.
    pub jit_perf_map: bool,
    /// Listen for gdb.
    pub gdb: Option<GdbOption>,
    /// The control socket's name.
    pub control: Option<PathBuf>,
}

/// Build the machine, run it to its end.
///
/// # Errors
/// [`VmmError`].
pub fn run(config: &VmConfig, options: Options, ui: &mut dyn Ui) -> Result<Outcome, VmmError> {
    config.validate(ringfort_base::host::memory().total)?;
    let host = |what: &'static str| move |source: io::Error| VmmError::Host { what, source };
    // Before any thread starts, so that all inherit the mask. A write behind the limit for files is to fail, not to end the
    // process (setrlimit(2), RLIMIT_FSIZE).
    let mask = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGXFSZ];
    let signals = SignalFd::new(&mask).map_err(host("taking signals"))?;
    let mut main = EventLoop::new().map_err(host("making the main loop"))?;
    let (sender, queue) = channel();
    let post = Post { events: sender, wake: main.handle() };

    let open = |line: &Serial| {
        let from_keys = post.clone();
        Chardev::open(line, Box::new(move |c| from_keys.send(Event::Command(c))))
    };
    let serial = open(&config.serial).map_err(VmmError::Serial)?;
    let console = match &config.console {
        Serial::None => None,
        line => Some(open(line).map_err(VmmError::Console)?),
    };
    let pty = |what: &str, line: &Chardev| line.pty.as_ref().map(|p| format!("{what}: {}", p.display()));
    let ptys = [pty("serial port", &serial), console.as_ref().and_then(|c| pty("console", c))];
    let from_vcpus = Shared(Mutex::new(post.clone()));
    let report = move |n, e| ringfort_bus::lock(&from_vcpus.0).send(Event::Vcpu(n, e));
    let power = Arc::new(Shared(Mutex::new(post.clone())));
    let from_disks = Shared(Mutex::new(post.clone()));
    let trouble: OnTrouble = Arc::new(move |t| ringfort_bus::lock(&from_disks.0).send(Event::Disk(t)));
    // Said once the machine stands, so that a mistake is told alone.
    let mut remarks = Vec::new();
    let mut remark = |line: &str| remarks.push(line.to_owned());
    let Options { save, mut restore, gdb, control, stats, jit_perf_map } = options;
    if jit_perf_map {
        ringfort_engine_soft::perf_map::enable().map_err(host("making the perf map"))?;
    }
    if let Some(target) = &save {
        target.check()?;
    }
    let server = match &gdb {
        None => None,
        Some(g) => {
            let from_gdb = post.clone();
            Some(Server::start(&g.address, move |e| from_gdb.send(Event::Gdb(e))).map_err(VmmError::Gdb)?)
        }
    };
    let mut events = Events::new(match &control {
        None => None,
        Some(path) => {
            let from_control = post.clone();
            let ask = move |r| from_control.send(Event::Control(r));
            Some(control::Server::start(path, ask).map_err(VmmError::Control)?)
        }
    });
    let lines = Lines { serial, console };
    let mut machine = Machine::build(config, restore.as_ref(), lines, power, report, &trouble, &mut remark)?;
    if let Some(saved) = &mut restore {
        let loaded = machine.load(saved, &mut |what, done, total| ui.progress(what, done, total));
        ui.progress_ends();
        loaded?;
        machine.commit(true)?;
    }
    let save = save.unwrap_or_else(|| match &restore {
        // Back to where it came from, which is out of date once it has run.
        Some(saved) => SaveTarget { keep_existing: false, ..SaveTarget::by_default(saved.path().into()) },
        None => SaveTarget::by_default(format!("{}.rfstate", config.name).into()),
    });
    let restored = restore.take().is_some();
    let machine = Rc::new(machine);
    let mut session = gdb.map(|g| Session::new(machine.clone(), g.wait));
    remarks.iter().for_each(|line| ui.say(line));
    ptys.iter().flatten().for_each(|line| ui.say(line));
    if let (Some(server), Some(session)) = (&server, &session) {
        let waits = if session.holds() { "the guest waits for gdb" } else { "gdb can connect" };
        ui.say(&format!("{waits}: `target remote {}`", server.address));
    }
    let signals = &signals;
    main.add(signals, Interest::READ, move |_, _| {
        while let Ok(Some(signal)) = signals.next() {
            match signal {
                // The request that failed says so.
                libc::SIGXFSZ => {}
                libc::SIGUSR1 => post.send(Event::SaveSignal),
                _ => post.send(Event::Signal),
            }
        }
    })
    .map_err(host("taking signals"))?;

    let on_terminal = [&config.serial, &config.console].contains(&&Serial::Stdio);
    let _raw = match on_terminal {
        true => RawTerminal::enter(&io::stdin()).map_err(host("setting up the terminal"))?,
        false => None,
    };
    if session.as_ref().is_none_or(|s| !s.holds()) {
        machine.resume();
    }
    if restored {
        machine.announce();
    }
    let mut waiting = VecDeque::new();
    let mut halt = Halt::default();
    // The terminal is raw.
    let end = if on_terminal { "\r" } else { "" };
    loop {
        main.turn(halt.patience()).map_err(host("waiting for events"))?;
        act(halt.waited(), &machine, ui, end);
        events.stands(halt.status().is_some());
        while let Some(event) = waiting.pop_front().or_else(|| queue.try_recv().ok()) {
            match next(config, event) {
                Next::GoOn => {}
                Next::CrashLoaded => events.tell("GUEST_CRASHLOADED", json!({ "action": "run" })),
                Next::Disk(trouble) => {
                    events.disk(&trouble, halt.is_known(&trouble));
                    act(halt.trouble(trouble), &machine, ui, end);
                }
                Next::Continue => act(halt.go_on(), &machine, ui, end),
                Next::End(outcome, cause) => {
                    machine.pause();
                    events.shut_down(cause);
                    if let Some(path) = &stats {
                        write_statistics(&machine, path)?;
                    }
                    if let Some(s) = &mut session {
                        s.ended(if let Outcome::DebugExit(status) = outcome { status } else { 0 });
                    }
                    return Ok(outcome);
                }
                Next::Gdb(event) => {
                    if session.as_mut().is_some_and(|s| s.event(event) == After::Kill) {
                        machine.pause();
                        events.shut_down(Cause::User);
                        return Ok(Outcome::Quit);
                    }
                }
                Next::Stopped(vcpu, stop) => {
                    if session.as_mut().is_some_and(|s| s.stopped(vcpu, stop) == After::Kill) {
                        machine.pause();
                        events.shut_down(Cause::User);
                        return Ok(Outcome::Quit);
                    }
                }
                Next::Control(request) => {
                    let debugged = session.as_ref().is_some_and(Session::holds);
                    let answer = match request.command.run(&machine, &halt, debugged) {
                        Ok(answer) => answer,
                        Err(wanted) => {
                            match wanted {
                                Wanted::Stop => act(halt.stop(), &machine, ui, end),
                                Wanted::Continue => act(halt.go_on(), &machine, ui, end),
                                Wanted::Order(order) => waiting.push_back(Event::Ordered(order)),
                            }
                            // Before the answer, as QEMU does.
                            events.stands(halt.status().is_some());
                            Ok(json!({}))
                        }
                    };
                    request.answer(answer);
                }
                Next::Fail(e) => {
                    machine.pause();
                    events.shut_down(Cause::HostError);
                    return Err(e);
                }
                Next::PowerButton => {
                    events.tell("POWERDOWN", Value::Null);
                    machine.power_button();
                }
                Next::ToggleLink => _ = machine.toggle_links(),
                Next::Counters => {
                    for (name, n) in machine.net_statistics() {
                        ui.say(&format!("{name} {n}{end}"));
                    }
                }
                Next::Save(_) if session.as_ref().is_some_and(Session::is_connected) => {
                    ui.say(&format!("not saved while gdb is connected: detach it first{end}"));
                }
                Next::Save(cause) => {
                    machine.pause();
                    // What the guest did last counts: one that has just powered off is not saved.
                    waiting.extend(queue.try_iter());
                    if waiting.iter().any(|e| !e.is_from_user()) {
                        waiting.push_back(Event::SaveSignal);
                        if !halt.stands() {
                            machine.resume();
                        }
                        continue;
                    }
                    let saved = machine.save(&save, &mut |what, done, total| ui.progress(what, done, total));
                    ui.progress_ends();
                    match saved {
                        Ok(()) => {
                            events.stands(true);
                            events.shut_down(cause);
                            return Ok(Outcome::Saved(save.path));
                        }
                        Err(e) if halt.stands() => ui.say(&format!("{e}{end}")),
                        Err(e) => {
                            ui.say(&format!("{e}; the guest goes on{end}"));
                            machine.resume();
                        }
                    }
                }
                Next::Reset(cause) => {
                    machine.pause();
                    // What the old guest still had under way must not reset the new one; what the user wants holds.
                    waiting.extend(queue.try_iter().filter(Event::is_from_user));
                    machine.reset()?;
                    halt.forget();
                    events.reset(cause);
                    if session.as_ref().is_none_or(|s| !s.holds()) && !halt.stands() {
                        machine.resume();
                    }
                }
            }
            events.stands(halt.status().is_some());
        }
    }
}

/// The counters of the machine's engine and network cards, as JSON.
fn write_statistics(machine: &Machine, path: &Path) -> Result<(), VmmError> {
    let counters: serde_json::Map<String, serde_json::Value> =
        machine.statistics().into_iter().map(|(name, n)| (name, n.into())).collect();
    let text = format!("{:#}\n", serde_json::Value::Object(counters));
    let written = match path.to_str() {
        Some("-") => io::stderr().write_all(text.as_bytes()),
        _ => std::fs::write(path, text),
    };
    written.map_err(|source| VmmError::Host { what: "writing the statistics", source })
}

/// Do what a disk's trouble asks for.
fn act((act, line): (Act, Option<String>), machine: &Machine, ui: &mut dyn Ui, end: &str) {
    match act {
        Act::Nothing => {}
        Act::Pause => machine.pause(),
        Act::Resume => machine.resume(),
    }
    if let Some(line) = line {
        ui.say(&format!("{line}{end}"));
    }
}

enum Next {
    GoOn,
    CrashLoaded,
    Disk(DiskTrouble),
    Continue,
    End(Outcome, Cause),
    Fail(VmmError),
    Gdb(GdbEvent),
    Control(control::Request),
    Stopped(usize, DebugStop),
    PowerButton,
    ToggleLink,
    Counters,
    Save(Cause),
    Reset(Cause),
}

fn next(config: &VmConfig, event: Event) -> Next {
    let reset = if config.no_reboot {
        Next::End(Outcome::Reset, Cause::GuestReset)
    } else {
        Next::Reset(Cause::GuestReset)
    };
    match event {
        Event::Power(PowerEvent::PowerOff) => Next::End(Outcome::PowerOff, Cause::GuestShutdown),
        Event::Power(PowerEvent::Reset) => reset,
        Event::Power(PowerEvent::Panicked) => Next::End(Outcome::Panicked, Cause::GuestPanic),
        Event::Power(PowerEvent::DebugExit(status)) => {
            Next::End(Outcome::DebugExit(status as u8), Cause::GuestShutdown)
        }
        Event::Power(PowerEvent::CrashLoaded) => Next::CrashLoaded,
        Event::Power(PowerEvent::Suspend | PowerEvent::ShuttingDown) => Next::GoOn,
        Event::Command(c) => order(c, Cause::User),
        Event::Ordered(c) => order(c, Cause::Control),
        Event::Signal => order(Command::Quit, Cause::Signal),
        Event::SaveSignal => order(Command::Save, Cause::Signal),
        Event::Disk(trouble) => Next::Disk(trouble),
        Event::Vcpu(_, VcpuEvent::Shutdown) => reset,
        Event::Vcpu(vcpu, VcpuEvent::Debug(stop)) => Next::Stopped(vcpu, stop),
        Event::Gdb(event) => Next::Gdb(event),
        Event::Control(request) => Next::Control(request),
        Event::Vcpu(_, VcpuEvent::Failed(e)) => Next::Fail(e.into()),
    }
}

/// What the user wants, by whatever way.
fn order(command: Command, cause: Cause) -> Next {
    match command {
        Command::Quit => Next::End(Outcome::Quit, cause),
        Command::PowerButton => Next::PowerButton,
        Command::ToggleLink => Next::ToggleLink,
        Command::Counters => Next::Counters,
        Command::Save => Next::Save(cause),
        // Asked for by the user, not by the guest: it boots again in any case.
        Command::Reset => Next::Reset(cause),
        Command::Continue => Next::Continue,
    }
}
