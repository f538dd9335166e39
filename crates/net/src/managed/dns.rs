//! The built-in name server of a network (RFC 1035): it answers for guests, and hands everything else to the host's servers.

use std::net::Ipv4Addr;

const HEADER: usize = 12;
/// Longest message over UDP that is taken on.
pub const LONGEST: usize = 4096;
/// Seconds that an answer about a guest may be kept.
const TTL: u32 = 30;

/// The one question of a query.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// The name in lower case, without the final dot.
    pub name: String,
    /// Type: 1 for A, 28 for AAAA.
    pub kind: u16,
    /// Where the question ends.
    pub end: usize,
}

/// Take a query apart: `None` for what is no query with one question in the class of the Internet.
pub fn question(query: &[u8]) -> Option<Question> {
    if query.len() > LONGEST || query.len() < HEADER || query[2] & 0xf8 != 0 || query[4..6] != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*query.get(at)?);
        at += 1;
        match len {
            0 => break,
            // A question is the first name: there is nothing that a pointer could point to.
            1..=63 => {
                let label = query.get(at..at + len)?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.extend(label.iter().map(|b| char::from(b.to_ascii_lowercase())));
                at += len;
            }
            _ => return None,
        }
        if name.len() > 2 * 253 {
            return None;
        }
    }
    let rest = query.get(at..at + 4)?;
    (rest[2..] == [0, 1]).then(|| Question {
        name,
        kind: u16::from_be_bytes([rest[0], rest[1]]),
        end: at + 4,
    })
}

/// The answer to a question about a guest: its address, or that there is no record of the type asked for.
pub fn answer(query: &[u8], q: &Question, address: Option<Ipv4Addr>) -> Vec<u8> {
    let mut m = query[..q.end].to_vec();
    // A response, authoritative, recursion available; wanted recursion is repeated.
    m[2] = 0x84 | query[2] & 1;
    m[3] = 0x80;
    m[6..HEADER].fill(0);
    if let Some(a) = address.filter(|_| q.kind == 1) {
        m[7] = 1;
        m.extend([0xc0, HEADER as u8, 0, 1, 0, 1]);
        m.extend(TTL.to_be_bytes());
        m.extend([0, 4]);
        m.extend(a.octets());
    }
    m
}

/// The answer that a server gives which cannot ask any other.
pub fn failure(query: &[u8], q: &Question) -> Vec<u8> {
    let mut m = answer(query, q, None);
    m[2] &= !4;
    m[3] = 0x82;
    m
}

/// Whether a message of a server's is the response to a query with this number: to the same question, in the case that was asked
/// (RFC 5452 section 9.1). Servers that could not read a question repeat none.
pub fn responds(message: &[u8], number: [u8; 2], query: &[u8]) -> bool {
    let Some(header) = message.first_chunk::<HEADER>() else { return false };
    if header[..2] != number || header[2] & 0x80 == 0 || (header[2] ^ query[2]) & 0x78 != 0 {
        return false;
    }
    match header[4..6] {
        [0, 0] => header[3] & 15 != 0,
        [0, 1] => question(query).is_some_and(|q| message.get(HEADER..q.end) == query.get(HEADER..q.end)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(labels: &[&str], kind: u8) -> Vec<u8> {
        let mut m = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for l in labels {
            m.push(l.len() as u8);
            m.extend(l.as_bytes());
        }
        m.extend([0, 0, kind, 0, 1]);
        m
    }

    #[test]
    fn questions_and_answers() {
        let m = query(&["VM1", "lab"], 1);
        let q = question(&m).unwrap();
        assert_eq!((q.name.as_str(), q.kind, q.end), ("vm1.lab", 1, m.len()));
        let a = answer(&m, &q, Some([10, 9, 0, 2].into()));
        assert_eq!(
            (a[..4].to_vec(), a[7], &a[a.len() - 4..]),
            (vec![1, 2, 0x85, 0x80], 1, &[10, 9, 0, 2][..])
        );
        let m = query(&["vm1"], 28);
        let q = question(&m).unwrap();
        assert_eq!(answer(&m, &q, Some([1; 4].into())).len(), m.len(), "no address of that type");
        assert_eq!(failure(&m, &q)[3] & 15, 2);
    }

    #[test]
    fn only_the_response_to_a_question_is_one() {
        let m = query(&["vm1", "lab"], 1);
        let q = question(&m).unwrap();
        let a = answer(&m, &q, Some([1; 4].into()));
        assert!(responds(&a, [1, 2], &m) && responds(&failure(&m, &q), [1, 2], &m));
        assert!(!responds(&a, [1, 3], &m) && !responds(&m, [1, 2], &m));
        assert!(
            !responds(&a, [1, 2], &query(&["vm2", "lab"], 1))
                && !responds(&a, [1, 2], &query(&["vm1", "lab"], 28))
        );
        // Format error, without a question; an answer without one is none.
        assert!(responds(&[1, 2, 0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 2], &m));
        assert!(!responds(&[1, 2, 0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 2], &m));
        assert!((0..q.end).all(|n| !responds(&a[..n], [1, 2], &m)));
    }

    #[test]
    fn noise_is_no_question() {
        let m = query(&["a", "b"], 1);
        for n in 0..m.len() {
            assert_eq!(question(&m[..n]), None, "{n}");
        }
        let mut pointer = m.clone();
        pointer[12] = 0xc0;
        let mut two = m.clone();
        two[5] = 2;
        let mut response = m;
        response[2] |= 0x80;
        assert_eq!([question(&pointer), question(&two), question(&response)], [None, None, None]);
        assert_eq!(question(&query(&["x"; 300], 1)), None);
    }
}
