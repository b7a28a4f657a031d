//! The hub room against a small hub on loopback that can misbehave.
//!
//! `fake_hub` is that hub. Everything stays on this machine and takes milliseconds, but for one wait of a second.

#[path = "../fake_hub/mod.rs"]
mod fake_hub;

mod directories;
mod errors;
mod push;
mod settings;
mod splits;
mod transfers;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fake_hub::{COMMIT, FakeHub, ID, Reply, Request, path_of, sha256};
use wattune::error::{Error, Kind, Result};
use wattune::hub::{Hub, ModelFiles, Progress, RetryPolicy, Settings, Silent, Token};

const WEIGHTS: &str = "model.safetensors";
const POLICY: RetryPolicy = RetryPolicy {
    max_attempts: 4,
    base_delay: Duration::from_millis(2),
    max_delay: Duration::from_secs(2),
    stall_timeout: Duration::from_secs(10),
};

/// Bytes that repeat at no power of two, so that a part in the wrong fixture changes the hash.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

struct Fixture {
    folder: tempfile::TempDir,
    hub: FakeHub,
    store: FakeHub,
}

/// A small model on a hub, and an empty cache.
fn fixture() -> Fixture {
    let fixture = Fixture {
        folder: tempfile::tempdir().unwrap(),
        hub: FakeHub::new(),
        store: FakeHub::new(),
    };
    fixture.hub.repository(
        "models",
        &[
            ("config.json", "{}"),
            ("README.md", "---\nlicense: mit\n---\n"),
            (WEIGHTS, ""),
        ],
    );
    fixture
}

impl Fixture {
    fn settings(&self) -> Settings {
        Settings {
            cache: self.folder.path().into(),
            endpoint: self.hub.address.clone(),
            token: None,
            offline: false,
        }
    }

    fn open(&self, settings: Settings) -> Hub {
        Hub::with_retry_policy(settings, POLICY).unwrap()
    }

    fn client(&self) -> Hub {
        self.open(self.settings())
    }

    fn with_token(&self) -> Hub {
        self.open(Settings {
            token: Some(Token::new("hf_secret").unwrap()),
            ..self.settings()
        })
    }

    fn offline(&self) -> Hub {
        self.open(Settings {
            offline: true,
            ..self.settings()
        })
    }

    /// Metadata and weights.
    fn model(&self) -> Result<ModelFiles> {
        let hub = self.client();
        let mut model = hub.model(ID, "main", &Silent)?;
        hub.model_weights(&mut model, &Silent)?;
        Ok(model)
    }

    fn refused(&self) -> Error {
        self.client().model(ID, "main", &Silent).unwrap_err()
    }

    fn repo(&self) -> std::path::PathBuf {
        self.folder.path().join("models--owner--name")
    }

    fn blobs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.repo().join("blobs")) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn ok(body: &[u8]) -> Reply {
    Reply::new(200, &[]).body(body)
}

#[test]
fn small_files_then_weights_arrive_in_the_layout_of_huggingface_hub() {
    let fixture = fixture();
    let bytes = bytes(3000);
    fixture
        .hub
        .large(WEIGHTS, &bytes, &fixture.store, &[ok(&bytes)]);
    let hub = fixture.client();
    let mut model = hub.model(ID, "main", &Silent).unwrap();
    assert!(
        !fixture
            .hub
            .lines()
            .iter()
            .any(|line| line.contains("safetensors")),
        "weights are not requested"
    );
    assert_eq!(
        (
            model.weights.len(),
            model.commit.as_deref(),
            model.license.as_deref()
        ),
        (0, Some(COMMIT), Some("mit"))
    );
    hub.model_weights(&mut model, &Silent).unwrap();
    assert_eq!(fs::read(&model.weights[0]).unwrap(), bytes);
    assert_eq!(model.dir, fixture.repo().join("snapshots").join(COMMIT));
    assert_eq!(
        fs::read_to_string(fixture.repo().join("refs/main")).unwrap(),
        COMMIT
    );
    #[cfg(unix)]
    {
        let target = fs::read_link(model.dir.join(WEIGHTS)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(sha256(&bytes)));
        assert_eq!(
            fs::read_link(&model.config).unwrap(),
            Path::new("../../blobs/git-config.json")
        );
    }
    // hf-hub finds the files too.
    let other = hf_hub::HFClient::builder().cache_dir(fixture.folder.path());
    let other = other.build_sync().unwrap().model("owner", "name");
    let found = other
        .download_file()
        .filename(WEIGHTS)
        .local_files_only(true);
    assert_eq!(found.send().unwrap(), model.weights[0]);
    let before = fixture.hub.lines().len();
    assert_eq!(fixture.model().unwrap(), model);
    assert_eq!(
        fixture.hub.lines()[before..],
        ["GET /api/models/owner/name/revision/main"]
    );
}

#[test]
fn files_cached_by_python_are_used_without_a_transfer() {
    let fixture = fixture();
    let snapshot = fixture.repo().join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(fixture.repo().join("blobs")).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(
        fixture.repo().join("blobs/git-README.md"),
        "---\nlicense: mit\n---\n",
    )
    .unwrap();
    let model = fixture.client().model(ID, "main", &Silent).unwrap();
    assert_eq!(model.license.as_deref(), Some("mit"));
    let readme = format!("HEAD {}", path_of("models", "README.md"));
    assert_eq!(
        fixture.hub.lines(),
        ["GET /api/models/owner/name/revision/main", &readme]
    );
}

#[test]
fn the_shards_of_the_index_are_fetched() {
    let fixture = fixture();
    let index = r#"{"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}"#;
    let files = [
        ("config.json", "{}"),
        ("model.safetensors.index.json", index),
        ("m-1.safetensors", "1"),
        ("m-2.safetensors", "2"),
        ("m-3.safetensors", "3"),
    ];
    fixture.hub.repository("models", &files);
    let model = fixture.model().unwrap();
    let texts: Vec<String> = model
        .weights
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    assert_eq!(texts, ["2", "1"]);
    assert!(model.file("model.safetensors.index.json").is_some());
    assert!(!fixture.hub.lines().iter().any(|line| line.contains("m-3")));

    fixture.hub.repository("models", &files[..3]);
    fs::remove_dir_all(fixture.repo()).unwrap();
    let error = fixture.model().unwrap_err().to_string();
    assert!(error.contains("value: m-2.safetensors\n"), "{error}");
    assert!(
        !fixture.blobs().contains(&"git-m-1.safetensors".to_string()),
        "refused before the first shard"
    );
}

#[test]
fn offline_reads_the_cache_alone() {
    let fixture = fixture();
    let error = fixture.offline().model(ID, "main", &Silent).unwrap_err();
    let hint = error.remedy().unwrap();
    assert!(
        hint.contains("HF_HUB_OFFLINE=0 wattune") && hint.contains("set model.id to"),
        "{error}"
    );
    fixture.hub.small("models", WEIGHTS, "w");
    let online = fixture.client().model(ID, "main", &Silent).unwrap();
    let before = fixture.hub.lines().len();
    let mut model = fixture.offline().model(ID, "main", &Silent).unwrap();
    assert_eq!(
        (&model.config, &model.commit, &model.license),
        (&online.config, &online.commit, &online.license)
    );
    let error = fixture
        .offline()
        .model_weights(&mut model, &Silent)
        .unwrap_err();
    assert!(
        error.to_string().contains("`model.safetensors` of model")
            && error.remedy().unwrap().contains("HF_HUB_OFFLINE=0"),
        "{error}"
    );
    assert_eq!(fixture.hub.lines().len(), before, "no request was sent");

    fixture.model().unwrap();
    let before = fixture.hub.lines().len();
    let mut model = fixture.offline().model(ID, COMMIT, &Silent).unwrap();
    fixture
        .offline()
        .model_weights(&mut model, &Silent)
        .unwrap();
    assert_eq!(fs::read(&model.weights[0]).unwrap(), b"w");
    assert_eq!(fixture.hub.lines().len(), before, "no request was sent");
}

#[test]
fn a_data_set_is_the_files_of_its_split() {
    let fixture = fixture();
    let files = [
        ("data/train-00001-of-00002.parquet", "1"),
        ("data/train-00000-of-00002.parquet", "0"),
        ("data/test-00000-of-00001.parquet", "t"),
        ("README.md", ""),
    ];
    fixture.hub.repository("datasets", &files);
    let found = fixture
        .client()
        .dataset(ID, "main", "train", &Silent)
        .unwrap();
    let texts: Vec<String> = found
        .files
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    assert_eq!(
        (texts, found.commit.as_str(), found.id.as_str()),
        (vec!["0".to_string(), "1".to_string()], COMMIT, ID)
    );
    assert!(
        !fixture
            .hub
            .lines()
            .iter()
            .any(|line| line.contains("test") || line.contains("README"))
    );
    assert!(
        fixture
            .folder
            .path()
            .join("datasets--owner--name/snapshots")
            .is_dir()
    );
    let error = fixture
        .client()
        .dataset(ID, "main", "validation", &Silent)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no split `validation`")
            && error.contains("data/test-00000-of-00001.parquet"),
        "{error}"
    );

    assert_eq!(
        fixture
            .offline()
            .dataset(ID, "main", "train", &Silent)
            .unwrap(),
        found
    );
    let error = fixture
        .offline()
        .dataset(ID, "main", "test", &Silent)
        .unwrap_err();
    assert!(
        error.remedy().unwrap().contains("HF_HUB_OFFLINE=0"),
        "{error}"
    );
    fs::remove_file(&found.files[1]).unwrap();
    assert!(
        fixture
            .offline()
            .dataset(ID, "main", "train", &Silent)
            .is_err(),
        "half a split is no split"
    );
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Progress for Log {
    fn retry(&self, reason: &str, delay: Duration) {
        let line = format!("{reason}; again in {} s", delay.as_secs());
        self.0.lock().unwrap().push(line);
    }
    fn start(&self, file: &str, bytes: Option<u64>) {
        self.0
            .lock()
            .unwrap()
            .push(format!("start {file} {bytes:?}"));
    }
    fn advance(&self, bytes: u64) {
        self.0.lock().unwrap().push(format!("{bytes}"));
    }
    fn finish(&self) {
        self.0.lock().unwrap().push("finish".into());
    }
}

#[test]
fn progress_counts_every_byte_once() {
    let fixture = fixture();
    let log = Log::default();
    fixture.client().model(ID, "main", &log).unwrap();
    let expected = [
        "start config.json Some(2)",
        "2",
        "finish",
        "start README.md Some(21)",
        "21",
        "finish",
    ];
    assert_eq!(*log.0.lock().unwrap(), expected);
}

#[test]
fn a_proxy_from_the_environment_is_used() {
    // The variables hold for a whole process: this test runs itself again in one that has them.
    const INSIDE: &str = "WATTUNE_TEST_PROXIED";
    if std::env::var_os(INSIDE).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            cache: folder.path().into(),
            ..Settings::from_env().unwrap()
        };
        Hub::new(settings)
            .unwrap()
            .model(ID, "main", &Silent)
            .unwrap();
        return;
    }
    let proxy = FakeHub::new();
    let listing = format!(
        "{{\"id\": \"{ID}\", \"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"config.json\"}}]}}"
    );
    proxy.on(
        "GET http://hub.invalid/api/models/owner/name/revision/main",
        &[ok(listing.as_bytes())],
    );
    let config = Reply::new(200, &[("ETag", "\"x\""), ("X-Repo-Commit", COMMIT)]).body(b"{}");
    for method in ["HEAD", "GET"] {
        let line = format!(
            "{method} http://hub.invalid{}",
            path_of("models", "config.json")
        );
        proxy.on(&line, std::slice::from_ref(&config));
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_proxy_from_the_environment_is_used"])
        .envs([
            (INSIDE, "1"),
            ("HTTP_PROXY", &proxy.address),
            ("http_proxy", &proxy.address),
            ("HF_ENDPOINT", "http://hub.invalid"),
        ])
        .env_remove("NO_PROXY")
        .env_remove("no_proxy")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("REQUEST_METHOD")
        .output()
        .unwrap();
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    assert_eq!(proxy.lines().len(), 3);
}

// Expected URLs: huggingface_hub's hf_hub_url and HfApi.repo_info.
#[test]
fn requests_go_to_the_addresses_of_the_hub() {
    let fixture = fixture();
    let hub = fixture.open(Settings {
        endpoint: format!("{}/mirror/", fixture.hub.address),
        ..fixture.settings()
    });
    let listing = "GET /mirror/api/models/owner/name/revision/refs%2Fpr%2F1";
    let files = fixture.hub.next("GET /api/models/owner/name/revision/main");
    fixture.hub.on(listing, &[files]);
    let config =
        "HEAD /mirror/owner/name/resolve/0123456789abcdef0123456789abcdef01234567/config.json";
    hub.model(ID, "refs/pr/1", &Silent).unwrap_err();
    assert_eq!(fixture.hub.lines(), [listing, config]);

    let odd = "x y/z#.json";
    fixture.hub.repository("datasets", &[(odd, "")]);
    let file = format!("/datasets/{ID}/resolve/{COMMIT}/x%20y/z%23.json");
    let headers = [("ETag", "\"odd\""), ("X-Repo-Commit", COMMIT)];
    for method in ["HEAD", "GET"] {
        let reply = Reply::new(200, &headers).body(b"[]");
        fixture.hub.on(&format!("{method} {file}"), &[reply]);
    }
    let found = fixture.client().dataset(ID, "main", odd, &Silent).unwrap();
    assert_eq!(fs::read(&found.files[0]).unwrap(), b"[]");
}

#[test]
fn a_link_to_a_missing_blob_is_replaced() {
    let fixture = fixture();
    let model = fixture.client().model(ID, "main", &Silent).unwrap();
    fs::remove_file(fixture.repo().join("blobs/git-config.json")).unwrap();
    #[cfg(unix)]
    assert!(fixture.offline().model(ID, "main", &Silent).is_err());
    fixture.client().model(ID, "main", &Silent).unwrap();
    assert_eq!(fs::read(model.config).unwrap(), b"{}");
}

#[test]
fn a_ref_without_a_commit_is_ignored() {
    let fixture = fixture();
    fixture.client().model(ID, "main", &Silent).unwrap();
    fs::write(fixture.repo().join("refs/main"), "../../x").unwrap();
    assert!(fixture.offline().model(ID, "main", &Silent).is_err());
    assert!(fixture.offline().model(ID, COMMIT, &Silent).is_ok());
}
