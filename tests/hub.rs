//! The hub room against a small hub on loopback that can be told to misbehave.
//!
//! `fake_hub` is that hub. Everything here is on this machine and takes milliseconds, but for one wait of a second.

mod fake_hub;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fake_hub::{Asked, COMMIT, FakeHub, ID, Reply, path_of, sha256};
use wattune::error::{Error, Kind, Result};
use wattune::hub::{Hub, Patience, Progress, Settings, Silent, Token};

const WEIGHTS: &str = "model.safetensors";

/// Bytes that repeat at no power of two, so that a part in the wrong place changes the hash.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

struct Place {
    folder: tempfile::TempDir,
    hub: FakeHub,
    store: FakeHub,
}

/// A model of one small configuration, and a place to keep it.
fn place() -> Place {
    let place = Place {
        folder: tempfile::tempdir().unwrap(),
        hub: FakeHub::new(),
        store: FakeHub::new(),
    };
    place.hub.repository(
        "models",
        &[
            ("config.json", "{}"),
            ("README.md", "---\nlicense: mit\n---\n"),
            (WEIGHTS, ""),
        ],
    );
    place
}

impl Place {
    fn settings(&self) -> Settings {
        Settings {
            cache: self.folder.path().into(),
            endpoint: self.hub.address.clone(),
            token: None,
            offline: false,
        }
    }

    fn open(&self, settings: Settings) -> Hub {
        let patience = Patience {
            attempts: 4,
            first_wait: Duration::from_millis(2),
            longest_wait: Duration::from_secs(2),
        };
        Hub::with_patience(settings, patience).unwrap()
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
    fn model(&self) -> Result<wattune::hub::ModelFiles> {
        let hub = self.client();
        let mut model = hub.model_metadata(ID, "main", &Silent)?;
        hub.model_weights(&mut model, &Silent)?;
        Ok(model)
    }

    fn refused(&self) -> Error {
        self.client()
            .model_metadata(ID, "main", &Silent)
            .unwrap_err()
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
fn a_model_comes_in_two_steps_into_pythons_layout() {
    let place = place();
    let bytes = bytes(3000);
    place
        .hub
        .large(WEIGHTS, &bytes, &place.store, &[ok(&bytes)]);
    let hub = place.client();
    let mut model = hub.model_metadata(ID, "main", &Silent).unwrap();
    assert!(
        !place
            .hub
            .lines()
            .iter()
            .any(|line| line.contains("safetensors")),
        "weights are not asked for"
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
    assert_eq!(model.dir, place.repo().join("snapshots").join(COMMIT));
    assert_eq!(
        fs::read_to_string(place.repo().join("refs/main")).unwrap(),
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
    let before = place.hub.lines().len();
    assert_eq!(place.model().unwrap(), model);
    assert_eq!(
        place.hub.lines()[before..],
        ["GET /api/models/owner/name/revision/main"]
    );
}

#[test]
fn what_python_left_is_used_without_a_transfer() {
    let place = place();
    let snapshot = place.repo().join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(place.repo().join("blobs")).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(
        place.repo().join("blobs/git-README.md"),
        "---\nlicense: mit\n---\n",
    )
    .unwrap();
    let model = place.client().model_metadata(ID, "main", &Silent).unwrap();
    assert_eq!(model.license.as_deref(), Some("mit"));
    let readme = format!("HEAD {}", path_of("models", "README.md"));
    assert_eq!(
        place.hub.lines(),
        ["GET /api/models/owner/name/revision/main", &readme]
    );
}

#[test]
fn the_index_names_the_shards_that_are_fetched() {
    let place = place();
    let index = r#"{"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}"#;
    let files = [
        ("config.json", "{}"),
        ("model.safetensors.index.json", index),
        ("m-1.safetensors", "1"),
        ("m-2.safetensors", "2"),
        ("m-3.safetensors", "3"),
    ];
    place.hub.repository("models", &files);
    let model = place.model().unwrap();
    let texts: Vec<String> = model
        .weights
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    assert_eq!(texts, ["2", "1"]);
    assert!(model.weight_map.is_some());
    assert!(!place.hub.lines().iter().any(|line| line.contains("m-3")));

    place.hub.repository("models", &files[..3]);
    fs::remove_dir_all(place.repo()).unwrap();
    let error = place.model().unwrap_err().to_string();
    assert!(error.contains("value: m-2.safetensors\n"), "{error}");
    assert!(
        !place.blobs().contains(&"git-m-1.safetensors".to_string()),
        "refused before the first shard"
    );
}

#[test]
fn the_token_stays_with_the_hub() {
    let place = place();
    let bytes = bytes(100);
    place
        .hub
        .large(WEIGHTS, &bytes, &place.store, &[ok(&bytes)]);
    let hub = place.with_token();
    let mut model = hub.model_metadata(ID, "main", &Silent).unwrap();
    hub.model_weights(&mut model, &Silent).unwrap();
    assert!(
        place
            .hub
            .asked()
            .iter()
            .all(|asked| asked.headers["authorization"] == "Bearer hf_secret")
    );
    assert_eq!(
        place.store.lines(),
        ["GET /store/model.safetensors?signature=secret"]
    );
    assert!(
        place
            .store
            .asked()
            .iter()
            .all(|asked| !asked.headers.contains_key("authorization"))
    );
}

#[test]
fn a_relative_redirect_is_followed_with_the_token() {
    let place = place();
    let moved = Reply::new(
        307,
        &[
            ("Location", "/api/resolve-cache/config.json"),
            ("X-Repo-Commit", COMMIT),
        ],
    );
    for method in ["HEAD", "GET"] {
        place.hub.on(
            &format!("{method} {}", path_of("models", "config.json")),
            std::slice::from_ref(&moved),
        );
        let reply = Reply::new(200, &[("ETag", "\"e1\"")]).body(b"{\"moved\": 1}");
        place.hub.on(
            &format!("{method} /api/resolve-cache/config.json"),
            &[reply],
        );
    }
    let model = place
        .with_token()
        .model_metadata(ID, "main", &Silent)
        .unwrap();
    assert_eq!(fs::read(&model.config).unwrap(), b"{\"moved\": 1}");
    assert!(place.blobs().contains(&"e1".to_string()));
    let asked = place.hub.asked();
    let cached: Vec<&Asked> = asked
        .iter()
        .filter(|asked| asked.line.ends_with("resolve-cache/config.json"))
        .collect();
    assert!(
        cached.len() == 2
            && cached
                .iter()
                .all(|asked| asked.headers.contains_key("authorization"))
    );
}

#[test]
fn a_refusal_says_what_to_do() {
    let place = place();
    let listing = "GET /api/models/owner/name/revision/main";
    let page = format!("{}/owner/name", place.hub.address);
    let cases: [(u16, &str, &str, String); 7] = [
        (
            401,
            "RepoNotFound",
            "no such model, or it is private",
            "set HF_TOKEN".into(),
        ),
        (
            401,
            "GatedRepo",
            "granted access",
            format!("accept the licence on {page} while signed in; set HF_TOKEN"),
        ),
        (
            403,
            "GatedRepo",
            "granted access",
            format!("accept the licence on {page}"),
        ),
        (
            404,
            "RepoNotFound",
            "the hub has no model `owner/name`",
            "check the id (model.id)".into(),
        ),
        (
            404,
            "RevisionNotFound",
            "has no revision `main`",
            format!("{page}/tree/main"),
        ),
        (
            404,
            "",
            "the hub has no model `owner/name`",
            "check the id".into(),
        ),
        (418, "", "418", page.clone()),
    ];
    for (status, code, what, hint) in cases {
        place
            .hub
            .on(listing, &[Reply::new(status, &[("X-Error-Code", code)])]);
        let error = place.refused();
        assert_eq!((error.kind(), error.exit_status()), (Kind::Hub, 2));
        assert!(
            error.to_string().contains(what) && error.remedy().unwrap().contains(&hint),
            "{status} {code}: {error}"
        );
    }
    assert_eq!(place.hub.count(listing), 7, "none of these is tried again");

    place.hub.repository(
        "models",
        &[("config.json", "{}"), ("README.md", ""), (WEIGHTS, "")],
    );
    place.hub.on(
        &format!("HEAD {}", path_of("models", "README.md")),
        &[Reply::new(404, &[("X-Error-Code", "EntryNotFound")])],
    );
    assert!(
        place
            .refused()
            .to_string()
            .contains("has no file `README.md`")
    );
}

#[test]
fn no_error_holds_the_token() {
    let place = place();
    for status in [401, 403, 404, 500, 418] {
        let reply = Reply::new(status, &[("X-Error-Message", "token hf_secret is bad")]);
        place
            .hub
            .on("GET /api/models/owner/name/revision/main", &[reply]);
        let error = place
            .with_token()
            .model_metadata(ID, "main", &Silent)
            .unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(
            !shown.contains("hf_secret") && shown.contains("token <token> is bad"),
            "{shown}"
        );
    }
    assert!(!format!("{:?}", place.with_token()).contains("hf_secret"));
    // A signed link is a secret too.
    let bytes = bytes(10);
    place
        .hub
        .repository("models", &[("config.json", "{}"), (WEIGHTS, "")]);
    place
        .hub
        .large(WEIGHTS, &bytes, &place.store, &[Reply::new(403, &[])]);
    let error = place.model().unwrap_err().to_string();
    assert!(!error.contains("signature"), "{error}");
}

#[test]
fn a_rate_limit_is_waited_for_within_reason() {
    let place = place();
    let listing = "GET /api/models/owner/name/revision/main";
    let good = place.hub.next(listing);
    place
        .hub
        .on(listing, &[Reply::new(429, &[("Retry-After", "1")]), good]);
    let start = Instant::now();
    place.client().model_metadata(ID, "main", &Silent).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));

    place
        .hub
        .on(listing, &[Reply::new(429, &[("Retry-After", "3600")])]);
    let start = Instant::now();
    let error = place.refused();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(error.remedy().unwrap().contains("wait 3600 s"), "{error}");
}

#[test]
fn a_hub_out_of_order_is_asked_again_a_few_times() {
    let place = place();
    let listing = "GET /api/models/owner/name/revision/main";
    let good = place.hub.next(listing);
    place
        .hub
        .on(listing, &[Reply::new(503, &[]), Reply::new(500, &[]), good]);
    place.client().model_metadata(ID, "main", &Silent).unwrap();
    assert_eq!(place.hub.count(listing), 3);
    place.hub.on(listing, &[Reply::new(502, &[])]);
    assert!(place.refused().to_string().contains("502"));
    assert_eq!(place.hub.count(listing), 3 + 4);
}

#[test]
fn a_broken_transfer_goes_on_where_it_broke() {
    let place = place();
    let bytes = bytes(300_000);
    let whole = ok(&bytes).ranged();
    // Five breaks where four attempts are allowed: each brought something, so none counts against the next.
    let breaks = [100_000, 50_000, 10_000, 10_000, 10_000].map(|at| whole.clone().cut(at));
    place.hub.large(
        WEIGHTS,
        &bytes,
        &place.store,
        &[&breaks[..], &[whole]].concat(),
    );
    let model = place.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    let ranges: Vec<Option<String>> = place
        .store
        .asked()
        .iter()
        .map(|asked| asked.headers.get("range").cloned())
        .collect();
    assert_eq!(
        ranges[..3],
        [
            None,
            Some("bytes=100000-".into()),
            Some("bytes=150000-".into())
        ]
    );
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let place = place();
    let bytes = bytes(300_000);
    place.hub.large(
        WEIGHTS,
        &bytes,
        &place.store,
        &[ok(&bytes).cut(100_000), ok(&bytes)],
    );
    assert!(fs::read(&place.model().unwrap().weights[0]).unwrap() == bytes);
    // A range that it does not know either: from the first byte.
    let refused = Reply::new(416, &[]);
    fs::remove_dir_all(place.repo()).unwrap();
    place.hub.large(
        WEIGHTS,
        &bytes,
        &place.store,
        &[ok(&bytes).cut(100_000), refused, ok(&bytes)],
    );
    assert!(fs::read(&place.model().unwrap().weights[0]).unwrap() == bytes);
}

#[test]
fn what_an_earlier_run_left_is_taken_up() {
    let place = place();
    let bytes = bytes(5000);
    place
        .hub
        .large(WEIGHTS, &bytes, &place.store, &[ok(&bytes).ranged()]);
    let part = place
        .repo()
        .join("blobs")
        .join(format!("{}.incomplete", sha256(&bytes)));
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, &bytes[..2000]).unwrap();
    let model = place.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    assert_eq!(place.store.asked()[0].headers["range"], "bytes=2000-");
    assert!(!part.exists());

    // What is not the file's beginning costs a second transfer, not the run; without a hash to tell by, nothing is taken up.
    fs::remove_dir_all(place.repo()).unwrap();
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, [0; 2000]).unwrap();
    fs::write(part.with_file_name("git-config.json.incomplete"), "xx").unwrap();
    let model = place.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    assert_eq!(fs::read(&model.config).unwrap(), b"{}");
}

#[test]
fn less_or_other_than_promised_is_refused_and_nothing_is_left() {
    let place = place();
    let bytes = bytes(3000);
    let mut other = bytes.clone();
    other[1500] ^= 1;
    let longer = [&bytes[..], b"more"].concat();
    let cases = [
        (ok(&bytes[..2000]), "less than it promised"),
        (ok(&bytes).cut(2000), "the connection broke"),
        (ok(&longer), "more than it promised"),
        (ok(&other), "not the file's"),
    ];
    for (reply, what) in cases {
        place.hub.large(WEIGHTS, &bytes, &place.store, &[reply]);
        let error = place.model().unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert_eq!(
            place.blobs(),
            ["git-README.md", "git-config.json"],
            "{what}"
        );
        assert!(
            !place
                .repo()
                .join("snapshots")
                .join(COMMIT)
                .join(WEIGHTS)
                .exists()
        );
    }
}

#[test]
fn offline_uses_the_cache_and_nothing_else() {
    let place = place();
    let error = place
        .offline()
        .model_metadata(ID, "main", &Silent)
        .unwrap_err();
    let hint = error.remedy().unwrap();
    assert!(
        hint.contains("HF_HUB_OFFLINE=0 wattune") && hint.contains("set model.id to"),
        "{error}"
    );
    place.hub.small("models", WEIGHTS, "w");
    let online = place.client().model_metadata(ID, "main", &Silent).unwrap();
    let before = place.hub.lines().len();
    let mut model = place.offline().model_metadata(ID, "main", &Silent).unwrap();
    assert_eq!(
        (&model.config, &model.commit, &model.license),
        (&online.config, &online.commit, &online.license)
    );
    let error = place
        .offline()
        .model_weights(&mut model, &Silent)
        .unwrap_err();
    assert!(
        error.to_string().contains("`model.safetensors` of model")
            && error.remedy().unwrap().contains("HF_HUB_OFFLINE=0"),
        "{error}"
    );
    assert_eq!(place.hub.lines().len(), before, "nothing was asked");

    place.model().unwrap();
    let before = place.hub.lines().len();
    let mut model = place.offline().model_metadata(ID, COMMIT, &Silent).unwrap();
    place.offline().model_weights(&mut model, &Silent).unwrap();
    assert_eq!(fs::read(&model.weights[0]).unwrap(), b"w");
    assert_eq!(place.hub.lines().len(), before, "nothing was asked");
}

#[test]
fn a_data_set_comes_as_the_files_of_its_split() {
    let place = place();
    let files = [
        ("data/train-00001-of-00002.parquet", "1"),
        ("data/train-00000-of-00002.parquet", "0"),
        ("data/test-00000-of-00001.parquet", "t"),
        ("README.md", ""),
    ];
    place.hub.repository("datasets", &files);
    let found = place
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
        !place
            .hub
            .lines()
            .iter()
            .any(|line| line.contains("test") || line.contains("README"))
    );
    assert!(
        place
            .folder
            .path()
            .join("datasets--owner--name/snapshots")
            .is_dir()
    );
    let error = place
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
        place
            .offline()
            .dataset(ID, "main", "train", &Silent)
            .unwrap(),
        found
    );
    let error = place
        .offline()
        .dataset(ID, "main", "test", &Silent)
        .unwrap_err();
    assert!(
        error.remedy().unwrap().contains("HF_HUB_OFFLINE=0"),
        "{error}"
    );
    fs::remove_file(&found.files[1]).unwrap();
    assert!(
        place
            .offline()
            .dataset(ID, "main", "train", &Silent)
            .is_err(),
        "half a split is no split"
    );
}

#[test]
fn runs_at_the_same_time_share_one_transfer() {
    let place = place();
    let bytes = bytes(200_000);
    place
        .hub
        .large(WEIGHTS, &bytes, &place.store, &[ok(&bytes)]);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| place.model().unwrap()))
            .collect();
        for run in runs {
            assert!(fs::read(&run.join().unwrap().weights[0]).unwrap() == bytes);
        }
    });
    assert_eq!(place.store.lines().len(), 1);
    let names = ["git-README.md", "git-config.json"].map(str::to_string);
    assert!(place.blobs().len() == 3 && names.iter().all(|name| place.blobs().contains(name)));
}

#[test]
fn a_hostile_answer_writes_nothing_outside_the_cache() {
    let place = place();
    let listing = "GET /api/models/owner/name/revision/main";
    for body in [
        format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"../../x\"}}]}}"),
        "{\"sha\": \"../../x\", \"siblings\": []}".to_string(),
        "<html>".to_string(),
    ] {
        place.hub.on(listing, &[ok(body.as_bytes())]);
        assert!(
            place.refused().remedy().unwrap().contains("HF_ENDPOINT"),
            "{body}"
        );
    }
    place.hub.repository("models", &[("config.json", "{}")]);
    let head = format!("HEAD {}", path_of("models", "config.json"));
    for headers in [
        [("ETag", "\"../../x\""), ("X-Repo-Commit", COMMIT)],
        [
            ("ETag", "\"x\""),
            ("X-Repo-Commit", "fedcba9876543210fedcba9876543210fedcba98"),
        ],
        [("ETag", "\"x\""), ("X-Other", "x")],
    ] {
        place.hub.on(&head, &[Reply::new(200, &headers)]);
        assert!(
            place.refused().remedy().unwrap().contains("HF_ENDPOINT"),
            "{headers:?}"
        );
    }
    assert!(!place.repo().exists());
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let place = place();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hub = place.open(Settings {
        endpoint: format!("http://{nobody}"),
        ..place.settings()
    });
    let error = hub.model_metadata(ID, "main", &Silent).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("cannot reach http://{nobody}")),
        "{error}"
    );
    assert!(
        error.remedy().unwrap().contains("HF_HUB_OFFLINE=1"),
        "{error}"
    );
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Progress for Log {
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
fn progress_is_told_once_for_every_byte() {
    let place = place();
    let log = Log::default();
    place.client().model_metadata(ID, "main", &log).unwrap();
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
            .model_metadata(ID, "main", &Silent)
            .unwrap();
        return;
    }
    let proxy = FakeHub::new();
    let listing =
        format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"config.json\"}}]}}");
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

#[test]
fn a_real_model_directory_is_whole() {
    let assets = std::env::var_os("WATTUNE_ASSETS").map_or(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"),
        Into::into,
    );
    let dir = assets.join("models/TinyStories-656K");
    if !dir.is_dir() {
        eprintln!(
            "skipped: a_real_model_directory_is_whole needs {}",
            dir.display()
        );
        return;
    }
    let model = wattune::hub::local_model(&dir).unwrap();
    assert_eq!(model.require_weights().unwrap(), [dir.join(WEIGHTS)]);
    assert_eq!(model.tokenizer_json, Some(dir.join("tokenizer.json")));
    assert_eq!(
        model.special_tokens_map,
        Some(dir.join("special_tokens_map.json"))
    );
}
