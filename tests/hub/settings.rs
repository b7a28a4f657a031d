//! Settings from the environment.

use std::path::Path;

use wattune::error::Result;
use wattune::hub::{Settings, Token};

fn settings(variables: &[(&str, &str)]) -> Settings {
    read(variables).unwrap()
}

fn read(variables: &[(&str, &str)]) -> Result<Settings> {
    Settings::from_variables(&|name| {
        variables
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_string())
    })
}

// Expected values: the order of precedence in huggingface_hub's src/huggingface_hub/constants.py.
#[test]
fn the_cache_is_where_python_looks_for_it() {
    assert_eq!(
        settings(&[("HOME", "/h")]).cache,
        Path::new("/h/.cache/huggingface/hub")
    );
    assert_eq!(
        settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).cache,
        Path::new("/x/huggingface/hub")
    );
    assert_eq!(
        settings(&[
            ("HOME", "/h"),
            ("HF_HOME", "~/hf"),
            ("XDG_CACHE_HOME", "/x")
        ])
        .cache,
        Path::new("/h/hf/hub")
    );
    assert_eq!(
        settings(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]).cache,
        Path::new("/old")
    );
    let both = [
        ("HF_HOME", "/hf"),
        ("HUGGINGFACE_HUB_CACHE", "/old"),
        ("HF_HUB_CACHE", "${S}/$S$U/c"),
        ("S", "/s"),
    ];
    assert_eq!(settings(&both).cache, Path::new("/s//s$U/c"));
    assert!(
        read(&[])
            .unwrap_err()
            .remedy()
            .unwrap()
            .contains("HF_HOME=")
    );
}

#[test]
fn the_token_comes_from_the_environment_then_from_its_file() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
    let home = home.path().to_str().unwrap();
    assert_eq!(
        settings(&[("HF_HOME", home)]).token,
        Some(Token::new("hf_file").unwrap())
    );
    assert_eq!(
        settings(&[("HF_HOME", home), ("HF_TOKEN", " hf_env\n")]).token,
        Some(Token::new("hf_env").unwrap())
    );
    assert_eq!(
        settings(&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).token,
        Some(Token::new("hf_old").unwrap())
    );
    assert_eq!(
        settings(&[("HF_HOME", home), ("HF_TOKEN_PATH", "/nowhere")]).token,
        None
    );
    assert_eq!(
        settings(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token,
        None
    );
}

#[test]
fn offline_is_what_python_reads_as_true() {
    for (text, offline) in [
        ("1", true),
        ("on", true),
        ("Yes", true),
        ("TRUE", true),
        ("0", false),
        ("", false),
        ("2", false),
    ] {
        assert_eq!(
            settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", text)]).offline,
            offline,
            "{text}"
        );
    }
    assert!(settings(&[("HOME", "/h"), ("TRANSFORMERS_OFFLINE", "1")]).offline);
    assert!(
        !settings(&[
            ("HOME", "/h"),
            ("HF_HUB_OFFLINE", "0"),
            ("TRANSFORMERS_OFFLINE", "1")
        ])
        .offline
    );
    assert_eq!(
        settings(&[("HOME", "/h"), ("HF_ENDPOINT", "https://mirror.example/")]).endpoint,
        "https://mirror.example"
    );
    assert_eq!(
        settings(&[("HOME", "/h")]).endpoint,
        "https://huggingface.co"
    );
}

#[test]
fn a_token_is_never_shown() {
    let with = settings(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret")]);
    let token = with.token.clone().unwrap();
    for shown in [
        format!("{with:?}"),
        format!("{token:?}"),
        format!("{token}"),
    ] {
        assert!(!shown.contains("secret"), "{shown}");
    }
    let bad = read(&[("HOME", "/h"), ("HF_TOKEN", "hf_sec ret")]).unwrap_err();
    assert!(
        !bad.to_string().contains("ret\n") && !bad.to_string().contains("hf_sec"),
        "{bad}"
    );
}
