//! Segments of the guest (RFC 9293 section 3.10.7).

use super::flow::{ACK, FIN, Phase, RST, SYN, Segment, reset};
use super::send::arm;
use super::{MOST_TRIES, Tcp, room};
use crate::user::stack::Common;

impl Tcp {
    pub(super) fn syn_sent(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if s.ack != Some(f.una.wrapping_add(1)) {
            // The guest still holds an old connection with the same ends, perhaps in TIME-WAIT: the reset ends that one, and our SYN
            // comes again (RFC 9293 section 3.10.7.3).
            if s.ack.is_some() && s.flags & RST == 0 {
                reset(c, f.pair, s);
                f.repeats += 1;
                if f.repeats == 1 {
                    self.send_syn(c, id);
                }
            }
            return;
        }
        if s.flags & RST != 0 {
            f.abort();
            return self.remove(id);
        }
        if s.flags & SYN == 0 {
            return;
        }
        f.meet(s, c.config.mtu.into());
        f.una = f.una.wrapping_add(1);
        f.acknowledge(c);
        self.opened(c, id);
    }

    pub(super) fn opened(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        f.phase = Phase::Open;
        f.readable = true;
        (f.tries, f.repeats) = (0, 0);
        self.opening -= 1;
        self.pump(c, id);
    }

    pub(super) fn synchronized(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if s.flags & RST != 0 {
            // RFC 5961 section 3.2: only the exact number counts; others are answered.
            if s.seq == f.next {
                f.abort();
                self.remove(id);
            } else if s.seq.wrapping_sub(f.next) < f.free() as u32 {
                f.acknowledge(c);
            }
            return;
        }
        if s.flags & SYN != 0 {
            if f.phase == Phase::SynReceived && s.seq.wrapping_add(1) == f.next {
                return self.send_syn(c, id);
            }
            // RFC 5961 section 4.2: a guest that began anew answers this with a reset.
            return f.acknowledge(c);
        }
        let Some(ack) = s.ack else { return };
        if f.phase == Phase::SynReceived {
            if ack != f.una.wrapping_add(1) {
                return;
            }
            f.una = ack;
            f.window = usize::from(s.window) << f.scale;
            self.opened(c, id);
        }
        let Some(f) = self.flows.get_mut(&id) else { return };
        let acked = ack.wrapping_sub(f.una) as usize;
        let outstanding = f.max_sent + usize::from(f.fin_ever_sent);
        let window = usize::from(s.window) << f.scale;
        if acked <= outstanding {
            if acked > 0 {
                let data = acked.min(f.buf.len());
                f.buf.consume(data);
                self.held -= data;
                f.sent = f.sent.saturating_sub(data);
                f.max_sent -= data.min(f.max_sent);
                f.una = f.una.wrapping_add(data as u32);
                if acked > data {
                    f.fin_acked = true;
                    f.fin_sent = true;
                }
                (f.tries, f.repeats) = (0, 0);
                arm(&mut self.timers, c, id, f, true);
            } else if s.data.is_empty() && s.flags & FIN == 0 && f.sent > 0 && window == f.window {
                f.repeats += 1;
                if f.repeats == 3 {
                    // The guest misses a segment: give it again at once (RFC 5681 section 3.2).
                    let n = f.mss.min(f.buf.len());
                    f.emit(c, ACK, 0, n);
                }
            }
            f.window = window;
            // Whoever answers is alive, with a closed window, too.
            f.tries = f.tries.min(MOST_TRIES / 2);
        } else if (acked as i32) > 0 {
            // It acknowledges what was never sent.
            return f.acknowledge(c);
        }
        if self.data(c, id, s) {
            self.pump(c, id);
        }
    }

    /// Take the segment's data and end; false when the connection is gone.
    fn data(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) -> bool {
        let Some(f) = self.flows.get_mut(&id) else { return false };
        let old = f.next.wrapping_sub(s.seq) as usize;
        let fin = s.flags & FIN != 0;
        if s.data.is_empty() && !fin {
            // A probe from outside the window wants an answer (RFC 9293 section 3.10.7.4).
            if s.seq != f.next {
                f.acknowledge(c);
            }
            return true;
        }
        if old > s.data.len() || f.guest_fin {
            // From the future, or all of it known.
            f.acknowledge(c);
            return true;
        }
        let fresh = &s.data[old..];
        f.room = room(self.held);
        let before = f.to_host.len();
        let urgent =
            s.urgent.and_then(|u| usize::from(u).checked_sub(old + 1)).filter(|at| *at < fresh.len());
        let taken = match f.give_host(fresh, urgent) {
            Ok(n) => n,
            // Nobody reads what the guest sends; what the host sent before may still be read, but a reset loses it as well.
            Err(_) => {
                self.fail(c, id);
                return false;
            }
        };
        self.held += f.to_host.len() - before;
        f.next = f.next.wrapping_add(taken as u32);
        f.unacknowledged += taken;
        // What was not taken must come again, the sooner the better.
        let whole = taken == fresh.len();
        if fin && taken == fresh.len() {
            f.next = f.next.wrapping_add(1);
            f.guest_fin = true;
            let before = f.to_host.len();
            let drained = f.drain_to_host();
            self.held -= before - f.to_host.len();
            if drained.is_err() {
                self.fail(c, id);
                return false;
            }
            f.acknowledge(c);
        } else if !f.ack_due {
            f.ack_due = true;
            self.due.push(id);
        } else if f.delayed.is_some() && (f.unacknowledged >= f.mss || !whole) {
            // It waits no longer.
            f.delayed = None;
            self.due.push(id);
        }
        if f.is_done() {
            self.remove(id);
            return false;
        }
        true
    }
}
