//! Which frames the driver wants (virtio 1.3 sections 5.1.6.5.1 to 5.1.6.5.3).

use serde::{Deserialize, Serialize};

/// Most unicast and multicast addresses kept each; with more, all pass.
pub const MAX_ADDRESSES: usize = 64;
/// Number of VLANs.
const VLANS: usize = 4096;
/// Ethernet type of a VLAN tag (IEEE 802.1Q).
const VLAN_TAG: [u8; 2] = [0x81, 0];

/// A driver's list of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    pub addresses: Vec<[u8; 6]>,
    /// There were more than are kept.
    pub overflow: bool,
}

/// What passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    pub promiscuous: bool,
    pub all_multicast: bool,
    pub all_unicast: bool,
    pub no_multicast: bool,
    pub no_unicast: bool,
    pub no_broadcast: bool,
    pub unicast: Table,
    pub multicast: Table,
    /// A bit for each VLAN that passes.
    pub(super) vlans: Vec<u64>,
}

impl Default for Filter {
    /// All passes until the driver says otherwise.
    fn default() -> Self {
        Filter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Table::default(),
            multicast: Table::default(),
            vlans: vec![0; VLANS / 64],
        }
    }
}

impl Filter {
    /// Whether saved values can be ours.
    pub fn check(&self) -> Result<(), String> {
        let long = |t: &Table| t.addresses.len() > MAX_ADDRESSES;
        if self.vlans.len() != VLANS / 64 || long(&self.unicast) || long(&self.multicast) {
            return Err("the address filter has another size".into());
        }
        Ok(())
    }

    /// Let a VLAN pass or not; false if there is no such VLAN.
    pub fn set_vlan(&mut self, id: u16, pass: bool) -> bool {
        let Some(word) = self.vlans.get_mut(usize::from(id) / 64) else { return false };
        let bit = 1 << (id % 64);
        if pass {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        true
    }

    fn passes_vlan(&self, frame: &[u8]) -> bool {
        if frame[12..14] != VLAN_TAG {
            return true;
        }
        let Some(tag) = frame.get(14..16) else { return false };
        let id = u16::from_be_bytes([tag[0], tag[1]]) & 0xfff;
        self.vlans[usize::from(id) / 64] & 1 << (id % 64) != 0
    }

    /// Whether a frame is for the driver whose address is `mac`.
    pub fn wants(&self, frame: &[u8], mac: &[u8; 6], by_vlan: bool) -> bool {
        if frame.len() < 14 || (by_vlan && !self.passes_vlan(frame)) {
            return false;
        }
        if self.promiscuous {
            return true;
        }
        let to = &frame[..6];
        let listed = |t: &Table| t.overflow || t.addresses.iter().any(|a| a == to);
        if to == [0xff; 6] {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || listed(&self.multicast))
        } else {
            !self.no_unicast && (self.all_unicast || to == mac || listed(&self.unicast))
        }
    }
}
