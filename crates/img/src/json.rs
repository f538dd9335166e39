//! JSON as qemu-img writes it.

use crate::Failure;
use serde_json::Value;
use std::io::Write;

/// Write a value, indented by four spaces.
pub fn write(out: &mut (dyn Write + Send), value: &Value) -> Result<(), Failure> {
    let mut text = Vec::new();
    let form = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut w = serde_json::Serializer::with_formatter(&mut text, form);
    serde::Serialize::serialize(value, &mut w).map_err(|e| Failure::new(e.to_string()))?;
    text.push(b'\n');
    out.write_all(&text)?;
    Ok(())
}
