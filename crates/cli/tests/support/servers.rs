//! What runs on the host for a guest to talk to.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// A web server: files of folders by GET, and PUT, whose bodies go to a channel. It closes each connection after one answer. Of files
/// below `gated/` it sends half, and the rest after a word through `gate`.
pub struct Web {
    pub at: SocketAddr,
    pub put: Receiver<Vec<u8>>,
    pub gate: Sender<()>,
}

impl Web {
    /// Listen at `address` for files of `folders`; the first that has a file gives it. `None` if the host has no such address.
    pub fn start(address: &str, folders: &[&Path]) -> Option<Web> {
        let listener = TcpListener::bind(address).ok()?;
        let at = listener.local_addr().expect("its address");
        let folders: Vec<PathBuf> = folders.iter().map(|f| f.to_path_buf()).collect();
        let (tx, put) = channel();
        let (gate, opened) = channel();
        let opened = Arc::new(Mutex::new(opened));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (folders, tx, opened) = (folders.clone(), tx.clone(), opened.clone());
                std::thread::spawn(move || {
                    // A guest that leaves in the middle is no failure of the server's.
                    let wait = || _ = opened.lock().expect("the gate").recv();
                    let _ = serve(stream, &folders, |body| drop(tx.send(body)), wait);
                });
            }
        });
        Some(Web { at, put, gate })
    }
}

fn serve(
    stream: TcpStream,
    folders: &[PathBuf],
    put: impl FnOnce(Vec<u8>),
    wait: impl FnOnce(),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut out = stream;
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default());
    let path = decoded(path).trim_start_matches(['/', '.']).to_owned();
    let mut length = 0;
    loop {
        let mut field = String::new();
        if reader.read_line(&mut field)? == 0 || field.trim().is_empty() {
            break;
        }
        let field = field.to_ascii_lowercase();
        if let Some(n) = field.strip_prefix("content-length:") {
            length = n.trim().parse().unwrap_or(0);
        }
        if field.starts_with("expect:") {
            out.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
    }
    let head = |status: &str, len: usize| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n").into_bytes()
    };
    if method == "PUT" {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        out.write_all(&head("201 Created", 0))?;
        put(body);
        return Ok(());
    }
    let (path, gated) = path.strip_prefix("gated/").map_or((path.as_str(), false), |p| (p, true));
    let found = folders.iter().find_map(|f| std::fs::read(f.join(path)).ok());
    match found {
        Some(data) => {
            out.write_all(&head("200 OK", data.len()))?;
            let half = if gated { data.len() / 2 } else { data.len() };
            out.write_all(&data[..half])?;
            if gated {
                wait();
            }
            out.write_all(&data[half..])
        }
        None => out.write_all(&head("404 Not Found", 0)),
    }
}

/// A path without percent signs (RFC 3986 section 2.1).
fn decoded(path: &str) -> String {
    let mut out = Vec::new();
    let mut rest = path.bytes();
    while let Some(b) = rest.next() {
        let hex = (b == b'%')
            .then(|| [rest.next(), rest.next()].map(|d| char::from(d.unwrap_or(b'0')).to_digit(16)));
        match hex {
            Some([Some(high), Some(low)]) => out.push((high * 16 + low) as u8),
            _ => out.push(b),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A server that waits until `count` clients are there at once, and only then gives each its line back.
pub fn crowd(count: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        let clients: Vec<TcpStream> = listener.incoming().take(count).map_while(Result::ok).collect();
        for mut client in clients {
            let mut line = String::new();
            let mut reader = BufReader::new(client.try_clone().expect("a descriptor"));
            let _ = reader.read_line(&mut line);
            let _ = client.write_all(line.as_bytes());
        }
    });
    at
}

/// A server that reads to the end before it answers with the number of bytes.
pub fn after_the_end() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let mut all = Vec::new();
            let _ = client.read_to_end(&mut all);
            let _ = client.write_all(format!("{} bytes\n", all.len()).as_bytes());
        }
    });
    at
}

/// A name server, by UDP and TCP at the same port: `nNUMBER.test` has the IPv4 address that is the number.
pub fn names() -> SocketAddr {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let at = udp.local_addr().expect("its address");
        // The port may be another's by TCP.
        let Ok(tcp) = TcpListener::bind(at) else { continue };
        std::thread::spawn(move || {
            let mut query = [0; 1500];
            while let Ok((n, peer)) = udp.recv_from(&mut query) {
                if let Some(answer) = answer(&query[..n]) {
                    let _ = udp.send_to(&answer, peer);
                }
            }
        });
        std::thread::spawn(move || {
            for mut client in tcp.incoming().map_while(Result::ok) {
                let mut len = [0; 2];
                let _ = client.read_exact(&mut len);
                let mut query = vec![0; usize::from(u16::from_be_bytes(len))];
                let _ = client.read_exact(&mut query);
                if let Some(answer) = answer(&query) {
                    let _ = client.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat());
                }
            }
        });
        return at;
    }
}

/// RFC 1035 section 4.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut labels = Vec::new();
    while *query.get(at)? != 0 {
        let len = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + len)?).into_owned());
        at += 1 + len;
    }
    let question = query.get(12..at + 5)?;
    let is_address = question[question.len() - 4..] == [0, 1, 0, 1];
    let number: Option<u32> = match labels.as_slice() {
        [n, test] if test == "test" => n.strip_prefix('n').and_then(|n| n.parse().ok()),
        _ => None,
    };
    let (code, count) = match number {
        None => (3, 0),
        Some(_) if is_address => (0, 1),
        Some(_) => (0, 0),
    };
    let mut m = query[..2].to_vec();
    m.extend_from_slice(&[0x81, 0x80 | code, 0, 1, 0, count, 0, 0, 0, 0]);
    m.extend_from_slice(question);
    if let Some(n) = number.filter(|_| is_address) {
        m.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
        m.extend_from_slice(&n.to_be_bytes());
    }
    Some(m)
}

/// A UDP port of the host's that is free at the moment.
pub fn free_udp_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").and_then(|s| s.local_addr()).expect("a port").port()
}

/// A port of the host's that is free at the moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}
