//! DHCPv6 server for one guest: the address that ports lead to, name server, domains.

use super::config::UserConfig;
use crate::dhcp6::{Addresses, Association, Server};
use crate::wire::Mac;
use std::net::Ipv6Addr;

impl Addresses for &UserConfig {
    /// One guest has one address.
    fn give(&mut self, _: &Association<'_>, index: usize, _: Option<Ipv6Addr>, _: bool) -> Option<Ipv6Addr> {
        (index == 0).then(|| self.guest6())
    }

    fn on_link(&self, address: Ipv6Addr) -> bool {
        self.contains6(address)
    }
}

/// Answer a client's message; `None` if there is nothing to say. `mac` is the server's.
pub fn answer(mut config: &UserConfig, request: &[u8], mac: &Mac) -> Option<Vec<u8>> {
    let server = Server {
        mac: *mac,
        valid: config.lease,
        dns: (!config.restrict).then(|| config.dns6()),
        search: config.search.clone(),
    };
    crate::dhcp6::answer(&server, &mut config, request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp6::testing::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    #[test]
    fn an_address_is_offered_given_and_renewed() {
        let config = UserConfig { search: vec!["a.b".into()], ..UserConfig::default() };
        let offer = answer(&config, &message(SOLICIT, &[(CLIENT_ID, b"me"), (IA_NA, &IA)]), &MAC).unwrap();
        assert_eq!(offer[..4], [ADVERTISE, 1, 2, 3]);
        let server = value(&offer, SERVER_ID).unwrap();
        assert_eq!(value(&offer, DNS).unwrap(), config.dns6().octets());
        assert_eq!(value(&offer, DOMAINS).unwrap(), b"\x01a\x01b\0");
        for kind in [REQUEST, RENEW] {
            let m = message(kind, &[(CLIENT_ID, b"me"), (SERVER_ID, &server), (IA_NA, &IA), (IA_NA, &IA)]);
            let given = answer(&config, &m, &MAC).unwrap();
            assert_eq!(given[0], REPLY);
            let ias: Vec<_> = all(&given).into_iter().filter(|(c, _)| *c == IA_NA).collect();
            assert_eq!(ias[0].1[..4], [9; 4]);
            assert_eq!(ias[0].1[16..32], config.guest6().octets());
            assert_eq!(ias[1].1[12..], [0, 13, 0, 2, 0, 2], "one guest has one address");
            let other = message(kind, &[(CLIENT_ID, b"me"), (SERVER_ID, b"other"), (IA_NA, &IA)]);
            assert!(answer(&config, &other, &MAC).is_none());
        }
        let quick = answer(
            &config,
            &message(SOLICIT, &[(CLIENT_ID, b"me"), (RAPID_COMMIT, &[]), (IA_NA, &IA)]),
            &MAC,
        );
        assert_eq!(quick.unwrap()[0], REPLY);
        let mut far = IA.to_vec();
        put(&mut far, IA_ADDRESS, &[0x20; 24]);
        let moved = answer(&config, &message(CONFIRM, &[(CLIENT_ID, b"me"), (IA_NA, &far)]), &MAC).unwrap();
        assert_eq!(value(&moved, STATUS).unwrap(), [0, 4]);
        // Asked about no address there is nothing to say; what was had before and is another's network's is over.
        assert!(answer(&config, &message(CONFIRM, &[(CLIENT_ID, b"me"), (IA_NA, &IA)]), &MAC).is_none());
        let m = message(RENEW, &[(CLIENT_ID, b"me"), (SERVER_ID, &server), (IA_NA, &far)]);
        let ia = value(&answer(&config, &m, &MAC).unwrap(), IA_NA).unwrap();
        assert_eq!(
            (&ia[16..32], &ia[44..60], &ia[60..68]),
            (&config.guest6().octets()[..], &[0x20; 16][..], &[0; 8][..])
        );
        let released = message(RELEASE, &[(CLIENT_ID, b"me"), (SERVER_ID, &server)]);
        assert_eq!(value(&answer(&config, &released, &MAC).unwrap(), STATUS).unwrap(), [0, 0]);
    }

    #[test]
    fn information_alone() {
        let told = answer(&UserConfig::default(), &message(INFORMATION_REQUEST, &[]), &MAC).unwrap();
        assert!(value(&told, IA_NA).is_none() && value(&told, DNS).is_some());
        let both = message(INFORMATION_REQUEST, &[(CLIENT_ID, b"me"), (IA_NA, &IA)]);
        assert!(answer(&UserConfig::default(), &both, &MAC).is_none());
        let restricted = UserConfig { restrict: true, ..UserConfig::default() };
        let told = answer(&restricted, &message(INFORMATION_REQUEST, &[]), &MAC).unwrap();
        assert!(value(&told, DNS).is_none());
    }

    #[test]
    fn nonsense_gets_no_answer() {
        for bad in
            [&b""[..], &[1, 2], &[SOLICIT, 0, 0, 0], &[99, 0, 0, 0], &[SOLICIT, 0, 0, 0, 0, 1, 0xff, 0xff]]
        {
            assert!(answer(&UserConfig::default(), bad, &MAC).is_none());
        }
        let long = message(SOLICIT, &[(CLIENT_ID, &[1; 131])]);
        assert!(answer(&UserConfig::default(), &long, &MAC).is_none());
    }
}
