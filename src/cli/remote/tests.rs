//! Against a server of our own on the loopback.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;

/// What the server does with a request: its path and its range.
type Answer = dyn Fn(&str, Option<(u64, u64)>) -> Vec<u8> + Send + Sync;

/// The same without anything of its surroundings.
type Plain = fn(&str, Option<(u64, u64)>) -> Vec<u8>;

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answer: impl Fn(&str, Option<(u64, u64)>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer): (_, Arc<Answer>) = (requests.clone(), Arc::new(answer));
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, seen, answer) = (stream.unwrap(), seen.clone(), answer.clone());
                thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    let first = lines.next().unwrap().unwrap();
                    let headers: Vec<String> =
                        lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
                    let range = headers.iter().find_map(|h| {
                        let (first, last) = h
                            .to_lowercase()
                            .strip_prefix("range: bytes=")?
                            .split_once('-')
                            .map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap()))?;
                        Some((first, last))
                    });
                    let path = first.split(' ').nth(1).unwrap().to_owned();
                    seen.lock().unwrap().push(format!("{path} {range:?}"));
                    // The client hangs up as soon as it has what it wants.
                    let _ = stream.write_all(&answer(&path, range));
                });
            }
        });
        Self { address, requests }
    }

    fn open(&self, path: &str) -> Result<Model, RemoteError> {
        open_with(&agent(None), &format!("{}{path}", self.address))
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn reply(status: &str, headers: &[String], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status}\r\nConnection: close\r\n").into_bytes();
    headers.iter().for_each(|h| out.extend(format!("{h}\r\n").bytes()));
    out.extend(b"\r\n");
    out.extend(body);
    out
}

/// A part of a file whose start is `file` and which is zeros up to `length`.
fn part(file: &[u8], length: u64, range: (u64, u64)) -> Vec<u8> {
    let (first, last) = (range.0, range.1.min(length - 1));
    let count = usize::try_from(last + 1 - first).unwrap();
    let first_index = usize::try_from(first).unwrap().min(file.len());
    let mut body: Vec<u8> = file[first_index..].iter().copied().take(count).collect();
    body.resize(count, 0);
    let headers =
        [format!("Content-Length: {count}"), format!("Content-Range: bytes {first}-{last}/{length}")];
    reply("206 Partial Content", &headers, &body)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A header with a vocabulary of so many tokens and one tensor of 4 KiB, and the length of its file.
fn model(tokens: u64, shard: Option<(u16, u16)>) -> (Vec<u8>, u64) {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(1_u64.to_le_bytes());
    out.extend((5 + 2 * u64::from(shard.is_some())).to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    text(&mut out, "llama");
    for (key, value) in
        [("llama.block_count", 1_u32), ("llama.embedding_length", 64), ("llama.context_length", 4096)]
    {
        text(&mut out, key);
        out.extend(4_u32.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
    if let Some((number, count)) = shard {
        for (key, value) in [("split.no", number), ("split.count", count)] {
            text(&mut out, key);
            out.extend(2_u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
    }
    text(&mut out, "tokenizer.ggml.tokens");
    out.extend([9_u32.to_le_bytes(), 8_u32.to_le_bytes()].concat());
    out.extend(tokens.to_le_bytes());
    (0..tokens).for_each(|n| text(&mut out, &format!("{n:08}")));
    text(&mut out, &format!("blk.{}.attn_q.weight", shard.map_or(0, |s| s.0)));
    out.extend(2_u32.to_le_bytes());
    out.extend(64_u64.to_le_bytes());
    out.extend(16_u64.to_le_bytes());
    out.extend(0_u32.to_le_bytes());
    out.extend(0_u64.to_le_bytes());
    let length = (out.len() as u64).next_multiple_of(32) + 4096;
    (out, length)
}

#[test]
fn a_small_header_takes_one_request() {
    let (file, length) = model(10, None);
    let server = Server::start(move |_, range| part(&file, length, range.unwrap()));
    let model = server.open("/x.gguf?download=true").unwrap();
    assert_eq!((model.architecture(), model.vocab_size(), model.file_bytes()), ("llama", 10, length));
    assert_eq!(server.requests(), [format!("/x.gguf?download=true Some((0, {}))", FIRST - 1)]);
}

#[test]
fn a_large_header_takes_two() {
    // 16 bytes a token: a header of about 3 MiB.
    let (file, length) = model(200_000, None);
    assert!(file.len() as u64 > 2 * FIRST);
    let server = Server::start(move |_, range| part(&file, length, range.unwrap()));
    assert_eq!(server.open("/x.gguf").unwrap().vocab_size(), 200_000);
    let [first, second] = &server.requests()[..] else { panic!() };
    assert_eq!(*first, format!("/x.gguf Some((0, {}))", FIRST - 1));
    assert_eq!(*second, format!("/x.gguf Some(({FIRST}, {}))", LIMIT - 1));
}

#[test]
fn all_files_of_a_split_model_are_asked_for() {
    let server = Server::start(|path, range| {
        let number = if path.contains("00001") { 0 } else { 1 };
        let (file, length) = model(10, Some((number, 2)));
        part(&file, length, range.unwrap())
    });
    let model = server.open("/m/x-00001-of-00002.gguf").unwrap();
    assert_eq!((model.shards().len(), model.tensors().len()), (2, 2));
    assert_eq!(server.requests().len(), 2);
    let error = server.open("/m/x-00002-of-00002.gguf").unwrap_err().to_string();
    assert!(error.ends_with("/m/x-00001-of-00002.gguf"), "{error}");
}

#[test]
fn servers_without_ranges_are_read_until_the_header_ends() {
    let (file, length) = model(200_000, None);
    let server = Server::start(move |_, _| {
        // A length that nobody could send, and only the start of it: the rest is never waited for.
        let mut start = file.clone();
        start.resize(start.len() + 4096, 0);
        reply("200 OK", &[format!("Content-Length: {}", u64::MAX / 4)], &start)
    });
    let model = server.open("/x.gguf").unwrap();
    assert_eq!(model.vocab_size(), 200_000);
    assert!(model.file_bytes() >= length);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn answers_that_are_no_model_are_one_sentence() {
    let error = |answer: Plain| Server::start(answer).open("/x.gguf").unwrap_err().to_string();
    let not_there = error(|_, _| reply("404 Not Found", &["Content-Length: 0".to_owned()], b""));
    assert!(not_there.contains("404: there is no such file"), "{not_there}");
    let login = error(|_, _| reply("401 Unauthorized", &["Content-Length: 0".to_owned()], b""));
    assert!(login.contains("login"), "{login}");
    let page = error(|_, _| reply("200 OK", &["Content-Length: 15".to_owned()], b"<!DOCTYPE html>"));
    assert!(page.contains("not a GGUF file"), "{page}");
    let redirects = error(|_, _| {
        reply("302 Found", &["Location: /x.gguf".to_owned(), "Content-Length: 0".to_owned()], b"")
    });
    assert!(redirects.contains("redirects"), "{redirects}");
    let elsewhere = error(|_, _| {
        let range = ["Content-Length: 4".to_owned(), "Content-Range: bytes 7-10/4000".to_owned()];
        reply("206 Partial Content", &range, b"GGUF")
    });
    assert!(elsewhere.contains("something else"), "{elsewhere}");
    let nonsense = error(|_, _| b"good day\r\n\r\n".to_vec());
    assert!(!nonsense.is_empty());
}

#[test]
fn a_short_answer_is_no_model() {
    let (file, length) = model(1000, None);
    let server = Server::start(move |_, range| {
        let mut answer = part(&file, length, range.unwrap());
        answer.truncate(2000);
        answer
    });
    let error = server.open("/x.gguf").unwrap_err();
    assert!(matches!(error, RemoteError::Connection { .. }), "{error}");
    // A file that is shorter than its header says is an upload that is not complete.
    let (file, length) = model(10, None);
    let server = Server::start(move |_, range| part(&file, length - 1, range.unwrap()));
    let error = server.open("/x.gguf").unwrap_err().to_string();
    assert!(error.contains("shorter than its header says"), "{error}");
}

#[test]
fn a_header_without_end_stops_at_the_limit() {
    // Tokens without end: the vocabulary claims more than the limit, and the server sends and sends.
    let (mut file, _) = model(0, None);
    let at = file.windows(21).position(|w| w == b"tokenizer.ggml.tokens").unwrap() + 21 + 8;
    file.truncate(at);
    file.extend((1_u64 << 40).to_le_bytes());
    let server = Server::start(move |_, range| part(&file, 1 << 40, range.unwrap()));
    let error = server.open("/x.gguf").unwrap_err();
    assert!(matches!(error, RemoteError::TooLong(_)), "{error}");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn addresses_are_checked_before_anything_is_sent() {
    for wrong in ["ftp://x/y.gguf", "https://example.org/", "http://", "https://x/a.bin", "https://x/\n.gguf"]
    {
        assert!(matches!(addresses(wrong), Err(RemoteError::Address(_))), "{wrong:?}");
    }
    assert!(matches!(addresses("http://x/m-00001-of-99999.gguf"), Err(RemoteError::Files { .. })));
    let page = "https://huggingface.co/unsloth/X-GGUF/blob/main/X-Q8_0.gguf";
    assert_eq!(addresses(page).unwrap(), ["https://huggingface.co/unsloth/X-GGUF/resolve/main/X-Q8_0.gguf"]);
}
