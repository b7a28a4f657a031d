//! Parquet rows as records.
//!
//! Takes an open file, returns its rows with nested lists and structs as JSON. UTF-8 bytes count as text, since some writers
//! leave strings unannotated. Knows nothing of formats.

use std::fs::File;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::Value;

use super::read::{Location, Record, Records};
use crate::error::{Error, Kind, Result};

/// The rows of `source` in order.
pub(super) fn records(file: Arc<str>, source: File) -> Result<Records> {
    let refuse = |e: parquet::errors::ParquetError| {
        Error::new(
            Kind::Data,
            format!("not a Parquet file that can be read: {e}"),
        )
        .at(file.as_ref())
        .rule("compression none, snappy, gzip or zstd")
        .hint("write it again, as with pandas' `to_parquet(path, compression=\"zstd\")`")
    };
    let reader = SerializedFileReader::new(source).map_err(refuse)?;
    // Fails now, not at the first row, if the schema cannot be read as records.
    reader.get_row_iter(None).map_err(refuse)?;
    let rows = parquet::record::reader::RowIter::from_file_into(Box::new(reader));
    let mut failed = false;
    Ok(Box::new(rows.enumerate().map_while(move |(i, row)| {
        let place = Location {
            file: file.clone(),
            unit: "row",
            number: i as u64 + 1,
        };
        let result = match row {
            _ if failed => return None,
            Ok(row) => fields(&row).map(|fields| Record {
                place: place.clone(),
                fields,
            }),
            // A page that cannot be decoded ends the file: later rows cannot be located.
            Err(e) => {
                failed = true;
                Err(e.to_string())
            }
        };
        Some(result.map_err(|e| {
            Error::new(Kind::Data, format!("a row cannot be read: {e}")).at(place.to_string())
        }))
    })))
}

fn fields(row: &Row) -> Result<serde_json::Map<String, Value>, String> {
    row.get_column_iter()
        .map(|(name, field)| {
            let value = match field {
                Field::Bytes(bytes) => Value::String(
                    String::from_utf8(bytes.data().to_vec())
                        .map_err(|_| format!("column `{name}` holds bytes that are no text"))?,
                ),
                other => other.to_json_value(),
            };
            Ok((name.clone(), value))
        })
        .collect()
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
