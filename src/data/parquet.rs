//! Parquet rows as records.
//!
//! Takes an open file, returns its rows with nested lists and structs as JSON. Bytes that are UTF-8 count as text, since some
//! writers leave strings unannotated. Knows nothing of what a column means.

use std::fs::File;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::Value;

use super::read::{Place, Record, Records};
use crate::error::{Error, Kind, Result};

/// The rows of `source` in order.
pub(super) fn records(file: Arc<str>, source: File) -> Result<Records> {
    let refuse = |e: parquet::errors::ParquetError| {
        Error::new(Kind::Data, format!("not a Parquet file that can be read: {e}"))
            .at(file.as_ref())
            .rule("compression none, snappy, gzip or zstd")
            .hint("write it again, as with pandas' `to_parquet(path, compression=\"zstd\")`")
    };
    let reader = SerializedFileReader::new(source).map_err(refuse)?;
    // Opening one iterator over the whole file checks the schema; the reader must outlive it, hence `from_file_into`.
    reader.get_row_iter(None).map_err(refuse)?;
    let rows = parquet::record::reader::RowIter::from_file_into(Box::new(reader));
    let mut failed = false;
    Ok(Box::new(rows.enumerate().map_while(move |(i, row)| {
        let place = Place { file: file.clone(), unit: "row", number: i as u64 + 1 };
        let result = match row {
            _ if failed => return None,
            Ok(row) => fields(&row).map(|fields| Record { place: place.clone(), fields }),
            // A page that cannot be decoded ends the file: the rows after it cannot be found.
            Err(e) => {
                failed = true;
                Err(e.to_string())
            }
        };
        Some(result.map_err(|e| Error::new(Kind::Data, format!("a row cannot be read: {e}")).at(place.to_string())))
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
