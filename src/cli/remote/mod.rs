//! Headers of models on web servers: what a model would take, before its download.
//!
//! At most two requests a file: a first range, in which most headers end, and the rest up to a limit. Both are
//! read only until the header is complete. This runs in the process of whoever asks, never in the daemon.

use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, BodyReader, Proxy, http};

use crate::gguf::{Header, HeaderError, Identity, Model, ModelError, ShardName};

/// The first range: files behind the first of a split model have small headers.
const FIRST: u64 = 1 << 20;
/// The longest header that is read; the largest real ones have about 20 MiB.
const LIMIT: u64 = 64 << 20;
/// Redirects that are followed.
const REDIRECTS: u32 = 5;
/// The most files of a split model.
const FILES: u32 = 256;
/// A server that sends nothing for so long has gone away.
const PATIENCE: Duration = Duration::from_secs(30);
/// All requests of a file together.
const PATIENCE_WHOLE: Duration = Duration::from_secs(300);

/// Why a model on a server can't be priced. Each is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// An address that can't be meant.
    #[error("{0} is no address of a model file: write http:// or https:// and a name that ends in .gguf")]
    Address(String),
    /// Not the first file of a split model.
    #[error("give the address of the first file of the split model: {0}")]
    NotFirst(String),
    /// More files than any model has.
    #[error("{url}: a model of {count} files is not possible")]
    Files {
        /// The address.
        url: String,
        /// What its name says.
        count: u32,
    },
    /// No answer.
    #[error("{url}: {what}")]
    Connection {
        /// The address.
        url: String,
        /// What went wrong.
        what: String,
    },
    /// An answer that is no file.
    #[error("{url}: the server says {status}: {what}")]
    Status {
        /// The address.
        url: String,
        /// The status of HTTP.
        status: u16,
        /// What it means here.
        what: &'static str,
    },
    /// An answer that doesn't belong to the request.
    #[error("{url}: the server sent something else than what was asked for ({what})")]
    Range {
        /// The address.
        url: String,
        /// What it sent.
        what: String,
    },
    /// A header beyond the limit.
    #[error("{0}: its header is longer than {limit} MiB, which is the limit", limit = LIMIT >> 20)]
    TooLong(String),
    /// What the server sent is no model.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Reads the headers of the model at an address, with all files of a split one. Proxies are taken from the
/// environment, certificates from the system.
///
/// # Errors
/// The server doesn't answer, or not with a model.
pub fn open(url: &str) -> Result<Model, RemoteError> {
    open_with(&agent(Proxy::try_from_env()), url)
}

fn open_with(agent: &Agent, url: &str) -> Result<Model, RemoteError> {
    let files = addresses(url)?.iter().map(|url| header(agent, url)).collect::<Result<_, _>>()?;
    Ok(Model::from_headers(files)?)
}

fn agent(proxy: Option<Proxy>) -> Agent {
    let config = Agent::config_builder()
        .proxy(proxy)
        .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
        .http_status_as_error(false)
        .max_redirects(REDIRECTS)
        .max_redirects_will_error(true)
        .user_agent(concat!("plimsoll/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .timeout_global(Some(PATIENCE_WHOLE))
        .build();
    config.new_agent()
}

/// The addresses of all files.
fn addresses(url: &str) -> Result<Vec<String>, RemoteError> {
    let wrong = || RemoteError::Address(url.to_owned());
    let lower = url.to_ascii_lowercase();
    if !(lower.starts_with("http://") || lower.starts_with("https://")) || url.chars().any(char::is_control) {
        return Err(wrong());
    }
    let end = url.find(['?', '#']).unwrap_or(url.len());
    let (path, rest) = url.split_at(end);
    let (folder, name) = path.rsplit_once('/').ok_or_else(wrong)?;
    if !name.ends_with(".gguf") {
        return Err(wrong());
    }
    // The address of the page that shows the file, as people copy it.
    let folder = match folder.strip_prefix("https://huggingface.co/") {
        Some(inside) => format!("https://huggingface.co/{}", inside.replacen("/blob/", "/resolve/", 1)),
        None => folder.to_owned(),
    };
    let address = |name: &str| format!("{folder}/{name}{rest}");
    match ShardName::parse(name) {
        None => Ok(vec![address(name)]),
        Some(shard) if shard.count == 0 || shard.count > FILES => {
            Err(RemoteError::Files { url: url.to_owned(), count: shard.count })
        }
        Some(shard) if shard.number != 1 => Err(RemoteError::NotFirst(address(&shard.name(1)))),
        Some(shard) => Ok((1..=shard.count).map(|n| address(&shard.name(n))).collect()),
    }
}

fn header(agent: &Agent, url: &str) -> Result<(PathBuf, Identity, Header), RemoteError> {
    let mut file = Remote::open(agent, url)?;
    match Header::read(&mut file) {
        Ok(header) => {
            let size = file.total.unwrap_or_else(|| header.file_length());
            Ok((PathBuf::from(url), Identity::of_name(url, size), header))
        }
        Err(_) if file.failure.is_some() => Err(file.failure.unwrap_or(RemoteError::TooLong(url.to_owned()))),
        Err(HeaderError::Truncated { .. } | HeaderError::TooLarge { .. }) if file.at >= LIMIT => {
            Err(RemoteError::TooLong(url.to_owned()))
        }
        Err(HeaderError::Io { source, .. }) => {
            Err(RemoteError::Connection { url: url.to_owned(), what: source.to_string() })
        }
        Err(source) => Err(ModelError::Header { path: PathBuf::from(url), source }.into()),
    }
}

/// The start of a file on a server, as a stream.
struct Remote<'a> {
    agent: &'a Agent,
    url: &'a str,
    body: BodyReader<'static>,
    /// Where in the file the stream is.
    at: u64,
    /// Where the answer that is being read ends.
    end: u64,
    /// The length of the file, where the server says it.
    total: Option<u64>,
    /// Whether a further request would bring more.
    more: bool,
    /// What went wrong with the second request.
    failure: Option<RemoteError>,
}

impl<'a> Remote<'a> {
    fn open(agent: &'a Agent, url: &'a str) -> Result<Self, RemoteError> {
        let response = get(agent, url, 0, FIRST)?;
        let (end, total, more) = match response.status().as_u16() {
            206 => {
                let (start, end, total) = content_range(&response, url)?;
                if start != 0 || end > FIRST {
                    return Err(other(url, format!("bytes {start} to {end}")));
                }
                (end, total, true)
            }
            // No ranges: the whole file, of which the start is read.
            _ => {
                let total = response.body().content_length();
                (total.unwrap_or(LIMIT).min(LIMIT), total, false)
            }
        };
        let body = response.into_body().into_reader();
        Ok(Self { agent, url, body, at: 0, end, total, more, failure: None })
    }

    /// Asks for the rest of the header.
    fn next(&mut self) -> Result<(), RemoteError> {
        self.more = false;
        let response = get(self.agent, self.url, self.at, LIMIT)?;
        if response.status() != 206 {
            return Err(other(self.url, "the whole file instead of a part".to_owned()));
        }
        let (start, end, total) = content_range(&response, self.url)?;
        if start != self.at || end > LIMIT || total != self.total {
            return Err(other(self.url, format!("bytes {start} to {end}, or another file")));
        }
        self.end = end;
        self.body = response.into_body().into_reader();
        Ok(())
    }
}

impl Read for Remote<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.end && self.more && self.total.is_none_or(|total| self.at < total) {
            self.next().map_err(|failure| {
                let error = io::Error::other(failure.to_string());
                self.failure = Some(failure);
                error
            })?;
        }
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let n = self.body.read(&mut buffer[..wanted])?;
        if n == 0 && wanted > 0 && self.total.is_some() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server ended its answer early"));
        }
        self.at += n as u64;
        Ok(n)
    }
}

/// Asks for the bytes `from..to` of a file.
fn get(agent: &Agent, url: &str, from: u64, to: u64) -> Result<http::Response<Body>, RemoteError> {
    let request = agent.get(url).header("Range", format!("bytes={from}-{}", to - 1));
    let response = request.call().map_err(|error| {
        let what = match error {
            ureq::Error::TooManyRedirects => format!("more than {REDIRECTS} redirects"),
            ureq::Error::HostNotFound => "there is no such server".to_owned(),
            other => other.to_string(),
        };
        RemoteError::Connection { url: url.to_owned(), what }
    })?;
    let what = match response.status().as_u16() {
        200 | 206 => return Ok(response),
        401 | 403 => "it wants a login: download the file with its own tool, and ask again with the file",
        404 | 410 => "there is no such file",
        416 => "the file is empty, or shorter than a header",
        429 => "it is asked too often: try again later",
        500.. => "it has a problem of its own: try again later",
        _ => "that is no file",
    };
    Err(RemoteError::Status { url: url.to_owned(), status: response.status().as_u16(), what })
}

fn other(url: &str, what: String) -> RemoteError {
    RemoteError::Range { url: url.to_owned(), what }
}

/// Reads `Content-Range: bytes FIRST-LAST/TOTAL`: where it starts, where it ends, and the length of the file.
fn content_range(response: &http::Response<Body>, url: &str) -> Result<(u64, u64, Option<u64>), RemoteError> {
    let value = response.headers().get("content-range").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let parsed = || {
        let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        let total = if total == "*" { None } else { Some(total.parse().ok()?) };
        (first <= last && last < u64::MAX && total.is_none_or(|total| last < total)).then_some((
            first,
            last + 1,
            total,
        ))
    };
    parsed().ok_or_else(|| other(url, format!("a range of '{value}'")))
}

#[cfg(test)]
mod tests;
