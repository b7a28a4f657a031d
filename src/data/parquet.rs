//! Parquet rows as records.
//!
//! Takes an open file, decodes the needed columns and returns its rows with nested lists and structs as JSON. UTF-8 bytes count as
//! text, since some writers leave strings unannotated. Panics of the library on malformed files become errors. Knows nothing of formats.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use chrono::DateTime;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{GroupTypeBuilder, Type};
use serde_json::{Map, Value};

use super::read::{Content, Location, NeededColumns, RawRecord, RawRecords};
use super::source::Source;
use crate::error::{Error, Kind, Result, catch_panic};

/// The rows of `source` in order.
pub(super) fn records(source: Source, columns: &NeededColumns) -> Result<RawRecords> {
    let file = source.name.clone();
    let refuse = |reason| damaged(&file, reason);
    let opened = catch_panic(|| SerializedFileReader::new(source.file));
    let reader = opened.map_err(refuse)?;
    let schema = reader.metadata().file_metadata().schema().clone();
    let count = reader.metadata().file_metadata().num_rows().max(1) as u64;
    let names: Vec<String> = schema
        .get_fields()
        .iter()
        .map(|field| field.name().to_string())
        .collect();
    let is_needed = |name: &String| columns.contains(name);
    let twice =
        (1..names.len()).find(|i| is_needed(&names[*i]) && names[..*i].contains(&names[*i]));
    if let Some(i) = twice {
        return Err(Error::new(
            Kind::Data,
            format!("the file has two columns `{}`", names[i]),
        )
        .at(file.as_ref())
        .hint("rename one of them"));
    }
    let projection = project(&schema, columns);
    let rows = catch_panic(|| RowIter::from_file_into(Box::new(reader)).project(Some(projection?)));
    Ok(Box::new(Rows {
        rows: rows.map_err(refuse)?,
        file,
        names,
        bytes_per_row: source.size / count,
        consumed: source.consumed,
        number: 0,
        ended: false,
    }))
}

/// The part of a schema that holds the needed columns.
fn project(schema: &Type, columns: &NeededColumns) -> Result<Type, ParquetError> {
    let needed = schema
        .get_fields()
        .iter()
        .filter(|field| columns.contains(field.name()));
    GroupTypeBuilder::new(schema.name())
        .with_fields(needed.cloned().collect())
        .build()
}

fn damaged(place: impl ToString, reason: String) -> Error {
    Error::new(
        Kind::Io,
        format!("not a Parquet file that can be read: {reason}"),
    )
    .at(place.to_string())
    .rule("compression none, snappy, gzip or zstd")
    .hint("write it again, as with pandas' `to_parquet(path, compression=\"zstd\")`")
}

/// The rows of a file. A page that cannot be decoded ends it: later rows cannot be located.
struct Rows {
    file: Arc<str>,
    rows: RowIter<'static>,
    /// Of all columns.
    names: Vec<String>,
    bytes_per_row: u64,
    consumed: Rc<Cell<u64>>,
    number: u64,
    ended: bool,
}

impl Iterator for Rows {
    type Item = Result<RawRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        self.number += 1;
        self.consumed.set(self.number * self.bytes_per_row);
        let place = Location::new(&self.file, "row", self.number);
        match catch_panic(|| self.rows.next().transpose()) {
            Ok(None) => None,
            Ok(Some(row)) => Some(self.record(place, &row)),
            Err(reason) => {
                self.ended = true;
                Some(Err(damaged(place, reason)))
            }
        }
    }
}

impl Rows {
    fn record(&self, place: Location, row: &Row) -> Result<RawRecord> {
        let decoded = object(row).map_err(|reason| {
            Error::new(Kind::Data, format!("a row cannot be read: {reason}"))
                .at(place.to_string())
                .hint("correct the row, or set `on_bad_record = \"skip\"`")
        });
        let mut decoded = decoded?;
        let fields = self.names.iter().map(|name| {
            let value = decoded.get_mut(name).map_or(Value::Null, Value::take);
            (name.clone(), value)
        });
        Ok(RawRecord {
            content: Content::Fields(fields.collect()),
            place,
        })
    }
}

fn object(row: &Row) -> Result<Map<String, Value>, String> {
    let fields = row.get_column_iter();
    fields
        .map(|(name, field)| match value(field) {
            Ok(value) => Ok((name.clone(), value)),
            Err(reason) => Err(format!("`{name}` {reason}")),
        })
        .collect()
}

fn value(field: &Field) -> Result<Value, String> {
    let in_calendar = match field {
        Field::Bytes(bytes) => {
            let text = String::from_utf8(bytes.data().to_vec());
            return text
                .map(Value::String)
                .map_err(|_| "holds bytes that are no text".into());
        }
        Field::Group(row) => return object(row).map(Value::Object),
        Field::ListInternal(list) => return list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, item): &(Field, Field)| {
                let key = match value(key)? {
                    Value::String(key) => key,
                    key => key.to_string(),
                };
                Ok((key, value(item)?))
            };
            return map.entries().iter().map(entry).collect();
        }
        Field::Date(days) => DateTime::from_timestamp(i64::from(*days) * 86_400, 0).is_some(),
        Field::TimestampMillis(time) => DateTime::from_timestamp_millis(*time).is_some(),
        Field::TimestampMicros(time) => DateTime::from_timestamp_micros(*time).is_some(),
        _ => true,
    };
    if in_calendar {
        catch_panic(|| Ok::<_, String>(field.to_json_value()))
    } else {
        Err(format!("is not in the calendar: {field:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;

    use crate::data::{TxtUnit, read};

    /// Two rows: {text: "a", messages: [{role: "u", content: "x"}, {role: "v", content: null}]}, {text: null, messages: []}.
    fn write(path: &std::path::Path, compression: Compression) {
        let schema =
            "message m { optional binary text; required group messages (LIST) { repeated group list { required group element {
            required binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(
            WriterProperties::builder()
                .set_compression(compression)
                .build(),
        );
        let mut file =
            SerializedFileWriter::new(std::fs::File::create(path).unwrap(), schema, properties)
                .unwrap();
        let mut group = file.next_row_group().unwrap();
        // Per column: values, definition levels, repetition levels, by Dremel's rules.
        let columns: [(&[&str], &[i16], &[i16]); 3] = [
            (&["a"], &[1, 0], &[0, 0]),
            (&["u", "v"], &[1, 1, 0], &[0, 1, 0]),
            (&["x"], &[2, 1, 0], &[0, 1, 0]),
        ];
        for (values, definition, repetition) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let ColumnWriter::ByteArrayColumnWriter(writer) = column.untyped() else {
                panic!("bytes")
            };
            let values: Vec<ByteArray> = values.iter().map(|v| ByteArray::from(*v)).collect();
            writer
                .write_batch(&values, Some(definition), Some(repetition))
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        file.close().unwrap();
    }

    #[test]
    fn nested_lists_and_unannotated_text_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.parquet");
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::ZSTD(Default::default()),
        ] {
            write(&path, compression);
            let rows: Vec<_> = read(&path, TxtUnit::File)
                .unwrap()
                .map(Result::unwrap)
                .collect();
            assert_eq!(
                rows[0].place.to_string(),
                format!("{}, row 1", path.display())
            );
            let fields: Vec<_> = rows
                .into_iter()
                .map(|r| serde_json::Value::Object(r.fields))
                .collect();
            let messages = json!([{"role": "u", "content": "x"}, {"role": "v", "content": null}]);
            assert_eq!(
                fields,
                [
                    json!({"text": "a", "messages": messages}),
                    json!({"text": null, "messages": []})
                ]
            );
        }
        std::fs::write(&path, "PAR1 no").unwrap();
        assert!(
            read(&path, TxtUnit::File)
                .err()
                .unwrap()
                .to_string()
                .contains("not a Parquet file")
        );
    }
}
