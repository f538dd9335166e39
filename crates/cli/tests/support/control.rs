//! A client of the control socket.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A client that has negotiated.
pub struct Control {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Control {
    pub fn connect(at: &Path) -> Control {
        let stream = UnixStream::connect(at).expect("the control socket");
        stream.set_read_timeout(Some(super::PATIENCE)).expect("a socket");
        let mut c = Control { stream: BufReader::new(stream), events: VecDeque::new() };
        assert!(c.line()["QMP"].is_object());
        c.ask("qmp_capabilities", json!({}));
        c
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("something said");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    /// What is said to a command; events that come before are kept.
    pub fn say(&mut self, command: &str, arguments: Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.get_mut().write_all(text.as_bytes()).expect("is sent");
        loop {
            let said = self.line();
            if said.get("event").is_none() {
                return said;
            }
            self.events.push_back(said);
        }
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let said = self.say(command, arguments);
        said.get("return").unwrap_or_else(|| panic!("{command}: {said}")).clone()
    }

    /// The next event, which is to have this name: its data.
    pub fn event(&mut self, name: &str) -> Value {
        let e = self.events.pop_front().unwrap_or_else(|| self.line());
        assert_eq!(e["event"], name, "{e}");
        assert!(e["timestamp"]["microseconds"].as_u64().is_some_and(|n| n < 1_000_000), "{e}");
        e["data"].clone()
    }

    /// That nothing has happened of which the client was not told by [`event`](Self::event).
    pub fn nothing(&mut self) {
        self.ask("query-name", json!({}));
        assert!(self.events.is_empty(), "{:?}", self.events);
    }
}
