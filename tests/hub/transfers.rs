//! Transfers that break, resume, or bring the wrong bytes.

use super::*;

#[test]
fn a_broken_transfer_is_resumed() {
    let fixture = fixture();
    let bytes = bytes(300_000);
    let whole = ok(&bytes).ranged();
    // Five breaks where four attempts are allowed: each brought enough, so none counts against the next.
    let breaks = [100_000, 50_000, 20_000, 20_000, 20_000].map(|at| whole.clone().cut(at));
    fixture.hub.large(
        WEIGHTS,
        &bytes,
        &fixture.store,
        &[&breaks[..], &[whole]].concat(),
    );
    let model = fixture.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    let ranges: Vec<Option<String>> = fixture
        .store
        .requests()
        .iter()
        .map(|request| request.headers.get("range").cloned())
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
fn without_ranges_a_transfer_restarts() {
    let fixture = fixture();
    let bytes = bytes(300_000);
    fixture.hub.large(
        WEIGHTS,
        &bytes,
        &fixture.store,
        &[ok(&bytes).cut(100_000), ok(&bytes)],
    );
    assert!(fs::read(&fixture.model().unwrap().weights[0]).unwrap() == bytes);
    // A range that it does not know either: from the first byte.
    let refused = Reply::new(416, &[]);
    fs::remove_dir_all(fixture.repo()).unwrap();
    fixture.hub.large(
        WEIGHTS,
        &bytes,
        &fixture.store,
        &[ok(&bytes).cut(100_000), refused, ok(&bytes)],
    );
    assert!(fs::read(&fixture.model().unwrap().weights[0]).unwrap() == bytes);
}

#[test]
fn a_partial_download_of_an_earlier_run_is_resumed() {
    let fixture = fixture();
    let bytes = bytes(5000);
    fixture
        .hub
        .large(WEIGHTS, &bytes, &fixture.store, &[ok(&bytes).ranged()]);
    let part = fixture
        .repo()
        .join("blobs")
        .join(format!("{}.incomplete", sha256(&bytes)));
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, &bytes[..2000]).unwrap();
    let model = fixture.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    assert_eq!(fixture.store.requests()[0].headers["range"], "bytes=2000-");
    assert!(!part.exists());

    // What is not the file's beginning costs a second transfer, not the run; without a hash to tell by, nothing is taken up.
    fs::remove_dir_all(fixture.repo()).unwrap();
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, [0; 2000]).unwrap();
    fs::write(part.with_file_name("git-config.json.incomplete"), "xx").unwrap();
    let model = fixture.model().unwrap();
    assert!(fs::read(&model.weights[0]).unwrap() == bytes);
    assert_eq!(fs::read(&model.config).unwrap(), b"{}");
}

#[test]
fn a_wrong_size_or_hash_is_refused_and_nothing_is_left() {
    let fixture = fixture();
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
        fixture.hub.large(WEIGHTS, &bytes, &fixture.store, &[reply]);
        let error = fixture.model().unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert_eq!(
            fixture.blobs(),
            ["git-README.md", "git-config.json"],
            "{what}"
        );
        assert!(
            !fixture
                .repo()
                .join("snapshots")
                .join(COMMIT)
                .join(WEIGHTS)
                .exists()
        );
    }
}

#[test]
fn concurrent_runs_share_one_transfer() {
    let fixture = fixture();
    let bytes = bytes(200_000);
    fixture
        .hub
        .large(WEIGHTS, &bytes, &fixture.store, &[ok(&bytes)]);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| fixture.model().unwrap()))
            .collect();
        for run in runs {
            assert!(fs::read(&run.join().unwrap().weights[0]).unwrap() == bytes);
        }
    });
    assert_eq!(fixture.store.lines().len(), 1);
    let names = ["git-README.md", "git-config.json"].map(str::to_string);
    assert!(fixture.blobs().len() == 3 && names.iter().all(|name| fixture.blobs().contains(name)));
}

#[test]
fn a_stalled_server_is_disconnected_with_a_word() {
    let fixture = fixture();
    let bytes = bytes(3000);
    let drip = ok(&bytes).dripping(Duration::from_millis(20));
    fixture.hub.large(WEIGHTS, &bytes, &fixture.store, &[drip]);
    let policy = RetryPolicy {
        max_attempts: 2,
        stall_timeout: Duration::from_millis(300),
        ..POLICY
    };
    let hub = Hub::with_retry_policy(fixture.settings(), policy).unwrap();
    let log = Log::default();
    let mut model = hub.model(ID, "main", &Silent).unwrap();
    let start = Instant::now();
    let error = hub.model_weights(&mut model, &log).unwrap_err().to_string();
    assert!(error.contains("less than 1 KB/s"), "{error}");
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "all of it takes 60 s"
    );
    let log = log.0.lock().unwrap();
    let told = |line: &&String| line.contains("stalled") && line.ends_with("again in 0 s");
    assert_eq!(log.iter().filter(told).count(), 1, "{log:?}");
}

#[test]
fn a_file_stored_in_git_is_verified() {
    let fixture = fixture();
    // `printf '{}' | git hash-object --stdin`, and its plain SHA-1, which some mirrors send.
    let (blob, plain) = (
        "9e26dfeeb6e641a33dae4961196235bdb965b21b",
        "bf21a9e8fbc5a3846fb05b4fa0859e0917b2202f",
    );
    let path = path_of("models", "config.json");
    let serve = |etag: &str, body: &[u8]| {
        let headers = [("ETag", etag), ("X-Repo-Commit", COMMIT)];
        for method in ["HEAD", "GET"] {
            let reply = Reply::new(200, &headers).body(body);
            fixture.hub.on(&format!("{method} {path}"), &[reply]);
        }
    };
    serve(blob, b"[]");
    let error = fixture.refused().to_string();
    assert!(
        error.contains("not the file's") && error.contains(blob),
        "{error}"
    );
    assert!(fixture.blobs().is_empty(), "{:?}", fixture.blobs());
    for etag in [blob, plain] {
        serve(etag, b"{}");
        fixture.client().model(ID, "main", &Silent).unwrap();
        assert!(fixture.blobs().contains(&etag.to_string()));
        fs::remove_dir_all(fixture.repo()).unwrap();
    }
}

#[test]
fn a_compressed_answer_is_refused() {
    let fixture = fixture();
    let headers = [("ETag", "\"x\""), ("X-Repo-Commit", COMMIT)];
    let path = path_of("models", "config.json");
    let head = Reply::new(200, &headers).body(b"{}");
    let get = Reply::new(200, &[("Content-Encoding", "gzip")]).body(b"{}");
    fixture.hub.on(&format!("HEAD {path}"), &[head]);
    fixture.hub.on(&format!("GET {path}"), &[get]);
    let error = fixture.refused().to_string();
    assert!(
        error.contains("compressed") && error.contains("gzip"),
        "{error}"
    );
    assert!(fixture.blobs().is_empty());
}

#[test]
fn a_file_too_large_for_its_kind_or_the_disk_is_refused_before_its_first_byte() {
    let fixture = fixture();
    let size = |bytes: u64| {
        let bytes = bytes.to_string();
        let headers = [
            ("ETag", "\"x\""),
            ("X-Repo-Commit", COMMIT),
            ("X-Linked-Size", &bytes),
        ];
        [Reply::new(200, &headers)]
    };
    let line = |name: &str| format!("HEAD {}", path_of("models", name));
    fixture.hub.on(&line("config.json"), &size(3 << 30));
    let error = fixture.refused().to_string();
    assert!(error.contains("too large for its kind"), "{error}");
    fixture.hub.on(&line("config.json"), &size(2));
    fixture.hub.on(&line(WEIGHTS), &size(1 << 60));
    let error = fixture.model().unwrap_err();
    assert!(error.to_string().contains("disk is too full"), "{error}");
    assert!(error.remedy().unwrap().contains("HF_HOME"));
    assert_eq!(
        fixture
            .hub
            .count(&format!("GET {}", path_of("models", WEIGHTS))),
        0
    );
    assert!(
        fixture
            .blobs()
            .iter()
            .all(|name| !name.contains("incomplete"))
    );
}

/// A repository of GGUF files alone has no configuration: one of its files is fetched by its name.
#[test]
fn one_file_is_fetched_by_its_name() {
    let fixture = fixture();
    let bytes = bytes(3000);
    let files = [
        ("README.md", ""),
        ("small-Q4_0.gguf", ""),
        ("large-Q8_0.gguf", ""),
    ];
    fixture.hub.repository("models", &files);
    fixture
        .hub
        .large("small-Q4_0.gguf", &bytes, &fixture.store, &[ok(&bytes)]);
    let fetched = fixture
        .client()
        .model_file(ID, "main", "small-Q4_0.gguf", &Silent)
        .unwrap();
    assert_eq!(fetched.commit, COMMIT);
    assert!(fs::read(&fetched.path).unwrap() == bytes);
    assert_eq!(fetched.path.extension().unwrap(), "gguf");
    // In the cache now; another is not, and the listing says which there are.
    let again = fixture
        .offline()
        .model_file(ID, "main", "small-Q4_0.gguf", &Silent)
        .unwrap();
    assert_eq!(again, fetched);
    let error = fixture
        .client()
        .model_file(ID, "main", "small.gguf", &Silent)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("small-Q4_0.gguf, large-Q8_0.gguf")
            || error.contains("large-Q8_0.gguf, small-Q4_0.gguf"),
        "{error}"
    );
    let error = fixture.refused().to_string();
    assert!(error.contains("--model-file"), "{error}");
}
