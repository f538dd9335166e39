//! Name servers that do not answer, and files by TFTP.

use super::*;

fn udp_socket(g: &mut Guest, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 128], vec![0; 256 << 10]);
    let mut s = udp::Socket::new(buffer(), buffer());
    s.bind(port).expect("bind");
    g.sockets.add(s)
}

/// The next datagram, and its port there.
fn take(g: &mut Guest, h: SocketHandle) -> (Vec<u8>, u16) {
    g.run(|g| {
        let (data, from) = g.sockets.get_mut::<udp::Socket<'_>>(h).recv().ok()?;
        Some((data.to_vec(), from.endpoint.port))
    })
}

fn give(g: &mut Guest, h: SocketHandle, to: (IpAddress, u16), data: &[u8]) {
    g.sockets.get_mut::<udp::Socket<'_>>(h).send_slice(data, to).expect("send");
    g.poll();
}

#[test]
fn the_next_name_server_is_asked_when_one_is_silent_or_refuses() {
    let silent = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let refusing = UdpSocket::bind("127.0.0.1:0").expect("socket").local_addr().expect("address");
    let good = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let servers = [silent.local_addr().expect("address"), refusing, good.local_addr().expect("address")];
    std::thread::spawn(move || {
        let mut b = [0; 512];
        while let Ok((n, peer)) = good.recv_from(&mut b) {
            let _ = good.send_to(&[b"re:", &b[..n]].concat(), peer);
        }
    });
    let mut g = Guest::new(UserConfig::default());
    lock(&g.inner().stack).common.resolver = Resolver::new(&servers);
    let h = udp_socket(&mut g, 5353);
    let dns = (IpAddress::v4(10, 0, 2, 3), 53);
    give(&mut g, h, dns, b"one");
    // Asked once, the guest need not ask again.
    assert_eq!(take(&mut g, h), (b"re:one".to_vec(), 53));
    let mut b = [0; 16];
    assert_eq!(silent.recv(&mut b).map(|n| b[..n].to_vec()).expect("the question"), b"one");
    // Others profit at once.
    let other = udp_socket(&mut g, 5454);
    give(&mut g, other, dns, b"two");
    assert_eq!(take(&mut g, other), (b"re:two".to_vec(), 53));
}

struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn files_of_a_folder_are_served_and_no_others() {
    let root = Folder(std::env::temp_dir().join(format!("ringfort-tftp-{}", std::process::id())));
    let file = pattern(100_000);
    std::fs::create_dir_all(root.0.join("pub/sub")).expect("folders");
    std::fs::write(root.0.join("pub/sub/kernel"), &file).expect("file");
    std::fs::write(root.0.join("pub/even"), &file[..1024]).expect("file");
    std::fs::write(root.0.join("pub/text"), b"a\nb\rc\n\0").expect("file");
    std::fs::write(root.0.join("secret"), b"x").expect("file");
    std::os::unix::fs::symlink("../secret", root.0.join("pub/link")).expect("link");
    std::os::unix::fs::symlink("sub/kernel", root.0.join("pub/inner")).expect("link");
    let tftp = Some(root.0.join("pub"));
    let mut g = Guest::new(UserConfig { tftp, restrict: true, ..UserConfig::default() });
    let h = udp_socket(&mut g, 3000);

    // Plainly: blocks of 512 bytes, each acknowledged; the last one is empty.
    give(&mut g, h, (GATEWAY, 69), b"\0\x01/even\0octet\0");
    let mut got = Vec::new();
    for n in 1..=3u8 {
        let (m, port) = take(&mut g, h);
        assert_eq!(m[..4], [0, 3, 0, n]);
        got.extend_from_slice(&m[4..]);
        give(&mut g, h, (GATEWAY, port), &[0, 4, 0, n]);
    }
    assert_eq!(got, file[..1024]);

    // With options: large blocks, several at a time, the size told. A lost acknowledgement is made up for.
    give(&mut g, h, (GATEWAY, 69), b"\0\x01inner\0OCTET\0blksize\x001400\0tsize\x000\0windowsize\x008\0");
    let (m, port) = take(&mut g, h);
    assert_eq!(m, b"\0\x06blksize\x001400\0tsize\x00100000\0windowsize\x008\0");
    give(&mut g, h, (GATEWAY, port), &[0, 4, 0, 0]);
    let mut got = Vec::new();
    let mut lost = false;
    for n in 1u16.. {
        let (m, _) = take(&mut g, h);
        assert_eq!(m[..4], [0, 3, 0, n as u8]);
        got.extend_from_slice(&m[4..]);
        let last = m.len() < 1404;
        if last || n.is_multiple_of(8) {
            if !std::mem::replace(&mut lost, true) {
                // The same blocks come again.
                for k in 1..=8 {
                    assert_eq!(take(&mut g, h).0[..4], [0, 3, 0, k]);
                }
            }
            give(&mut g, h, (GATEWAY, port), &[0, 4, 0, n as u8]);
        }
        if last {
            break;
        }
    }
    assert!(got == file);

    // As text, with the network's ends of lines.
    give(&mut g, h, (GATEWAY, 69), b"\0\x01text\0netascii\0tsize\x000\0timeout\x003\0");
    let (m, port) = take(&mut g, h);
    assert_eq!(m, b"\0\x06tsize\x0010\0timeout\x003\0");
    give(&mut g, h, (GATEWAY, port), &[0, 4, 0, 0]);
    let (m, port) = take(&mut g, h);
    assert_eq!(m, b"\0\x03\0\x01a\r\nb\r\0c\r\n\0");
    give(&mut g, h, (GATEWAY, port), &[0, 4, 0, 1]);

    for (request, code) in [
        (&b"\0\x01missing\0octet\0"[..], 1),
        (b"\0\x01../secret\0octet\0", 2),
        (b"\0\x01link\0octet\0", 2),
        (b"\0\x01sub\0octet\0", 2),
        (b"\0\x01/sub/../../secret\0octet\0", 2),
        (b"\0\x02even\0octet\0", 2),
        (b"\0\x01even\0mail\0", 4),
        (b"\0\x01even\0octet\0blksize\x001\0", 8),
        (b"\0\x09even\0octet\0", 4),
    ] {
        give(&mut g, h, (GATEWAY, 69), request);
        let (m, _) = take(&mut g, h);
        assert_eq!(m[..4], [0, 5, 0, code], "{}", String::from_utf8_lossy(request));
    }
}
