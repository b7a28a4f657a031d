//! Transfers that break, resume, or bring the wrong bytes.

use super::*;

#[test]
fn a_broken_transfer_is_resumed() {
    let fixture = fixture();
    let bytes = bytes(300_000);
    let whole = ok(&bytes).ranged();
    // Five breaks where four attempts are allowed: each brought something, so none counts against the next.
    let breaks = [100_000, 50_000, 10_000, 10_000, 10_000].map(|at| whole.clone().cut(at));
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
