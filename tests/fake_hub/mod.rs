//! A hub on loopback that answers by script and records its requests.
//!
//! It speaks HTTP/1.1 and answers as the hub does: a listing under `/api`, `resolve` addresses with `X-Repo-Commit`, ETags,
//! redirects of large files to another host with `X-Linked-Etag` and `X-Linked-Size`. It can be told to refuse, to break a
//! connection and to send what it should not.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const ID: &str = "owner/name";

/// One answer.
#[derive(Clone, Default)]
pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The connection breaks after so many bytes of the body.
    cut: Option<usize>,
    /// A Range header is honoured.
    ranged: bool,
    /// The body comes one byte at a time, with this pause after each.
    pause: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, headers: &[(&'static str, &str)]) -> Self {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, value.to_string()))
            .collect();
        Self {
            status,
            headers,
            ..Self::default()
        }
    }

    pub fn body(self, body: &[u8]) -> Self {
        Self {
            body: body.to_vec(),
            ..self
        }
    }

    pub fn cut(self, at: usize) -> Self {
        Self {
            cut: Some(at),
            ..self
        }
    }

    pub fn dripping(self, pause: Duration) -> Self {
        Self {
            pause: Some(pause),
            ..self
        }
    }

    pub fn ranged(self) -> Self {
        Self {
            ranged: true,
            ..self
        }
    }
}

/// A request: "METHOD path", the headers in lower case, the body.
#[derive(Clone)]
pub struct Request {
    pub line: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

#[derive(Default)]
struct Script {
    /// The replies of a line, in order; the last is repeated.
    replies: HashMap<String, Vec<Reply>>,
    requests: Vec<Request>,
}

/// A hub that answers by script and records its requests.
#[derive(Clone)]
pub struct FakeHub {
    pub address: String,
    script: Arc<Mutex<Script>>,
}

impl FakeHub {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            script: Arc::default(),
        };
        let script = hub.script.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let script = script.clone();
                std::thread::spawn(move || answer(stream, &script));
            }
        });
        hub
    }

    pub fn on(&self, line: &str, replies: &[Reply]) {
        self.script
            .lock()
            .unwrap()
            .replies
            .insert(line.to_string(), replies.to_vec());
    }

    /// The next reply to a line.
    pub fn next(&self, line: &str) -> Reply {
        self.script.lock().unwrap().replies[line][0].clone()
    }

    /// A repository with these files, all stored in git: served by the hub itself.
    pub fn repository(&self, plural: &str, files: &[(&str, &str)]) {
        let siblings: Vec<String> = files
            .iter()
            .map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}"))
            .collect();
        let listing = format!(
            "{{\"id\": \"{ID}\", \"sha\": \"{COMMIT}\", \"siblings\": [{}]}}",
            siblings.join(", ")
        );
        self.on(
            &format!("GET /api/{plural}/{ID}/revision/main"),
            &[Reply::new(200, &[]).body(listing.as_bytes())],
        );
        files
            .iter()
            .for_each(|(name, text)| self.small(plural, name, text));
    }

    /// A file stored in git. The ETag stands for git's hash; the hub never sends one with a path in it.
    pub fn small(&self, plural: &str, name: &str, text: &str) {
        let etag = format!("\"git-{}\"", name.replace('/', "-"));
        let reply =
            Reply::new(200, &[("ETag", &etag), ("X-Repo-Commit", COMMIT)]).body(text.as_bytes());
        let path = path_of(plural, name);
        self.on(&format!("HEAD {path}"), std::slice::from_ref(&reply));
        self.on(&format!("GET {path}"), &[reply]);
    }

    /// A large file: the hub redirects to `store`, which replies to a GET as told.
    pub fn large(&self, name: &str, bytes: &[u8], store: &FakeHub, replies: &[Reply]) {
        let (etag, size) = (format!("\"{}\"", sha256(bytes)), bytes.len().to_string());
        let location = format!("{}/store/{name}?signature=secret", store.address);
        let headers = [
            ("Location", location.as_str()),
            ("X-Linked-Etag", &etag),
            ("X-Linked-Size", &size),
            ("X-Repo-Commit", COMMIT),
        ];
        let redirect = Reply::new(302, &headers).body(b"Found. Redirecting");
        let path = path_of("models", name);
        self.on(&format!("HEAD {path}"), std::slice::from_ref(&redirect));
        self.on(&format!("GET {path}"), &[redirect]);
        store.on(&format!("GET /store/{name}?signature=secret"), replies);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.script.lock().unwrap().requests.clone()
    }

    pub fn lines(&self) -> Vec<String> {
        self.requests()
            .into_iter()
            .map(|request| request.line)
            .collect()
    }

    pub fn count(&self, line: &str) -> usize {
        self.lines()
            .iter()
            .filter(|request| *request == line)
            .count()
    }
}

pub fn path_of(plural: &str, name: &str) -> String {
    let prefix = if plural == "datasets" {
        "/datasets"
    } else {
        ""
    };
    format!("{prefix}/{ID}/resolve/{COMMIT}/{name}")
}

fn answer(stream: TcpStream, script: &Mutex<Script>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut text = String::new();
    while reader.read_line(&mut text).is_ok_and(|read| read > 2) {}
    let mut lines = text.lines();
    let line = lines
        .next()
        .unwrap_or_default()
        .trim_end_matches(" HTTP/1.1")
        .to_string();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()));
    let mut request = Request {
        line: line.clone(),
        headers: headers.collect(),
        body: String::new(),
    };
    let length = request.headers.get("content-length");
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body).unwrap();
    request.body = String::from_utf8(body).unwrap();
    let from = request.headers.get("range").and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let reply = {
        let mut script = script.lock().unwrap();
        script.requests.push(request);
        match script.replies.get_mut(&line) {
            Some(replies) if replies.len() > 1 => replies.remove(0),
            Some(replies) => replies[0].clone(),
            None => Reply::new(404, &[("X-Error-Code", "EntryNotFound")]),
        }
    };
    let _ = send(stream, &line, reply, from);
}

fn send(
    mut stream: TcpStream,
    line: &str,
    mut reply: Reply,
    from: Option<usize>,
) -> std::io::Result<()> {
    if let Some(from) = from.filter(|_| reply.ranged && reply.status == 200) {
        reply.headers.push((
            "Content-Range",
            format!("bytes {from}-{}/{}", reply.body.len() - 1, reply.body.len()),
        ));
        reply.body.drain(..from);
        reply.status = 206;
    }
    write!(
        stream,
        "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
        reply.status,
        reply.body.len()
    )?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    if !line.starts_with("HEAD ") {
        let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
        match reply.pause {
            None => stream.write_all(body)?,
            Some(pause) => {
                for byte in body {
                    stream.write_all(&[*byte])?;
                    std::thread::sleep(pause);
                }
            }
        }
    }
    stream.flush()
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
