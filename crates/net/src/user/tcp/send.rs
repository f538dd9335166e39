//! Data and ends of the host's on their way to the guest, and the timers that repeat them.

use super::flow::{ACK, FIN, Flow, PSH, Phase};
use super::{FULL, MOST_PAYLOAD, MOST_TRIES, RTO, SEND_ROOM, SEND_ROOM_TIGHT, SHARE, TIGHT, Tcp};
use crate::sys::at_mark;
use crate::user::stack::Common;
use ringfort_bus::lock;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::time::Instant;

impl Tcp {
    /// Bring data of the host to the guest, as far as there is some and both sides have room.
    pub(super) fn pump(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if f.phase != Phase::Open {
            return;
        }
        let tso = {
            let o = lock(&c.output).offloads;
            if f.pair.guest.is_ipv4() { o.tso4 } else { o.tso6 }
        };
        let chunk = if tso { (MOST_PAYLOAD / f.mss).max(1) * f.mss } else { f.mss };
        let limit = match self.held {
            ..TIGHT => SEND_ROOM,
            TIGHT..FULL => SEND_ROOM_TIGHT,
            FULL.. => f.mss,
        };
        let mut sent_any = false;
        let mut share = SHARE;
        loop {
            let open = f.window.saturating_sub(f.sent);
            let has_room = lock(&c.output).has_room();
            // Others had to wait, and this one had its share.
            let enough = share == 0 && !self.blocked.is_empty();
            if !has_room || enough {
                lock(&c.output).writer_waits = true;
                c.wake |= has_room;
                if !std::mem::replace(&mut f.blocked, true) {
                    self.blocked.push_back(id);
                }
                break;
            }
            if f.sent < f.buf.len() && open > 0 {
                let n = (f.buf.len() - f.sent).min(open).min(chunk);
                let last = f.sent + n == f.buf.len();
                f.emit(c, if last { ACK | PSH } else { ACK }, f.sent, n);
                f.sent += n;
                f.max_sent = f.max_sent.max(f.sent);
                share = share.saturating_sub(n);
                sent_any = true;
                continue;
            }
            let room = limit.saturating_sub(f.buf.len());
            if f.readable && !f.host_eof && open > 0 && room > 0 {
                let want = chunk.min(open).min(room);
                // A read ends before the urgent byte, and the next begins with it.
                if (f.urgent_comes || f.ended_early) && at_mark(f.stream.as_raw_fd()) {
                    f.urgent_comes = false;
                    f.urgent = Some(f.una.wrapping_add(f.buf.len() as u32 + 1));
                }
                match f.buf.read_from(&mut f.stream, want) {
                    Ok(0) => f.host_eof = true,
                    Ok(n) => {
                        f.ended_early = n < want;
                        self.held += n;
                        f.last = Instant::now();
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        // What comes next is told of, and whether there is an urgent byte among it.
                        (f.readable, f.ended_early) = (false, false);
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return self.fail(c, id),
                }
                continue;
            }
            // A closed window does not hold back the end, which takes no room.
            if f.readable && !f.host_eof && open == 0 && f.buf.is_empty() {
                match f.stream.peek(&mut [0]) {
                    Ok(0) => f.host_eof = true,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => f.readable = false,
                    _ => break,
                }
                continue;
            }
            if f.host_eof && f.sent == f.buf.len() && !f.fin_sent {
                f.emit(c, FIN | ACK, f.sent, 0);
                (f.fin_sent, f.fin_ever_sent) = (true, true);
                sent_any = true;
                continue;
            }
            break;
        }
        if f.is_done() {
            return self.remove(id);
        }
        arm(&mut self.timers, c, id, f, sent_any && f.deadline.is_none());
    }

    /// When a timer is due next.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|t| t.0.0)
    }

    /// Serve the timers that are due.
    pub fn tick(&mut self, c: &mut Common, now: Instant) {
        while let Some(&Reverse((at, id))) = self.timers.peek() {
            if at > now {
                return;
            }
            self.timers.pop();
            let Some(f) = self.flows.get_mut(&id) else { continue };
            if f.queued != Some(at) {
                continue;
            }
            f.queued = None;
            match f.deadline {
                None => continue,
                Some(d) if d > now => {
                    f.queued = Some(d);
                    self.timers.push(Reverse((d, id)));
                    continue;
                }
                Some(_) => {}
            }
            f.deadline = None;
            f.tries += 1;
            // A guest that answers probes with a closed window is alive; one that answers nothing is not.
            if f.tries > MOST_TRIES {
                self.fail(c, id);
                continue;
            }
            match f.phase {
                Phase::Connecting => {}
                Phase::SynSent | Phase::SynReceived => self.send_syn(c, id),
                Phase::Open if f.window == 0 => {
                    // An old sequence number makes the guest tell its window.
                    f.una = f.una.wrapping_sub(1);
                    f.acknowledge(c);
                    f.una = f.una.wrapping_add(1);
                    arm(&mut self.timers, c, id, f, true);
                }
                Phase::Open => {
                    f.sent = 0;
                    if !f.fin_acked {
                        f.fin_sent = false;
                    }
                    self.pump(c, id);
                }
            }
        }
    }
}

/// Set a connection's timer if it waits for something; `anew` puts it off.
pub(super) fn arm(
    timers: &mut BinaryHeap<Reverse<(Instant, u64)>>,
    c: &mut Common,
    id: u64,
    f: &mut Flow,
    anew: bool,
) {
    let unanswered = f.max_sent > 0 || (f.fin_ever_sent && !f.fin_acked) || f.is_opening();
    let shut_out = f.window == 0 && (f.readable || !f.buf.is_empty()) && !f.fin_acked;
    if !unanswered && !shut_out {
        f.deadline = None;
        return;
    }
    if f.deadline.is_some() && !anew {
        return;
    }
    let at = Instant::now() + RTO * (1 << f.tries.min(7));
    f.deadline = Some(at);
    if f.queued.is_none_or(|q| q > at) {
        f.queued = Some(at);
        timers.push(Reverse((at, id)));
        c.timer_set(at);
    }
}
