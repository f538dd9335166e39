//! The control queue (virtio 1.3 section 5.1.6.5).

use super::filter::{MAX_ADDRESSES, Table};
use super::{
    F_CTRL_GUEST_OFFLOADS, F_CTRL_MAC_ADDR, F_CTRL_RX, F_CTRL_RX_EXTRA, F_CTRL_VLAN, F_GUEST_ANNOUNCE,
    F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_USO4, F_GUEST_USO6, F_HASH_REPORT, F_MQ,
    F_RSS, Net, RssState, S_ANNOUNCE, State,
};
use crate::{Chain, Queue, QueueError, Served};
use ringfort_bus::lock;
use ringfort_net::Offloads;
use serde::{Deserialize, Serialize};

const OK: u8 = 0;
const ERR: u8 = 1;

/// Feature bits whose numbers are the bits of the driver's offloads, too (section 5.1.6.5.6).
const OFFLOADS: u64 = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_USO4 | F_GUEST_USO6;

/// What the driver set beyond filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// Pairs of queues in use.
    pub pairs: u16,
    /// Offloads that the driver takes at the moment, as feature bits.
    pub offloads: u64,
}

impl Default for ControlState {
    fn default() -> Self {
        ControlState { pairs: 1, offloads: 0 }
    }
}

/// The offloads among features.
pub fn agreed(features: u64) -> u64 {
    features & OFFLOADS
}

/// Offload bits as the back end knows them.
pub fn offloads(bits: u64) -> Offloads {
    let has = |f: u64| bits & f == f;
    Offloads {
        checksum: has(F_GUEST_CSUM),
        tso4: has(F_GUEST_TSO4),
        tso6: has(F_GUEST_TSO6),
        ecn: has(F_GUEST_ECN),
        uso: has(F_GUEST_USO4 | F_GUEST_USO6),
    }
    .and(Offloads::ALL)
}

impl Net {
    pub(super) fn control(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        while let Some(chain) = queue.pop()? {
            let Some(head) = chain.read_array::<2>(0).filter(|_| chain.writable() > 0) else {
                return Err(QueueError::Shape);
            };
            let (mut change, mut pairs, mut rss) = (None, None, None);
            let ack = {
                let mut s = lock(&self.state);
                let before = s.control;
                let done = command(&mut s, self.options.pairs, head, &chain).is_some();
                if s.control.offloads != before.offloads {
                    change = Some(offloads(s.control.offloads));
                }
                if s.control.pairs != before.pairs {
                    pairs = Some(s.control.pairs);
                }
                if done && head[0] == 4 {
                    rss = Some(s.rss.clone());
                }
                if done { OK } else { ERR }
            };
            if let Some(o) = change {
                self.backend.set_offloads(o);
            }
            if let Some(r) = rss {
                self.follow_rss(&r);
            }
            if let Some(n) = pairs {
                self.backend.set_pairs(n);
            }
            chain.write(0, &[ack]);
            queue.complete(chain, 1);
            // Pairs that were just taken into use may have frames waiting.
            if head[0] == 4
                && let Some(s) = self.signals.get()
            {
                (0..2 * self.options.pairs).for_each(|q| s.kick(q));
            }
        }
        Ok(Served::Drained)
    }
}

/// One command; `None` when it is refused, and then nothing has changed.
fn command(s: &mut State, most_pairs: u16, [class, number]: [u8; 2], chain: &Chain) -> Option<()> {
    let allowed = |feature: u64| (s.features & feature != 0).then_some(());
    match (class, number) {
        (0, 0..=5) => {
            allowed(if number < 2 { F_CTRL_RX } else { F_CTRL_RX_EXTRA })?;
            let [on] = chain.read_array::<1>(2)?;
            let on = match on {
                0 => false,
                1 => true,
                _ => return None,
            };
            let f = &mut s.filter;
            *[
                &mut f.promiscuous,
                &mut f.all_multicast,
                &mut f.all_unicast,
                &mut f.no_multicast,
                &mut f.no_unicast,
                &mut f.no_broadcast,
            ][usize::from(number)] = on;
        }
        (1, 0) => {
            allowed(F_CTRL_RX)?;
            let (unicast, at) = table(chain, 2)?;
            let (multicast, _) = table(chain, at)?;
            (s.filter.unicast, s.filter.multicast) = (unicast, multicast);
        }
        (1, 1) => {
            allowed(F_CTRL_MAC_ADDR)?;
            let mac = chain.read_array::<6>(2)?;
            if mac[0] & 1 != 0 {
                return None;
            }
            s.mac = mac;
        }
        (2, 0 | 1) => {
            allowed(F_CTRL_VLAN)?;
            let id = u16::from_le_bytes(chain.read_array(2)?);
            s.filter.set_vlan(id, number == 0).then_some(())?;
        }
        (3, 0) => {
            allowed(F_GUEST_ANNOUNCE)?;
            s.status &= !S_ANNOUNCE;
        }
        (4, 0) => {
            allowed(F_MQ)?;
            let pairs = u16::from_le_bytes(chain.read_array(2)?);
            (1..=most_pairs).contains(&pairs).then_some(())?;
            s.control.pairs = pairs;
            // The device spreads frames as it likes again (section 5.1.6.5.5); hashes are still reported.
            s.rss.table.clear();
        }
        (4, 1) => {
            allowed(F_RSS)?;
            let (rss, transmit) = RssState::from_rss(chain, most_pairs)?;
            let most = rss.table.iter().chain([&rss.default]).max().map_or(0, |&q| q + 1);
            s.control.pairs = transmit.max(most);
            s.rss = rss;
        }
        (4, 2) => {
            allowed(F_HASH_REPORT)?;
            let hash = RssState::from_hash(chain)?;
            (s.rss.types, s.rss.key) = (hash.types, hash.key);
        }
        (5, 0) => {
            allowed(F_CTRL_GUEST_OFFLOADS)?;
            let wanted = u64::from_le_bytes(chain.read_array(2)?);
            (wanted & !agreed(s.features) == 0).then_some(())?;
            s.control.offloads = wanted;
        }
        _ => return None,
    }
    Some(())
}

/// A list of addresses at `at` with a 32-bit count before it, and where it ends.
fn table(chain: &Chain, at: u64) -> Option<(Table, u64)> {
    let count = u32::from_le_bytes(chain.read_array(at)?) as u64;
    let end = at + 4 + 6 * count;
    if end > chain.readable() {
        return None;
    }
    let kept = (count as usize).min(MAX_ADDRESSES);
    let addresses = (0..kept as u64).filter_map(|n| chain.read_array::<6>(at + 4 + 6 * n)).collect();
    Some((Table { addresses, overflow: count as usize > kept }, end))
}
