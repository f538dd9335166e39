//! The control socket: programs ask the machine for things, in the words of QEMU's machine protocol (QMP,
//! QEMU docs/interop/qmp-spec.rst), so that clients of that carry over. `query-commands` lists what there is.
//!
//! A thread takes one client after the other and hands each command to the main loop, where the machine is; it waits for
//! the answer before it reads on, so that a client cannot make work pile up.

mod command;

pub use command::Command;

use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

/// Most bytes of one command.
const MAX_COMMAND: u64 = 64 << 10;
/// How long a client may take to take an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a command was not done: QMP's class of the error, and words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    class: &'static str,
    what: String,
}

impl Refusal {
    /// The usual class.
    pub fn new(what: impl Into<String>) -> Refusal {
        Refusal { class: "GenericError", what: what.into() }
    }

    fn class(class: &'static str, what: impl Into<String>) -> Refusal {
        Refusal { class, what: what.into() }
    }

    fn value(&self) -> Value {
        json!({ "error": { "class": self.class, "desc": self.what } })
    }
}

/// What a command gives.
pub type Answer = Result<Value, Refusal>;

/// A command for the main loop.
pub struct Request {
    /// What is asked for.
    pub command: Command,
    answer: Sender<Answer>,
    written: Receiver<()>,
}

impl Request {
    /// Answer it.
    pub fn answer(&self, answer: Answer) {
        // A client that has gone does not want to know.
        let _ = self.answer.send(answer);
    }

    /// Answer it, and wait until the client has the answer: the process is about to end.
    pub fn last_answer(&self, answer: Answer) {
        self.answer(answer);
        // Longer than a client may take, or the client's thread has failed.
        let _ = self.written.recv_timeout(PATIENCE);
    }
}

/// The socket. Dropping it removes its file.
pub struct Server {
    path: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody can be helped if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Server {
    /// Listen at `path`, for this user alone, and post what is asked, from a thread that lasts as long as the process.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub fn start(path: &Path, post: impl Fn(Request) + Send + 'static) -> io::Result<Server> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        crate::chardev::remove_stale(path).map_err(named)?;
        let listener = UnixListener::bind(path).map_err(named)?;
        let server = Server { path: path.into() };
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(named)?;
        std::thread::Builder::new().name("control".into()).spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                // A client that leaves or talks nonsense loses its connection; the next one may come.
                let _ = serve(&client, &post);
            }
        })?;
        Ok(server)
    }
}

/// Counts what is read, up to a limit that is set again for each command.
struct Limited<'a> {
    stream: &'a UnixStream,
    left: &'a std::cell::Cell<u64>,
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::Error::other("the command is too long"));
        }
        // The parser takes byte by byte, so that it never waits for what follows a command.
        let n = self.stream.read(buffer)?;
        self.left.set(self.left.get().saturating_sub(n as u64));
        Ok(n)
    }
}

fn serve(client: &UnixStream, post: &impl Fn(Request)) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    say(client, &json!({ "QMP": { "version": version(), "capabilities": [] } }))?;
    let left = std::cell::Cell::new(MAX_COMMAND);
    let values = serde_json::Deserializer::from_reader(Limited { stream: client, left: &left });
    let mut negotiated = false;
    for value in values.into_iter::<Value>() {
        left.set(MAX_COMMAND);
        let value = match value {
            Ok(v) => v,
            Err(e) if e.is_eof() => return Ok(()),
            Err(e) => {
                say(client, &Refusal::new(format!("no JSON: {e}")).value())?;
                return Ok(());
            }
        };
        let id = value.get("id").cloned();
        let (reply, written) = match Command::read(&value, &mut negotiated) {
            Ok(None) => (Ok(json!({})), None),
            Ok(Some(command)) => {
                let (answer, answers) = channel();
                let (done, written): (SyncSender<()>, _) = sync_channel(1);
                post(Request { command, answer, written });
                match answers.recv() {
                    Ok(a) => (a, Some(done)),
                    // The machine is gone.
                    Err(_) => return Ok(()),
                }
            }
            Err(refusal) => (Err(refusal), None),
        };
        let mut reply = match reply {
            Ok(value) => json!({ "return": value }),
            Err(refusal) => refusal.value(),
        };
        if let (Some(id), Some(object)) = (id, reply.as_object_mut()) {
            object.insert("id".into(), id);
        }
        let said = say(client, &reply);
        if let Some(done) = written {
            // Seldom does somebody wait for it.
            let _ = done.try_send(());
        }
        said?;
    }
    Ok(())
}

fn say(mut client: &UnixStream, value: &Value) -> io::Result<()> {
    client.write_all(format!("{value}\r\n").as_bytes())
}

/// This program's version in QMP's form.
fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("Ringfort ", env!("CARGO_PKG_VERSION")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead as _;

    struct Client(io::BufReader<UnixStream>);

    impl Client {
        fn line(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("a line");
            serde_json::from_str(&line).unwrap_or(Value::Null)
        }

        fn send(&mut self, text: &str) {
            self.0.get_mut().write_all(text.as_bytes()).expect("is sent");
        }
    }

    #[test]
    fn a_client_negotiates_asks_and_is_refused() {
        let path = std::env::temp_dir().join(format!("ringfort-control-{}.sock", std::process::id()));
        let server = Server::start(&path, |request| match &request.command {
            Command::ResizeDisk { disk: 1, size: 4096 } => request.answer(Ok(json!({}))),
            other => request.answer(Err(Refusal::new(format!("{other:?}")))),
        })
        .expect("a socket");
        let connect = || Client(io::BufReader::new(UnixStream::connect(&path).expect("connects")));
        let mut c = connect();
        assert!(c.line()["QMP"]["version"]["package"].is_string());
        c.send("{\"execute\": \"query-status\", \"id\": [7]}");
        let said = c.line();
        assert_eq!((&said["error"]["class"], &said["id"][0]), (&json!("CommandNotFound"), &json!(7)));
        // Two in one packet, without a line's end.
        c.send("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"block_resize\",\"arguments\":{\"device\":\"virtio1\",");
        assert_eq!(c.line(), json!({ "return": {} }));
        c.send("\"size\":4096},\"id\":\"a\"}");
        assert_eq!(c.line(), json!({ "return": {}, "id": "a" }));
        for (command, says) in [
            ("{\"execute\":\"blockdev-add\"}", "blockdev-add"),
            ("{\"execute\":\"block_resize\"}", "device"),
            ("{\"execute\":\"block_resize\",\"arguments\":{\"device\":\"floppy0\",\"size\":1}}", "floppy0"),
            ("{\"execute\":\"block_resize\",\"arguments\":{\"device\":\"virtio0\",\"size\":-1}}", "size"),
            ("{\"execute\":\"cont\",\"arguments\":{\"x\":1}}", "'x'"),
            ("{\"execute\":5}", "execute"),
            ("[]", "execute"),
        ] {
            c.send(command);
            let said = c.line();
            assert!(said["error"]["desc"].as_str().is_some_and(|d| d.contains(says)), "{command}: {said}");
        }
        // Nonsense, and more than anybody may say: the next client is served all the same.
        c.send("}");
        assert!(c.line()["error"]["desc"].as_str().is_some_and(|d| d.contains("no JSON")));
        assert_eq!(c.line(), Value::Null);
        let mut c = connect();
        c.line();
        let long = format!("{{\"execute\":\"{}", "x".repeat(MAX_COMMAND as usize));
        // The other end may hang up in the middle of it.
        let _ = c.0.get_mut().write_all(long.as_bytes());
        let mut rest = Vec::new();
        let _ = c.0.read_to_end(&mut rest);
        assert!(rest.len() < 1000);
        assert!(connect().line()["QMP"].is_object());
        drop(server);
        assert!(!path.exists());
    }
}
