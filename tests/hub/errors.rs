//! Refusals, retries, the token, and answers that are not a hub's.

use super::*;

#[test]
fn the_token_is_sent_to_the_hub_alone() {
    let fixture = fixture();
    let bytes = bytes(100);
    fixture
        .hub
        .large(WEIGHTS, &bytes, &fixture.store, &[ok(&bytes)]);
    let hub = fixture.with_token();
    let mut model = hub.model(ID, "main", &Silent).unwrap();
    hub.model_weights(&mut model, &Silent).unwrap();
    assert!(
        fixture
            .hub
            .requests()
            .iter()
            .all(|request| request.headers["authorization"] == "Bearer hf_secret")
    );
    assert_eq!(
        fixture.store.lines(),
        ["GET /store/model.safetensors?signature=secret"]
    );
    assert!(
        fixture
            .store
            .requests()
            .iter()
            .all(|request| !request.headers.contains_key("authorization"))
    );
}

#[test]
fn a_relative_redirect_is_followed_with_the_token() {
    let fixture = fixture();
    let moved = Reply::new(
        307,
        &[
            ("Location", "/api/resolve-cache/config.json"),
            ("X-Repo-Commit", COMMIT),
        ],
    );
    for method in ["HEAD", "GET"] {
        fixture.hub.on(
            &format!("{method} {}", path_of("models", "config.json")),
            std::slice::from_ref(&moved),
        );
        let headers = [("ETag", "\"e1\""), ("X-Repo-Commit", COMMIT)];
        let reply = Reply::new(200, &headers).body(b"{\"moved\": 1}");
        fixture.hub.on(
            &format!("{method} /api/resolve-cache/config.json"),
            &[reply],
        );
    }
    let model = fixture.with_token().model(ID, "main", &Silent).unwrap();
    assert_eq!(fs::read(&model.config).unwrap(), b"{\"moved\": 1}");
    assert!(fixture.blobs().contains(&"e1".to_string()));
    let requests = fixture.hub.requests();
    let cached: Vec<&Request> = requests
        .iter()
        .filter(|request| request.line.ends_with("resolve-cache/config.json"))
        .collect();
    assert!(
        cached.len() == 2
            && cached
                .iter()
                .all(|request| request.headers.contains_key("authorization"))
    );
}

#[test]
fn every_refusal_has_a_remedy() {
    let fixture = fixture();
    let listing = "GET /api/models/owner/name/revision/main";
    let page = format!("{}/owner/name", fixture.hub.address);
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
        fixture
            .hub
            .on(listing, &[Reply::new(status, &[("X-Error-Code", code)])]);
        let error = fixture.refused();
        assert_eq!((error.kind(), error.exit_status()), (Kind::Hub, 2));
        assert!(
            error.to_string().contains(what) && error.remedy().unwrap().contains(&hint),
            "{status} {code}: {error}"
        );
    }
    assert_eq!(
        fixture.hub.count(listing),
        7,
        "none of these is tried again"
    );

    fixture.hub.repository(
        "models",
        &[("config.json", "{}"), ("README.md", ""), (WEIGHTS, "")],
    );
    fixture.hub.on(
        &format!("HEAD {}", path_of("models", "README.md")),
        &[Reply::new(404, &[("X-Error-Code", "EntryNotFound")])],
    );
    assert!(
        fixture
            .refused()
            .to_string()
            .contains("has no file `README.md`")
    );
}

#[test]
fn no_error_contains_the_token() {
    let fixture = fixture();
    for status in [401, 403, 404, 500, 418] {
        let reply = Reply::new(status, &[("X-Error-Message", "token hf_secret is bad")]);
        fixture
            .hub
            .on("GET /api/models/owner/name/revision/main", &[reply]);
        let error = fixture.with_token().model(ID, "main", &Silent).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(
            !shown.contains("hf_secret") && shown.contains("token <token> is bad"),
            "{shown}"
        );
    }
    assert!(!format!("{:?}", fixture.with_token()).contains("hf_secret"));
    // A signed link is a secret too.
    let bytes = bytes(10);
    fixture
        .hub
        .repository("models", &[("config.json", "{}"), (WEIGHTS, "")]);
    fixture
        .hub
        .large(WEIGHTS, &bytes, &fixture.store, &[Reply::new(403, &[])]);
    let error = fixture.model().unwrap_err().to_string();
    assert!(!error.contains("signature"), "{error}");
}

#[test]
fn a_rate_limit_is_waited_for_up_to_the_maximum() {
    let fixture = fixture();
    let listing = "GET /api/models/owner/name/revision/main";
    let good = fixture.hub.next(listing);
    fixture
        .hub
        .on(listing, &[Reply::new(429, &[("Retry-After", "1")]), good]);
    let start = Instant::now();
    fixture.client().model(ID, "main", &Silent).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));

    // Not twice: the maximum holds for all attempts together.
    fixture
        .hub
        .on(listing, &[Reply::new(429, &[("Retry-After", "2")])]);
    let log = Log::default();
    let error = fixture.client().model(ID, "main", &log).unwrap_err();
    assert!(error.remedy().unwrap().contains("wait 2 s"), "{error}");
    let said = ["the hub limits the rate of requests; again in 2 s"];
    assert_eq!(*log.0.lock().unwrap(), said);

    fixture
        .hub
        .on(listing, &[Reply::new(429, &[("Retry-After", "3600")])]);
    let start = Instant::now();
    let error = fixture.refused();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(error.remedy().unwrap().contains("wait 3600 s"), "{error}");
}

#[test]
fn server_errors_are_retried_a_few_times() {
    let fixture = fixture();
    let listing = "GET /api/models/owner/name/revision/main";
    let good = fixture.hub.next(listing);
    fixture
        .hub
        .on(listing, &[Reply::new(503, &[]), Reply::new(500, &[]), good]);
    fixture.client().model(ID, "main", &Silent).unwrap();
    assert_eq!(fixture.hub.count(listing), 3);
    fixture.hub.on(listing, &[Reply::new(502, &[])]);
    assert!(fixture.refused().to_string().contains("502"));
    assert_eq!(fixture.hub.count(listing), 3 + 4);
}

#[test]
fn a_hostile_answer_writes_nothing_outside_the_cache() {
    let fixture = fixture();
    let listing = "GET /api/models/owner/name/revision/main";
    for body in [
        format!(
            "{{\"id\": \"x\", \"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"../../x\"}}]}}"
        ),
        "{\"id\": \"x\", \"sha\": \"../../x\", \"siblings\": []}".to_string(),
        "<html>".to_string(),
    ] {
        fixture.hub.on(listing, &[ok(body.as_bytes())]);
        assert!(
            fixture.refused().remedy().unwrap().contains("HF_ENDPOINT"),
            "{body}"
        );
    }
    fixture.hub.repository("models", &[("config.json", "{}")]);
    let head = format!("HEAD {}", path_of("models", "config.json"));
    for headers in [
        [("ETag", "\"../../x\""), ("X-Repo-Commit", COMMIT)],
        [
            ("ETag", "\"x\""),
            ("X-Repo-Commit", "fedcba9876543210fedcba9876543210fedcba98"),
        ],
        [("ETag", "\"x\""), ("X-Other", "x")],
    ] {
        fixture.hub.on(&head, &[Reply::new(200, &headers)]);
        assert!(
            fixture.refused().remedy().unwrap().contains("HF_ENDPOINT"),
            "{headers:?}"
        );
    }
    assert!(!fixture.repo().exists());
}

#[test]
fn an_unreachable_hub_is_named() {
    let fixture = fixture();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hub = fixture.open(Settings {
        endpoint: format!("http://{nobody}"),
        ..fixture.settings()
    });
    let error = hub.model(ID, "main", &Silent).unwrap_err();
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

#[test]
fn a_delay_is_seconds_or_a_date() {
    let fixture = fixture();
    let head = format!("HEAD {}", path_of("models", "config.json"));
    let good = fixture.hub.next(&head);
    let refuse = |delay: &str| Reply::new(503, &[("Retry-After", delay)]);
    let past = refuse("Wed, 21 Oct 2015 07:28:00 GMT");
    fixture
        .hub
        .on(&head, &[past, refuse("0"), refuse("tomorrow"), good]);
    fixture.client().model(ID, "main", &Silent).unwrap();
    assert_eq!(fixture.hub.count(&head), 4);

    fs::remove_dir_all(fixture.repo()).unwrap();
    let later = chrono::Utc::now() + chrono::Duration::seconds(3600);
    let later = later.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    fixture
        .hub
        .on(&head, &[Reply::new(429, &[("Retry-After", &later)])]);
    let error = fixture.refused();
    assert!(error.remedy().unwrap().contains("wait 35"), "{error}");
}

#[test]
fn a_servers_message_is_one_short_line() {
    let fixture = fixture();
    let message = |text: &str| {
        let reply = Reply::new(418, &[("X-Error-Message", text)]);
        fixture
            .hub
            .on("GET /api/models/owner/name/revision/main", &[reply]);
        let error = fixture.with_token().model(ID, "main", &Silent);
        error.unwrap_err().to_string()
    };
    let error = message("your hf_secret\tis bad");
    assert!(error.contains("value: your <token>is bad\n"), "{error}");
    assert!(message(&"x".repeat(900)).contains(&format!(" {}\n", "x".repeat(200))));
}

#[test]
fn an_invalid_endpoint_is_refused_without_its_password() {
    for bad in ["huggingface.co", "ftp://x", "", "me:secret@host"] {
        let settings = Settings {
            cache: "/c".into(),
            endpoint: bad.into(),
            token: None,
            offline: false,
        };
        let error = Hub::new(settings).unwrap_err().to_string();
        assert!(
            error.contains("HF_ENDPOINT=") && !error.contains("secret"),
            "{error}"
        );
    }
}

#[test]
fn no_address_in_an_error_has_a_password() {
    let fixture = fixture();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hub = fixture.open(Settings {
        endpoint: format!("http://me:secret@{nobody}/p/?sig=secret#secret"),
        ..fixture.settings()
    });
    let error = hub.model(ID, "main", &Silent).unwrap_err().to_string();
    assert!(
        error.contains(&format!("cannot reach http://{nobody}/p")),
        "{error}"
    );
    assert!(!error.contains("secret"), "{error}");
}

#[test]
fn a_redirect_within_the_hub_has_a_size_of_its_own() {
    let fixture = fixture();
    let path = path_of("models", "config.json");
    let moved = Reply::new(307, &[("Location", "/cached")]).body(&[b'x'; 99]);
    let there = [("ETag", "W/\"git\""), ("X-Repo-Commit", COMMIT)];
    let there = Reply::new(200, &there).body(b"{    }");
    for method in ["HEAD", "GET"] {
        fixture
            .hub
            .on(&format!("{method} {path}"), std::slice::from_ref(&moved));
        fixture
            .hub
            .on(&format!("{method} /cached"), std::slice::from_ref(&there));
    }
    let model = fixture.client().model(ID, "main", &Silent).unwrap();
    assert_eq!(fs::read(model.config).unwrap(), b"{    }");
    assert!(fixture.blobs().contains(&"git".to_string()));
}

// Examples of huggingface_hub's `validate_repo_id`.
#[test]
fn ids_and_revisions_are_validated() {
    let fixture = fixture();
    let refused = |id: &str, revision: &str| {
        fixture
            .client()
            .model(id, revision, &Silent)
            .unwrap_err()
            .to_string()
    };
    for id in [
        "123",
        "foo",
        "foo/bar",
        "Foo-BAR_foo.bar123",
        "HuggingFaceTB/SmolLM2-135M",
    ] {
        assert!(refused(id, "main").contains("the hub has no model"), "{id}");
    }
    let before = fixture.hub.lines().len();
    for id in [
        "",
        "datasets/foo/bar",
        ".repo_id",
        "foo--bar",
        "foo..bar",
        "foo.git",
        "a/../b",
        "-x",
        "x y",
        "a/",
        "/a",
    ] {
        assert!(refused(id, "main").contains("rule: `owner/name`"), "{id}");
    }
    for revision in [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "C:x",
        "a\\..\\b",
        "",
        "a\nb",
    ] {
        assert!(
            refused(ID, revision).contains("not a valid revision"),
            "{revision}"
        );
    }
    assert_eq!(fixture.hub.lines().len(), before);
}
