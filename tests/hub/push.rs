//! `wattune push`, from a finished run to one commit.

use std::process::{Command, Output};

use serde_json::{Value, json};

use super::*;

const REPOSITORY: &str = "GET /api/models/owner/name";
const CREATE: &str = "POST /api/repos/create";
const PREUPLOAD: &str = "POST /api/models/owner/name/preupload/main";
const UPLOAD: &str = "POST /api/models/owner/name/commit/main";
const FILES: [&str; 3] = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
];

/// A hub without the repository, and a run directory with the files of a finished run.
struct Push(Fixture);

impl Push {
    fn new() -> Self {
        let fixture = fixture();
        let run = fixture.folder.path().join("run");
        fs::create_dir_all(run.join("adapter")).unwrap();
        for file in ["recipe.toml", "plan.json", "report.json"] {
            fs::write(run.join(file), "").unwrap();
        }
        for file in FILES {
            fs::write(run.join("adapter").join(file), file).unwrap();
        }
        let modes = FILES.map(|path| json!({ "path": path, "uploadMode": "regular" }));
        let replies = [
            (CREATE, json!({ "url": "unused" })),
            (PREUPLOAD, json!({ "files": modes })),
            (UPLOAD, json!({ "commitOid": COMMIT })),
        ];
        for (line, body) in replies {
            fixture.hub.on(line, &[reply(&body)]);
        }
        Self(fixture)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wattune"));
        command
            .args(["push", "run", "--repo", ID])
            .args(arguments)
            .current_dir(self.0.folder.path())
            .env("HF_HOME", self.0.folder.path())
            .env("HF_ENDPOINT", &self.0.hub.address)
            .env("HF_TOKEN", "hf_secret")
            .env_remove("HF_HUB_OFFLINE");
        command
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = hide_and_seek(self.command(&[arguments, &["--json"]].concat()));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The message of a refusal with this exit status.
    fn refused(&self, command: Command) -> String {
        let output = hide_and_seek(command);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    }
}

fn reply(body: &Value) -> Reply {
    ok(body.to_string().as_bytes())
}

/// Runs a command whose output must not contain the token.
fn hide_and_seek(mut command: Command) -> Output {
    let output = command.env("RUST_LOG", "trace").output().unwrap();
    for text in [&output.stdout, &output.stderr] {
        assert!(!String::from_utf8_lossy(text).contains("hf_secret"));
    }
    output
}

#[test]
fn a_run_becomes_one_commit_of_a_new_repository() {
    let push = Push::new();
    let uploaded = push.json(&["--private"]);
    let hub = &push.0.hub;
    let expected = json!({
        "repo": ID,
        "url": format!("{}/{ID}", hub.address),
        "commit": COMMIT,
        "pull_request": null,
    });
    assert_eq!(uploaded, expected);
    assert_eq!(hub.lines(), [REPOSITORY, CREATE, PREUPLOAD, UPLOAD]);
    let requests = hub.requests();
    let bearer = |request: &Request| request.headers["authorization"] == "Bearer hf_secret";
    assert!(requests.iter().all(bearer));
    let create: Value = serde_json::from_str(&requests[1].body).unwrap();
    let expected =
        json!({ "name": "name", "organization": "owner", "private": true, "type": "model" });
    assert_eq!(create, expected);
    let lines = requests[3].body.lines();
    let lines: Vec<Value> = lines.map(|l| serde_json::from_str(l).unwrap()).collect();
    let summary = lines[0]["value"]["summary"].as_str().unwrap();
    assert!(summary.starts_with("Upload with wattune"), "{summary}");
    let mut files: Vec<&str> = lines[1..]
        .iter()
        .map(|line| line["value"]["path"].as_str().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, FILES);
    let card = lines.iter().find(|line| line["value"]["path"] == FILES[0]);
    // base64 of "README.md".
    assert_eq!(card.unwrap()["value"]["content"], "UkVBRE1FLm1k");
}

#[test]
fn an_existing_repository_gets_a_pull_request() {
    let push = Push::new();
    let hub = &push.0.hub;
    let existing = json!({ "id": ID, "private": false });
    hub.on(REPOSITORY, &[reply(&existing)]);
    let line = format!("{UPLOAD}?create_pr=1");
    hub.on(&line, &[reply(&json!({ "prUrl": "https://hub/pr/1" }))]);
    let uploaded = push.json(&["--create-pr"]);
    assert_eq!(uploaded["pull_request"], "https://hub/pr/1");
    assert_eq!(hub.lines(), [REPOSITORY, PREUPLOAD, &line]);

    let message = push.refused(push.command(&["--private"]));
    assert!(
        message.contains("exists and is public") && message.contains("/settings"),
        "{message}"
    );
}

#[test]
fn a_rate_limit_is_waited_for() {
    let push = Push::new();
    let hub = &push.0.hub;
    let limited = Reply::new(429, &[("Retry-After", "0")]);
    let good = hub.next(PREUPLOAD);
    hub.on(PREUPLOAD, &[limited, good]);
    push.json(&[]);
    assert_eq!((hub.count(PREUPLOAD), hub.count(UPLOAD)), (2, 1));
}

#[test]
fn every_refusal_has_a_remedy() {
    let push = Push::new();
    let hub = &push.0.hub;
    let refused = |change: &dyn Fn(&mut Command)| {
        let mut command = push.command(&[]);
        change(&mut command);
        push.refused(command)
    };
    let message = refused(&|command| _ = command.env_remove("HF_TOKEN"));
    assert!(
        message.contains("an upload needs a token") && message.contains("hint: set HF_TOKEN"),
        "{message}"
    );
    let message = refused(&|command| _ = command.env("HF_HUB_OFFLINE", "1"));
    assert!(
        message.contains("HF_HUB_OFFLINE=0 wattune push"),
        "{message}"
    );
    let message = refused(&|command| _ = command.current_dir(std::env::temp_dir()));
    assert!(message.contains("not a run directory"), "{message}");
    let card = push.0.folder.path().join("run/adapter/README.md");
    fs::rename(&card, card.with_extension("away")).unwrap();
    let message = refused(&|_| {});
    assert!(
        message.contains("no result to upload") && message.contains("--resume run"),
        "{message}"
    );
    fs::rename(card.with_extension("away"), &card).unwrap();
    assert!(hub.lines().is_empty(), "refused before the first request");

    let cases = [
        (401, "", "does not accept the token", "/settings/tokens"),
        (403, "", "may not write to `owner/name`", "change --repo"),
        (409, "", "refuses the request: 409", "look at "),
    ];
    for (status, code, what, hint) in cases {
        let headers = [
            ("X-Error-Code", code),
            ("X-Error-Message", "hf_secret is bad"),
        ];
        hub.on(PREUPLOAD, &[Reply::new(status, &headers)]);
        let message = refused(&|_| {});
        assert!(
            message.contains(what) && message.contains(hint),
            "{status}: {message}"
        );
    }
}
