//! Looking into a section's body without the part of the machine that it belongs to.
//!
//! Bodies do not describe themselves, so whoever owns a layout gives it out as a [`Format`]: a body is decoded as on loading, and what came
//! out is written as JSON. Runs of bytes become a string of hexadecimal digits.

use crate::{Section, StateError};
use serde::{Serialize, Serializer, de::DeserializeOwned, ser};
use serde_json::{Map, Value};

/// The layout of the bodies of one kind of section.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// Which kind.
    pub kind: &'static str,
    newest: u32,
    describe: fn(&Section, &'static str, u32) -> Result<Value, StateError>,
}

impl Format {
    /// Bodies of `kind` in versions up to `newest` are decoded as `T`.
    pub const fn of<T: Serialize + DeserializeOwned>(kind: &'static str, newest: u32) -> Format {
        Format {
            kind,
            newest,
            describe: |section, kind, newest| {
                let value: T = section.decode(kind, newest)?;
                value.serialize(ToJson).map_err(|e| section.invalid(e.0))
            },
        }
    }

    /// The fields of a body as JSON.
    ///
    /// # Errors
    /// As [`Section::decode`].
    pub fn describe(&self, section: &Section) -> Result<Value, StateError> {
        (self.describe)(section, self.kind, self.newest)
    }
}

/// What cannot be written as JSON.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoJson(String);

impl ser::Error for NoJson {
    fn custom<T: std::fmt::Display>(why: T) -> NoJson {
        NoJson(why.to_string())
    }
}

struct ToJson;

/// Elements of a list, told apart by whether all were bytes.
#[derive(Default)]
struct List {
    values: Vec<Value>,
    bytes: Vec<u8>,
    /// An enumeration's variant that the list is in.
    variant: Option<&'static str>,
    tuple: bool,
}

impl List {
    fn push<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NoJson> {
        // A byte says so itself; all other elements make a list of values.
        match value.serialize(OneByte) {
            Ok(b) if self.values.is_empty() => self.bytes.push(b),
            _ => {
                self.values.extend(self.bytes.drain(..).map(Value::from));
                self.values.push(value.serialize(ToJson)?);
            }
        }
        Ok(())
    }

    fn finish(self) -> Value {
        let list =
            if self.values.is_empty() && !self.bytes.is_empty() && !(self.tuple && self.bytes.len() < 4) {
                hex(&self.bytes)
            } else {
                let bytes = self.bytes.into_iter().map(Value::from);
                Value::Array(bytes.chain(self.values).collect())
            };
        match self.variant {
            Some(name) => Value::Object(Map::from_iter([(name.to_owned(), list)])),
            None => list,
        }
    }
}

fn hex(bytes: &[u8]) -> Value {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<String>().into()
}

/// Named fields.
#[derive(Default)]
struct Fields {
    map: Map<String, Value>,
    variant: Option<&'static str>,
    key: Option<String>,
}

impl Fields {
    fn put<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), NoJson> {
        self.map.insert(name.replace('_', "-"), value.serialize(ToJson)?);
        Ok(())
    }

    fn finish(self) -> Value {
        match self.variant {
            Some(name) => Value::Object(Map::from_iter([(name.to_owned(), Value::Object(self.map))])),
            None => Value::Object(self.map),
        }
    }
}

macro_rules! plain {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(self, v: $type) -> Result<Value, NoJson> {
            Ok(v.into())
        })*
    };
}

impl Serializer for ToJson {
    type Ok = Value;
    type Error = NoJson;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = List;
    type SerializeMap = Fields;
    type SerializeStruct = Fields;
    type SerializeStructVariant = Fields;

    plain!(serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_f32: f32,
        serialize_f64: f64, serialize_str: &str);

    // JSON's numbers end at 64 bits here.
    fn serialize_i128(self, v: i128) -> Result<Value, NoJson> {
        Ok(i64::try_from(v).map_or_else(|_| v.to_string().into(), Value::from))
    }
    fn serialize_u128(self, v: u128) -> Result<Value, NoJson> {
        Ok(u64::try_from(v).map_or_else(|_| v.to_string().into(), Value::from))
    }
    fn serialize_char(self, v: char) -> Result<Value, NoJson> {
        Ok(v.to_string().into())
    }
    fn serialize_bytes(self, v: &[u8]) -> Result<Value, NoJson> {
        Ok(hex(v))
    }
    fn serialize_none(self) -> Result<Value, NoJson> {
        Ok(Value::Null)
    }
    fn serialize_some<T: Serialize + ?Sized>(self, v: &T) -> Result<Value, NoJson> {
        v.serialize(ToJson)
    }
    fn serialize_unit(self) -> Result<Value, NoJson> {
        Ok(Value::Null)
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<Value, NoJson> {
        Ok(Value::Null)
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<Value, NoJson> {
        Ok(variant.into())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        v: &T,
    ) -> Result<Value, NoJson> {
        v.serialize(ToJson)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        v: &T,
    ) -> Result<Value, NoJson> {
        Ok(Value::Object(Map::from_iter([(variant.to_owned(), v.serialize(ToJson)?)])))
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<List, NoJson> {
        Ok(List::default())
    }
    fn serialize_tuple(self, _: usize) -> Result<List, NoJson> {
        Ok(List { tuple: true, ..List::default() })
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<List, NoJson> {
        Ok(List { tuple: true, ..List::default() })
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<List, NoJson> {
        Ok(List { variant: Some(variant), tuple: true, ..List::default() })
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Fields, NoJson> {
        Ok(Fields::default())
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Fields, NoJson> {
        Ok(Fields::default())
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Fields, NoJson> {
        Ok(Fields { variant: Some(variant), ..Fields::default() })
    }
}

macro_rules! list {
    ($($of:ident: $method:ident),*) => {
        $(impl ser::$of for List {
            type Ok = Value;
            type Error = NoJson;
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NoJson> {
                self.push(value)
            }
            fn end(self) -> Result<Value, NoJson> {
                Ok(self.finish())
            }
        })*
    };
}
list!(SerializeSeq: serialize_element, SerializeTuple: serialize_element, SerializeTupleStruct: serialize_field,
    SerializeTupleVariant: serialize_field);

macro_rules! fields {
    ($($of:ident),*) => {
        $(impl ser::$of for Fields {
            type Ok = Value;
            type Error = NoJson;
            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), NoJson> {
                self.put(name, value)
            }
            fn end(self) -> Result<Value, NoJson> {
                Ok(self.finish())
            }
        })*
    };
}
fields!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Fields {
    type Ok = Value;
    type Error = NoJson;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), NoJson> {
        self.key = Some(match key.serialize(ToJson)? {
            Value::String(s) => s,
            other => other.to_string(),
        });
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NoJson> {
        let key = self.key.take().ok_or_else(|| NoJson("a value without a key".into()))?;
        self.put(&key, value)
    }
    fn end(self) -> Result<Value, NoJson> {
        Ok(self.finish())
    }
}

/// Takes a byte and nothing else.
struct OneByte;

macro_rules! no_byte {
    ($($name:ident($($type:ty),*)),*) => {
        $(fn $name(self, $(_: $type),*) -> Result<u8, NoJson> {
            Err(not_a_byte())
        })*
    };
}

fn not_a_byte() -> NoJson {
    NoJson(String::new())
}

type Never = ser::Impossible<u8, NoJson>;

impl Serializer for OneByte {
    type Ok = u8;
    type Error = NoJson;
    type SerializeSeq = Never;
    type SerializeTuple = Never;
    type SerializeTupleStruct = Never;
    type SerializeTupleVariant = Never;
    type SerializeMap = Never;
    type SerializeStruct = Never;
    type SerializeStructVariant = Never;

    fn serialize_u8(self, v: u8) -> Result<u8, NoJson> {
        Ok(v)
    }

    no_byte!(
        serialize_bool(bool),
        serialize_i8(i8),
        serialize_i16(i16),
        serialize_i32(i32),
        serialize_i64(i64),
        serialize_u16(u16),
        serialize_u32(u32),
        serialize_u64(u64),
        serialize_f32(f32),
        serialize_f64(f64),
        serialize_char(char),
        serialize_str(&str),
        serialize_bytes(&[u8]),
        serialize_none(),
        serialize_unit(),
        serialize_unit_struct(&'static str),
        serialize_unit_variant(&'static str, u32, &'static str)
    );

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<u8, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, _: &T) -> Result<u8, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<u8, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_tuple(self, _: usize) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Never, NoJson> {
        Err(not_a_byte())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Serialize, Deserialize)]
    enum Mode {
        Idle,
        Counting { from_ns: u64 },
        Fixed(u16),
    }

    #[derive(Serialize, Deserialize)]
    struct State {
        line_high: bool,
        page: Vec<u8>,
        words: Vec<u16>,
        pair: (u8, u8),
        modes: [Mode; 3],
        held: Option<u32>,
        offsets: (i128, i128),
    }

    #[test]
    fn fields_have_names_and_bytes_are_hexadecimal() {
        let state = State {
            line_high: true,
            page: vec![0, 0x7f, 0xff],
            words: vec![0, 500],
            pair: (3, 4),
            modes: [Mode::Idle, Mode::Counting { from_ns: 1 << 40 }, Mode::Fixed(7)],
            held: None,
            offsets: (-5, 1 << 70),
        };
        let format = Format::of::<State>("timer", 2);
        let section = Section::new("timer", 0, 1, &state);
        let want = json!({
            "line-high": true,
            "page": "007fff",
            "words": [0, 500],
            "pair": [3, 4],
            "modes": ["Idle", { "Counting": { "from-ns": 1u64 << 40 } }, { "Fixed": 7 }],
            "held": null,
            "offsets": [-5, "1180591620717411303424"],
        });
        assert_eq!(format.describe(&section).unwrap(), want);
        let short = Section { body: section.body[..4].to_vec(), ..section.clone() };
        assert!(matches!(format.describe(&short), Err(StateError::Invalid { .. })));
        let new = Section { version: 3, ..section };
        assert!(matches!(format.describe(&new), Err(StateError::TooNew { .. })));
    }
}
