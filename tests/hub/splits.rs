//! The files of a split, from listings as data sets on the hub have them.

use wattune::error::Result;

use super::*;

/// The files of `split` in a data set with these files, relative to its root.
fn split(files: &[&str], split: &str) -> Result<Vec<String>> {
    let fixture = fixture();
    let listed: Vec<(&str, &str)> = files.iter().map(|file| (*file, "x")).collect();
    fixture.hub.repository("datasets", &listed);
    let found = fixture.client().dataset(ID, "main", split, &Silent)?;
    let root = fixture
        .folder
        .path()
        .join("datasets--owner--name/snapshots");
    let relative = |path: &std::path::PathBuf| {
        let path = path.strip_prefix(root.join(COMMIT)).unwrap();
        path.to_str().unwrap().to_string()
    };
    Ok(found.files.iter().map(relative).collect())
}

fn ok(files: &[&str], name: &str) -> Vec<String> {
    split(files, name).unwrap()
}

fn refused(files: &[&str], name: &str) -> String {
    split(files, name).unwrap_err().to_string()
}

// Listings in the forms of SQuAD, UltraChat, Alpaca, TinyStories and the hub's own conversion to Parquet.
#[test]
fn a_split_is_found_by_the_usual_names() {
    let squad = [
        "README.md",
        "plain_text/train-00000-of-00001.parquet",
        "plain_text/validation-00000-of-00001.parquet",
    ];
    assert_eq!(
        ok(&squad, "train"),
        ["plain_text/train-00000-of-00001.parquet"]
    );
    let ultrachat = [
        "data/train_sft-00001-of-00002-f7dfac4afe5b93f4.parquet",
        "data/train_sft-00000-of-00002-a3ecf92756993583.parquet",
        "data/train_gen-00000-of-00001-x.parquet",
    ];
    assert_eq!(ok(&ultrachat, "train_sft"), [ultrachat[1], ultrachat[0]]);
    let error = refused(&ultrachat, "train");
    assert!(
        error.contains("no split `train`") && ultrachat.iter().all(|file| error.contains(file)),
        "{error}"
    );
    let alpaca = [
        "README.md",
        "alpaca_data_cleaned.json",
        "dataset_infos.json",
    ];
    assert_eq!(ok(&alpaca, "train"), ["alpaca_data_cleaned.json"]);
    let error = refused(&alpaca, "test");
    assert!(
        error.contains("value: alpaca_data_cleaned.json\n"),
        "{error}"
    );
    let hh = ["dev.csv", "train.csv", "eval/data.csv"];
    assert_eq!(ok(&hh, "validation"), ["dev.csv"]);
    assert_eq!(ok(&hh, "test"), ["eval/data.csv"]);
    let stories = ["TinyStories-train.txt", "TinyStories-valid.txt"];
    assert_eq!(ok(&stories, "validation"), ["TinyStories-valid.txt"]);
    let converted = [
        "default/train/0000.parquet",
        "default/train/0001.parquet",
        "default/test/0000.parquet",
    ];
    assert_eq!(ok(&converted, "train"), converted[..2]);
}

#[test]
fn two_readings_are_refused_with_both() {
    let gsm8k = [
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
        "socratic/train-00000-of-00002.parquet",
        "socratic/train-00001-of-00002.parquet",
    ];
    let both = ["main/train-00000-of-00001.parquet", "socratic/train"];
    let choices = |sets: &[&str; 2]| {
        let [first, second] = sets;
        format!("choose one of \"{ID}:{first}\", \"{ID}:{second}\"")
    };
    assert!(refused(&gsm8k, "train").ends_with(&choices(&both)));
    assert_eq!(ok(&gsm8k, both[0]), [gsm8k[1]]);
    assert_eq!(ok(&gsm8k, both[1]), gsm8k[2..]);
    assert_eq!(ok(&gsm8k, "main/train"), [gsm8k[1]]);
    assert_eq!(ok(&gsm8k, "test"), [gsm8k[0]]);
    let formats = ["train.csv", "train.jsonl"];
    assert!(refused(&formats, "train").ends_with(&choices(&formats)));
    assert_eq!(ok(&formats, "train.csv"), ["train.csv"]);
    let many = ["d/train-a.csv", "d/train-b.csv", "d/train-c.json"];
    let both = ["d/train.csv", "d/train-c.json"];
    assert!(refused(&many, "train").ends_with(&choices(&both)));
    assert_eq!(ok(&many, "d/train.csv"), many[..2]);
}

#[test]
fn a_set_with_a_missing_shard_is_refused() {
    let part = [
        "data/train-00000-of-00003.parquet",
        "data/train-00002-of-00003.parquet",
    ];
    let error = refused(&part, "train");
    assert!(
        error.contains("value: 2 files `data/train-...`\n") && error.contains("rule: 3 of them\n"),
        "{error}"
    );
}

#[test]
fn files_without_records_are_no_data() {
    let files = [
        ".gitattributes",
        "README.md",
        "config.json",
        ".x/train.csv",
        "train.jsonl.gz",
    ];
    let error = refused(&files, "train");
    assert!(error.contains("no files that can be read"), "{error}");
}
