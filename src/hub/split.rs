//! Which files of a data set make up a split.
//!
//! Owns the naming rules of data sets on the hub: `data/train-00000-of-00002.parquet`, `train.jsonl`, `dev.csv`,
//! `main/test-...`; they follow the `datasets` library's `data_files.py`. Takes file names and a split; returns names, or says
//! why not: where two readings are possible nothing is chosen. Knows nothing of what is inside a file.

/// Formats a record can be read from, by extension.
const EXTENSIONS: [&str; 6] = ["parquet", "jsonl", "json", "csv", "tsv", "txt"];
/// Files with such an extension that hold no records.
const NO_RECORDS: [&str; 8] = [
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
    "requirements.txt",
    "license.txt",
];
/// Split -> the words that mean it in a file's name.
const WORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Why a split has no files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoSplit {
    /// No file is named for it; these are the data files there are.
    Absent(Vec<String>),
    /// Several sets of files are: each as what to ask for in place of the split.
    Ambiguous(Vec<String>),
    /// A numbered set of files lacks some: the name it begins with, how many are there, how many belong to it.
    Incomplete(String, usize, usize),
}

/// The files of `split`, sorted. `split` may also be `folder/split`, `split.extension`, both, or a file's full name.
pub(super) fn files_of(files: &[String], split: &str) -> Result<Vec<String>, NoSplit> {
    if files.iter().any(|file| file == split) {
        return Ok(vec![split.to_string()]);
    }
    let mut data: Vec<&str> = files
        .iter()
        .map(String::as_str)
        .filter(|file| holds_records(file))
        .collect();
    data.sort();
    let (folder, word) = split
        .rsplit_once('/')
        .map_or((None, split), |(folder, word)| (Some(folder), word));
    let (word, format) = match word.rsplit_once('.') {
        Some((word, format)) if EXTENSIONS.contains(&format) => (word, Some(format)),
        _ => (word, None),
    };
    let asked = |file: &str| {
        folder.is_none_or(|folder| is_inside(file, folder))
            && format.is_none_or(|format| extension(file) == format)
    };
    let inside: Vec<&str> = data.iter().copied().filter(|file| asked(file)).collect();
    let found = named_for(&inside, word);
    if found.is_empty() {
        return Err(NoSplit::Absent(
            data.into_iter().map(str::to_string).collect(),
        ));
    }
    let sets = sets_of(&found);
    match sets.as_slice() {
        [(_, set)] => complete(set),
        sets => Err(NoSplit::Ambiguous(
            sets.iter()
                .map(|(name, set)| ask_for(name, set, &found, word))
                .collect(),
        )),
    }
}

fn holds_records(file: &str) -> bool {
    let name = file_name(file).to_ascii_lowercase();
    let hidden = file.split('/').any(|part| part.starts_with(['.', '_']));
    !hidden && EXTENSIONS.contains(&extension(&name)) && !NO_RECORDS.contains(&name.as_str())
}

/// The files that the strongest rule finds: named exactly for the split; else with a word for it in the path; else, when no file
/// has any split in its path, all of them, for "train".
fn named_for<'a>(data: &[&'a str], split: &str) -> Vec<&'a str> {
    let words = words_of(split);
    let exact: Vec<&str> = data
        .iter()
        .copied()
        .filter(|file| stem(file).eq_ignore_ascii_case(split))
        .collect();
    if !exact.is_empty() {
        return exact;
    }
    // A numbered file's split is what stands before the number, whatever words are in it: `train_sft` is not `train`.
    let says = |file: &str, words: &[&str]| match shard(file) {
        Some(_) => {
            words.contains(&stem(file))
                || folder_words(file)
                    .iter()
                    .any(|word| words.contains(&word.as_str()))
        }
        None => path_words(file)
            .iter()
            .any(|word| words.contains(&word.as_str())),
    };
    let by_word: Vec<&str> = data
        .iter()
        .copied()
        .filter(|file| says(file, &words))
        .collect();
    if !by_word.is_empty() || split != "train" {
        return by_word;
    }
    let every_word: Vec<&str> = WORDS
        .iter()
        .flat_map(|(_, words)| words.iter().copied())
        .collect();
    match data
        .iter()
        .any(|file| says(file, &every_word) || shard(file).is_some())
    {
        true => Vec::new(),
        false => data.to_vec(),
    }
}

fn words_of(split: &str) -> Vec<&str> {
    let known = WORDS
        .iter()
        .find(|(name, words)| *name == split || words.contains(&split));
    known.map_or(vec![split], |(_, words)| words.to_vec())
}

/// Groups files that may be read as one: of one folder and one format.
fn sets_of<'a>(files: &[&'a str]) -> Vec<((&'a str, &'a str), Vec<&'a str>)> {
    let mut sets: Vec<((&str, &str), Vec<&str>)> = Vec::new();
    for file in files {
        let key = (folder_of(file), extension(file));
        match sets.iter_mut().find(|(known, _)| *known == key) {
            Some((_, set)) => set.push(file),
            None => sets.push((key, vec![file])),
        }
    }
    sets
}

/// What to write in place of the split to mean this set and no other.
fn ask_for((folder, format): &(&str, &str), set: &[&str], found: &[&str], word: &str) -> String {
    let slash = if folder.is_empty() { "" } else { "/" };
    let alone = found
        .iter()
        .filter(|file| folder_of(file) == *folder)
        .count()
        == set.len();
    match set {
        [file] => file.to_string(),
        _ if alone && !folder.is_empty() => format!("{folder}/{word}"),
        _ => format!("{folder}{slash}{word}.{format}"),
    }
}

/// Refuses a numbered set that lacks a file.
fn complete(set: &[&str]) -> Result<Vec<String>, NoSplit> {
    for file in set {
        let Some(of) = shard(file) else { continue };
        let here = set
            .iter()
            .filter(|other| stem(other) == stem(file) && shard(other) == Some(of))
            .count();
        if here != of {
            return Err(NoSplit::Incomplete(
                format!("{}/{}", folder_of(file), stem(file)),
                here,
                of,
            ));
        }
    }
    Ok(set.iter().map(|file| file.to_string()).collect())
}

fn file_name(file: &str) -> &str {
    file.rsplit_once('/').map_or(file, |(_, name)| name)
}

fn folder_of(file: &str) -> &str {
    file.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn is_inside(file: &str, folder: &str) -> bool {
    file.strip_prefix(folder)
        .is_some_and(|rest| rest.starts_with('/'))
}

fn extension(file: &str) -> &str {
    file.rsplit_once('.').map_or("", |(_, extension)| extension)
}

/// How many files a numbered file belongs to: 2 for `train-00000-of-00002.parquet`.
fn shard(file: &str) -> Option<usize> {
    let name = file_name(file).split('.').next()?;
    let (before, of) = name.rsplit_once("-of-")?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    // What follows the count is a fingerprint in older files: `train-00000-of-00002-0123456789abcdef`.
    let of = of.split('-').next().filter(|of| digits(of))?;
    digits(before.rsplit_once('-')?.1)
        .then(|| of.parse().ok())
        .flatten()
}

/// A file's name without extension and, when it is numbered, without its number.
fn stem(file: &str) -> &str {
    let name = file_name(file);
    let name = match shard(file) {
        Some(_) => name
            .rsplit_once("-of-")
            .and_then(|(before, _)| before.rsplit_once('-'))
            .map_or(name, |(before, _)| before),
        None => name,
    };
    name.rsplit_once('.')
        .filter(|_| shard(file).is_none())
        .map_or(name, |(stem, _)| stem)
}

fn path_words(path: &str) -> Vec<String> {
    path.to_ascii_lowercase()
        .split(|c: char| "/-._ ".contains(c) || c.is_ascii_digit())
        .map(str::to_string)
        .collect()
}

fn folder_words(file: &str) -> Vec<String> {
    path_words(folder_of(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[&str], split: &str) -> Result<Vec<String>, NoSplit> {
        files_of(
            &files
                .iter()
                .map(|file| file.to_string())
                .collect::<Vec<_>>(),
            split,
        )
    }

    fn ok(files: &[&str], split: &str) -> Vec<String> {
        of(files, split).unwrap()
    }

    // Listings in the forms of SQuAD, UltraChat, Alpaca, TinyStories and the hub's own conversion to Parquet.
    #[test]
    fn splits_are_found_where_data_sets_keep_them() {
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
        assert!(matches!(of(&ultrachat, "train"), Err(NoSplit::Absent(files)) if files.len() == 3));
        let alpaca = [
            "README.md",
            "alpaca_data_cleaned.json",
            "dataset_infos.json",
        ];
        assert_eq!(ok(&alpaca, "train"), ["alpaca_data_cleaned.json"]);
        assert!(
            matches!(of(&alpaca, "test"), Err(NoSplit::Absent(files)) if files == ["alpaca_data_cleaned.json"])
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
        let both = vec![
            "main/train-00000-of-00001.parquet".to_string(),
            "socratic/train".to_string(),
        ];
        assert_eq!(of(&gsm8k, "train"), Err(NoSplit::Ambiguous(both.clone())));
        assert_eq!(ok(&gsm8k, &both[0]), [gsm8k[1]]);
        assert_eq!(ok(&gsm8k, &both[1]), gsm8k[2..]);
        assert_eq!(ok(&gsm8k, "main/train"), [gsm8k[1]]);
        assert_eq!(ok(&gsm8k, "test"), [gsm8k[0]]);
        let formats = ["train.csv", "train.jsonl"];
        assert_eq!(
            of(&formats, "train"),
            Err(NoSplit::Ambiguous(formats.map(str::to_string).to_vec()))
        );
        assert_eq!(ok(&formats, "train.csv"), ["train.csv"]);
        let many = ["d/train-a.csv", "d/train-b.csv", "d/train-c.json"];
        let both = vec!["d/train.csv".to_string(), "d/train-c.json".to_string()];
        assert_eq!(of(&many, "train"), Err(NoSplit::Ambiguous(both)));
        assert_eq!(ok(&many, "d/train.csv"), many[..2]);
    }

    #[test]
    fn a_numbered_set_must_be_whole() {
        let part = [
            "data/train-00000-of-00003.parquet",
            "data/train-00002-of-00003.parquet",
        ];
        assert_eq!(
            of(&part, "train"),
            Err(NoSplit::Incomplete("data/train".into(), 2, 3))
        );
    }

    #[test]
    fn what_holds_no_records_is_no_data() {
        assert_eq!(
            of(
                &[
                    ".gitattributes",
                    "README.md",
                    "config.json",
                    ".x/train.csv",
                    "train.jsonl.gz"
                ],
                "train"
            ),
            Err(NoSplit::Absent(vec![]))
        );
    }
}
