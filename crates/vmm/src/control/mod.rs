//! The control socket: programs ask the machine for things, in the words of QEMU's machine protocol (QMP,
//! QEMU docs/interop/qmp-spec.rst), so that clients of that carry over. `query-commands` lists what there is.
//!
//! A thread takes one client after the other and hands each command to the main loop, where the machine is. Answers and
//! events go out in the order in which the main loop gives them, by a thread of the client's own.

pub(crate) mod command;
pub(crate) mod events;

pub use command::Command;

use ringfort_bus::lock;
use serde_json::{Value, json};
use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most bytes of one command.
const MAX_COMMAND: u64 = 64 << 10;
/// How long a client may take to take an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of the process waits for it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Most answers and events that wait for a client, beside what its socket holds.
const QUEUED: usize = 256;

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
    id: Option<Value>,
    outlet: Arc<Outlet>,
    written: Sender<()>,
}

impl Request {
    /// Answer it. What the client is told from now on comes behind the answer.
    pub fn answer(&self, answer: Answer) {
        self.outlet.reply(answer, self.id.clone(), self.written.clone());
    }
}

/// The socket. Dropping it removes its file.
pub struct Server {
    path: PathBuf,
    listener: Listener,
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
        let socket = UnixListener::bind(path).map_err(named)?;
        let listener = Listener::default();
        let server = Server { path: path.into(), listener: listener.clone() };
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(named)?;
        std::thread::Builder::new().name("control".into()).spawn(move || {
            while let Ok((client, _)) = socket.accept() {
                // A client that leaves or talks nonsense loses its connection; the next one may come.
                let _ = serve(&client, &listener, &post);
                listener.set(None);
                // Also for who still holds its outlet.
                let _ = client.shutdown(Shutdown::Both);
            }
        })?;
        Ok(server)
    }

    /// Tell the client, if there is one, that something has happened.
    pub fn event(&self, name: &str, data: Value) {
        if let Some(outlet) = self.listener.get() {
            outlet.say(&event(name, data), None);
        }
    }

    /// Wait, not for long, until the client has been told everything: the process is about to end.
    pub fn flush(&self) {
        let (written, done) = channel();
        if let Some(outlet) = self.listener.get() {
            outlet.queue(String::new(), Some(written));
            // A client that does not listen, or is gone, is not waited for.
            let _ = done.recv_timeout(LAST_WORDS);
        }
    }
}

/// Who hears of events: the client that has negotiated.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Option<Arc<Outlet>>>>);

impl Listener {
    fn set(&self, outlet: Option<Arc<Outlet>>) {
        *lock(&self.0) = outlet;
    }

    fn get(&self) -> Option<Arc<Outlet>> {
        lock(&self.0).clone()
    }
}

/// What goes to the client, and who is told when it has gone.
type Message = (String, Option<Sender<()>>);

/// What a client is told, in order. Nobody waits for the client here: one that does not listen is hung up on.
struct Outlet {
    queue: SyncSender<Message>,
    stream: UnixStream,
}

impl Outlet {
    /// An outlet for a client, whose thread ends with it.
    fn new(stream: &UnixStream) -> io::Result<Outlet> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let (queue, messages) = sync_channel::<Message>(QUEUED);
        let mut out = stream.try_clone()?;
        std::thread::Builder::new().name("control out".into()).spawn(move || {
            for (text, written) in messages {
                if out.write_all(text.as_bytes()).is_err() {
                    // It may be gone already.
                    let _ = out.shutdown(Shutdown::Both);
                    return;
                }
                if let Some(w) = written {
                    // Seldom does nobody wait for it.
                    let _ = w.send(());
                }
            }
        })?;
        Ok(Outlet { queue, stream: stream.try_clone()? })
    }

    fn queue(&self, text: String, written: Option<Sender<()>>) {
        if self.queue.try_send((text, written)).is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    fn say(&self, value: &Value, written: Option<Sender<()>>) {
        self.queue(format!("{value}\r\n"), written);
    }

    fn reply(&self, answer: Answer, id: Option<Value>, written: Sender<()>) {
        let mut reply = match answer {
            Ok(value) => json!({ "return": value }),
            Err(refusal) => refusal.value(),
        };
        if let (Some(id), Some(object)) = (id, reply.as_object_mut()) {
            object.insert("id".into(), id);
        }
        self.say(&reply, Some(written));
    }
}

/// Counts what is read, up to a limit that is set again for each command.
struct Limited<'a> {
    stream: &'a UnixStream,
    left: &'a Cell<u64>,
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

fn serve(client: &UnixStream, listener: &Listener, post: &impl Fn(Request)) -> io::Result<()> {
    let outlet = Arc::new(Outlet::new(client)?);
    outlet.say(&json!({ "QMP": { "version": version(), "capabilities": [] } }), None);
    let left = Cell::new(MAX_COMMAND);
    let values = serde_json::Deserializer::from_reader(Limited { stream: client, left: &left });
    let mut negotiated = false;
    for value in values.into_iter::<Value>() {
        left.set(MAX_COMMAND);
        let (written, done) = channel();
        let value = match value {
            Ok(v) => v,
            Err(e) if e.is_eof() => return Ok(()),
            Err(e) => {
                outlet.reply(Err(Refusal::new(format!("no JSON: {e}"))), None, written);
                // Gone or not, it is hung up on.
                let _ = done.recv();
                return Ok(());
            }
        };
        let id = value.get("id").cloned();
        match Command::read(&value, &mut negotiated) {
            Ok(Some(command)) => post(Request { command, id, outlet: outlet.clone(), written }),
            Ok(None) => {
                outlet.reply(Ok(json!({})), id, written);
                listener.set(Some(outlet.clone()));
            }
            Err(refusal) => outlet.reply(Err(refusal), id, written),
        }
        // The next command is read when this one's answer is written, so that a client cannot make work pile up.
        if done.recv().is_err() {
            // The machine is gone, or the client.
            return Ok(());
        }
    }
    Ok(())
}

/// An event in QMP's form.
fn event(name: &str, data: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "event": name,
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
    });
    if let (false, Some(object)) = (data.is_null(), event.as_object_mut()) {
        object.insert("data".into(), data);
    }
    event
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

    #[test]
    fn events_come_between_answers_in_the_order_of_what_happens() {
        let path = std::env::temp_dir().join(format!("ringfort-events-{}.sock", std::process::id()));
        let (asked, requests) = channel();
        let server = Server::start(&path, move |request| {
            // The test may have ended.
            let _ = asked.send(request);
        })
        .expect("a socket");
        let mut c = Client(io::BufReader::new(UnixStream::connect(&path).expect("connects")));
        assert!(c.line()["QMP"].is_object());
        // Nobody hears of anything before it has negotiated.
        server.event("STOP", Value::Null);
        c.send("{\"execute\":\"qmp_capabilities\"}");
        assert_eq!(c.line(), json!({ "return": {} }));
        c.send("{\"execute\":\"cont\",\"id\":1}");
        let request = requests.recv().expect("is asked");
        assert_eq!(request.command, Command::Continue);
        server.event("RESUME", Value::Null);
        request.answer(Ok(json!({})));
        server.event("RESET", json!({ "guest": true }));
        let resumed = c.line();
        assert_eq!((&resumed["event"], resumed.get("data")), (&json!("RESUME"), None));
        assert!(resumed["timestamp"]["seconds"].as_u64() > Some(1_600_000_000));
        assert_eq!(c.line(), json!({ "return": {}, "id": 1 }));
        let reset = c.line();
        assert_eq!((&reset["event"], &reset["data"]), (&json!("RESET"), &json!({ "guest": true })));
        // Who is not answered any more, and who does not listen, is hung up on; the machine waits for neither.
        c.send("{\"execute\":\"stop\"}");
        drop(requests.recv().expect("is asked"));
        assert_eq!(c.line(), Value::Null);
        let mut c = Client(io::BufReader::new(UnixStream::connect(&path).expect("connects")));
        c.line();
        c.send("{\"execute\":\"qmp_capabilities\"}");
        assert_eq!(c.line(), json!({ "return": {} }));
        // It is known as a listener only after it has been answered.
        while server.listener.get().is_none() {
            std::thread::yield_now();
        }
        let long = "x".repeat(10_000);
        while server.listener.get().is_some() {
            server.event("RESET", json!({ "long": long }));
        }
        // What had reached it already it can still read; then it is told that this is all.
        let mut rest = Vec::new();
        assert!(c.0.read_to_end(&mut rest).is_ok_and(|n| n < 1000 * long.len()));
        server.flush();
    }
}
