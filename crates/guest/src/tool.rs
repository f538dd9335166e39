//! Running the programs that the build is made of.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io::BufReader,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{GuestError, Progress};

/// Lines of output that are kept for an error message.
const TAIL: usize = 40;
/// Longest line that is looked at, in bytes.
const MAX_LINE: usize = 4096;

/// Where `program` is: in `PATH`, or in the folders for administration that a user's `PATH` often lacks.
pub(crate) fn find(program: &'static str, package: &'static str) -> Result<PathBuf, GuestError> {
    search_path()
        .into_iter()
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
        .ok_or(GuestError::MissingTool { program, package })
}

fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .filter(|dir| dir.is_absolute())
        .collect()
}

/// The environment of every program: messages in English, for [`summary`]; no questions; the programs that they run in
/// turn are found where ours are.
fn environment(command: &mut Command) {
    command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    if let Ok(path) = std::env::join_paths(search_path()) {
        command.env("PATH", path);
    }
}

fn is_executable(file: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Run to the end, showing each line of either stream as progress.
pub(crate) fn run(mut command: Command, progress: &mut dyn Progress) -> Result<(), GuestError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let fail = |e: std::io::Error| GuestError::Tool {
        program: name.clone(),
        status: "not started".into(),
        tail: e.to_string(),
    };
    let (reader, writer) = std::io::pipe().map_err(fail)?;
    environment(&mut command);
    command.stdout(writer.try_clone().map_err(fail)?).stderr(writer);
    let mut child = command.spawn().map_err(fail)?;
    // The command still owns the writing ends; without them here, the reader sees the end of the output.
    drop(command);
    let mut tail: VecDeque<String> = VecDeque::new();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match std::io::Read::take(&mut reader, MAX_LINE as u64).read_until_line(&mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text: String = text.trim().chars().filter(|c| !c.is_control()).collect();
                if text.is_empty() {
                    continue;
                }
                progress.detail(&text);
                if tail.len() == TAIL {
                    tail.pop_front();
                }
                tail.push_back(text);
            }
        }
    }
    let status = child.wait().map_err(fail)?;
    if status.success() {
        return Ok(());
    }
    Err(GuestError::Tool { program: name, status: status.to_string(), tail: summary(&tail) })
}

/// Run to the end and return standard output.
pub(crate) fn output<S: AsRef<OsStr>>(program: &PathBuf, args: &[S]) -> Result<String, GuestError> {
    let name = program.to_string_lossy().into_owned();
    let mut command = Command::new(program);
    environment(&mut command);
    let out = command.args(args).output().map_err(|e| GuestError::Tool {
        program: name.clone(),
        status: "not started".into(),
        tail: e.to_string(),
    })?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let tail: VecDeque<String> =
        String::from_utf8_lossy(&out.stderr).lines().map(|l| l.trim().to_owned()).collect();
    Err(GuestError::Tool { program: name, status: out.status.to_string(), tail: summary(&tail) })
}

/// The lines that tell most: those marked as errors, else the last ones.
fn summary(tail: &VecDeque<String>) -> String {
    let errors: Vec<&str> = tail
        .iter()
        .filter(|l| l.starts_with("E:") || l.starts_with("Err:") || l.contains("error:"))
        .map(String::as_str)
        .collect();
    let picked = if errors.is_empty() {
        tail.iter().rev().take(2).rev().map(String::as_str).collect()
    } else {
        errors.into_iter().take(3).collect::<Vec<_>>()
    };
    if picked.is_empty() { "it said nothing".to_owned() } else { picked.join("; ") }
}

/// Reads to a line feed or a carriage return, for programs that redraw their line.
trait ReadUntilLine {
    fn read_until_line(&mut self, line: &mut Vec<u8>) -> std::io::Result<usize>;
}

impl<R: std::io::BufRead> ReadUntilLine for R {
    fn read_until_line(&mut self, line: &mut Vec<u8>) -> std::io::Result<usize> {
        let mut total = 0;
        loop {
            let chunk = match self.fill_buf() {
                Ok(chunk) => chunk,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let end = chunk.iter().position(|b| matches!(b, b'\n' | b'\r'));
            let used = end.map_or(chunk.len(), |at| at + 1);
            line.extend_from_slice(&chunk[..used]);
            self.consume(used);
            total += used;
            if end.is_some() || used == 0 {
                return Ok(total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lines(Vec<String>);
    impl Progress for Lines {
        fn step(&mut self, _: usize, _: usize, _: &str) {}
        fn detail(&mut self, line: &str) {
            self.0.push(line.to_owned());
        }
    }

    fn sh(script: &str) -> (Result<(), GuestError>, Vec<String>) {
        let mut lines = Lines(Vec::new());
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        (run(command, &mut lines), lines.0)
    }

    #[test]
    fn both_streams_are_shown_line_by_line() {
        let (r, lines) = sh("echo one; echo two >&2; printf 'three\\rfour'");
        assert!(r.is_ok());
        assert_eq!(lines, ["one", "two", "three", "four"]);
    }

    #[test]
    fn a_failure_carries_the_errors_on_one_line() {
        let (r, _) = sh("echo noise; echo 'E: no such package'; echo more; exit 7");
        let text = r.expect_err("failed").to_string();
        assert!(text.contains("exit status: 7") && text.contains("E: no such package"), "{text}");
        assert!(!text.contains("noise") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn endless_lines_do_not_grow_without_bound() {
        let (r, lines) = sh("head -c 100000 /dev/zero | tr '\\0' x");
        assert!(r.is_ok());
        assert!(lines.iter().all(|l| l.len() <= MAX_LINE));
        assert_eq!(lines.iter().map(String::len).sum::<usize>(), 100_000);
    }

    #[test]
    fn what_is_not_there_is_named_with_its_package() {
        let e = find("no-such-program-here", "some-package").expect_err("absent").to_string();
        assert!(e.contains("no-such-program-here") && e.contains("some-package") && e.contains("--kernel"));
        assert!(find("sh", "dash").is_ok());
    }
}
