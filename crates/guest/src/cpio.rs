//! Writes cpio archives in the "newc" format (magic 070701), which the Linux kernel takes as initramfs
//! (Linux Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

/// Longest name that the kernel takes (PATH_MAX, with the closing NUL).
const MAX_NAME: usize = 4096;

/// A newc archive in the making. Everything in it belongs to root and carries time 0, so equal input gives equal bytes.
#[derive(Debug)]
pub struct CpioWriter<W> {
    out: W,
    offset: u64,
    inode: u32,
}

impl<W: Write> CpioWriter<W> {
    /// An empty archive that goes to `out`.
    pub fn new(out: W) -> Self {
        Self { out, offset: 0, inode: 0 }
    }

    /// Add a folder; its parent must have been added before. `mode` is the permission bits.
    ///
    /// # Errors
    /// When `out` fails, or the name is too long.
    pub fn dir(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, 0o040_000 | (mode & 0o7777), (0, 0), &[])
    }

    /// Add a regular file.
    ///
    /// # Errors
    /// When `out` fails, the name is too long, or the data is 4 GiB or more.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, 0o100_000 | (mode & 0o7777), (0, 0), data)
    }

    /// Add a symbolic link to `target`.
    ///
    /// # Errors
    /// As [`CpioWriter::file`].
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, 0o120_777, (0, 0), target.as_bytes())
    }

    /// Add a character device node.
    ///
    /// # Errors
    /// As [`CpioWriter::file`].
    pub fn char_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, 0o020_000 | (mode & 0o7777), (major, minor), &[])
    }

    /// Write the trailer and hand `out` back.
    ///
    /// # Errors
    /// When `out` fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, rdev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let name = name.trim_start_matches('/');
        if name.is_empty() || name.len() >= MAX_NAME || name.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("unusable file name {name:?}")));
        }
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too large")))?;
        self.inode += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // Fields: inode, mode, uid, gid, links, time, size, device (major, minor), rdev (major, minor), name length, checksum.
        let name_len = name.len() as u32 + 1;
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, rdev.0, rdev.1, name_len, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, data: &[u8]) -> io::Result<()> {
        self.out.write_all(data)?;
        self.offset += data.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = (4 - self.offset % 4) % 4;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut w = CpioWriter::new(Vec::new());
        w.dir("bin", 0o755).expect("dir");
        w.file("bin/tool", 0o755, b"12345").expect("file");
        w.file("/empty", 0o600, b"").expect("file");
        w.symlink("bin/sh", "tool").expect("symlink");
        w.char_device("console", 0o600, 5, 1).expect("device");
        w.finish().expect("finish")
    }

    #[test]
    fn headers_and_padding_are_as_specified() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // The second header starts at the next multiple of 4 after 110 bytes of header and "bin\0".
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[116 + 54..116 + 62], b"00000005", "size of bin/tool");
        let tail = String::from_utf8_lossy(&bytes[bytes.len() - 20..]).into_owned();
        assert!(tail.contains("TRAILER!!!"));
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        let mut w = CpioWriter::new(Vec::new());
        assert!(w.file("", 0o644, b"").is_err());
        assert!(w.file("a\0b", 0o644, b"").is_err());
        assert!(w.file(&"x".repeat(MAX_NAME), 0o644, b"").is_err());
        assert!(w.file(&"x".repeat(MAX_NAME - 1), 0o644, b"").is_ok());
    }

    #[test]
    fn cpio_reads_what_we_write() {
        let Ok(mut child) = Command::new("cpio")
            .args(["-t", "-v", "--numeric-uid-gid", "--quiet"])
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        else {
            panic!("this test needs cpio (Debian package cpio)");
        };
        child.stdin.take().expect("stdin").write_all(&sample()).expect("write");
        let out = child.wait_with_output().expect("cpio");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" bin"));
        assert!(
            lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 5 Jan  1  1970 bin/tool"),
            "{text}"
        );
        assert!(lines[2].starts_with("-rw-------") && lines[2].ends_with(" empty"));
        assert!(lines[3].starts_with("lrwxrwxrwx") && lines[3].ends_with("bin/sh -> tool"));
        assert!(lines[4].starts_with("crw-------") && lines[4].contains("5,   1"), "{text}");
    }
}
