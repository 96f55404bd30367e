//! Model files that are not what they should be: each gives one sentence, quickly and with little memory.

#![allow(clippy::unwrap_used, clippy::panic)] // a test: what is wrong has to stop it

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use plimsoll::gguf::{Allowance, Header, HeaderError, Model, ModelError, ShardName, shard_paths};

/// A directory of its own that goes away with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-gguf-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: &[u8], length: Option<u64>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        if let Some(length) = length {
            File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        }
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A header under construction.
struct Builder {
    version: u32,
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Builder {
    fn new() -> Self {
        Self { version: 3, keys: Vec::new(), key_count: 0, tensors: Vec::new(), tensor_count: 0 }
    }

    fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }

    fn str(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.raw(key, 8, &bytes)
    }

    fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    fn list(self, key: &str, kind: u32, count: u64, elements: &[u8]) -> Self {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(elements);
        self.raw(key, 9, &bytes)
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        text(&mut self.tensors, name);
        self.tensors.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
        dims.iter().for_each(|d| self.tensors.extend(d.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(&self.keys);
        out.extend(&self.tensors);
        out
    }
}

fn sentence(bytes: &[u8]) -> String {
    let error = Header::read(bytes).unwrap_err().to_string();
    assert!(!error.contains('\n') && error.len() < 400, "{error}");
    error
}

#[test]
fn reads_what_it_needs_and_keeps_no_vocabulary() {
    let mut words = Vec::new();
    (0..5000).for_each(|i| text(&mut words, &format!("word{i}")));
    let header = Builder::new()
        .str("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .list("llama.attention.head_count_kv", 5, 2, &[8, 0, 0, 0, 4, 0, 0, 0])
        .list("tokenizer.ggml.tokens", 8, 5000, &words)
        .list("tokenizer.ggml.scores", 6, 3, &[0; 12])
        .str("tokenizer.chat_template", &"x".repeat(20_000))
        .tensor("token_embd.weight", &[64, 5000], 8, 0)
        .tensor("output_norm.weight", &[64], 0, 64 / 32 * 34 * 5000);
    let header = Header::read(header.bytes().as_slice()).unwrap();
    assert_eq!(header.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(header.u64("llama.block_count").unwrap(), Some(2));
    assert_eq!(header.u64("nothing").unwrap(), None);
    let value = |key: &str| header.metadata[key].as_array().unwrap();
    assert_eq!(value("tokenizer.ggml.tokens").len(), 5000);
    assert_eq!(value("tokenizer.ggml.tokens").integers(), None);
    assert_eq!(value("llama.attention.head_count_kv").integers(), Some(vec![8, 4]));
    assert_eq!(header.tensors[0].bytes, 340_000);
    assert_eq!(header.file_length(), header.data_offset + 340_000 + 256);
    assert!(matches!(header.u64("general.architecture"), Err(HeaderError::WrongType { .. })));
}

#[test]
fn what_is_no_header_is_named() {
    let mut version = Builder::new();
    for (number, expected) in
        [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian"), (2 << 24, "big-endian")]
    {
        version.version = number;
        assert!(sentence(&version.bytes()).contains(expected), "{number}");
    }
    assert!(sentence(b"").contains("empty"));
    assert!(sentence(b"GG").contains("not a GGUF file"));
    // The file may be one that the asker can't read: nothing of it is shown.
    let key = sentence(b"sk-and-a-secret-key");
    assert!(key.contains("not a GGUF file") && !key.contains("sk-a"), "{key}");
    assert!(sentence(b"GGUF\x03\0\0\0").contains("incomplete"));
}

#[test]
fn every_truncation_is_an_error() {
    let whole = Builder::new()
        .str("general.architecture", "llama")
        .list("a.list", 4, 3, &[0; 12])
        .tensor("t.weight", &[32, 4], 8, 0)
        .bytes();
    for length in 0..whole.len() {
        assert!(Header::read(&whole[..length]).is_err(), "{length}");
    }
    assert!(Header::read(whole.as_slice()).is_ok());
}

#[test]
fn claims_beyond_reason_are_refused_before_anything_is_kept() {
    let huge = u64::MAX.to_le_bytes();
    let mut counts = Builder::new();
    counts.tensor_count = u64::MAX;
    assert!(sentence(&counts.bytes()).contains("the number of tensors"));
    let mut counts = Builder::new();
    counts.key_count = 1 << 40;
    assert!(sentence(&counts.bytes()).contains("the number of metadata keys"));
    let mut long_key = b"GGUF\x03\0\0\0".to_vec();
    long_key.extend(0_u64.to_le_bytes());
    long_key.extend(1_u64.to_le_bytes());
    long_key.extend(huge);
    assert!(sentence(&long_key).contains("the length of a metadata key"));
    for header in [
        Builder::new().raw("a.text", 8, &huge),
        Builder::new().list("a.list", 4, u64::MAX, &[]),
        Builder::new().list("a.list", 8, u64::MAX, &[]),
        Builder::new().list("a.nested", 9, 1, &[0; 12]),
        Builder::new().raw("a.kind", 99, &[]),
        Builder::new().u32("twice", 1).u32("twice", 1),
        Builder::new().u32("", 1),
        Builder::new().u32("general.alignment", 3),
        Builder::new().u32("general.alignment", 0),
        Builder::new().tensor("t", &[1, 1, 1, 1, 1], 0, 0),
        Builder::new().tensor("t", &[0, (1 << 40) + 1], 0, 0),
        Builder::new().tensor("t", &[1 << 49, 0], 0, 0),
        Builder::new().tensor("t", &[32], 4, 0),
        Builder::new().tensor("t", &[31], 8, 0),
        Builder::new().tensor("t", &[1 << 40, 1 << 40], 0, 0),
        Builder::new().tensor("t", &[u64::MAX, u64::MAX, u64::MAX, u64::MAX], 0, 0),
        Builder::new().tensor("t", &[32], 0, 32),
        Builder::new().tensor("t", &[32], 0, 0).tensor("t", &[32], 0, 128),
        Builder::new().tensor("a", &[32], 0, 0).tensor("b", &[32], 0, 64),
        Builder::new().tensor("a", &[32], 0, 0).tensor("b", &[32], 0, u64::MAX),
        Builder::new().tensor(&"n".repeat(64), &[32], 0, 0),
    ] {
        sentence(&header.bytes());
    }
}

/// A stream that never ends.
struct Endless;

impl std::io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        buffer.fill(0);
        Ok(buffer.len())
    }
}

#[test]
fn an_endless_header_ends() {
    let start = Builder::new().list("a.list", 8, u64::MAX, &[]).bytes();
    let error = Header::read(std::io::Read::chain(start.as_slice(), Endless)).unwrap_err();
    assert!(error.to_string().contains("the header's length"), "{error}");
}

fn shard(number: u32, count: u32) -> Builder {
    let name = format!("blk.{number}.ffn_up.weight");
    Builder::new()
        .str("general.architecture", "llama")
        .raw("split.no", 2, &u16::try_from(number).unwrap().to_le_bytes())
        .raw("split.count", 2, &u16::try_from(count).unwrap().to_le_bytes())
        .tensor(&name, &[256, 256], 0, 0)
}

fn shards(directory: &Directory, count: u32) -> Vec<PathBuf> {
    let write = |i: u32| {
        let bytes = shard(i, count).bytes();
        let length = (bytes.len() as u64).next_multiple_of(32) + 4 * 256 * 256;
        directory.write(&format!("m-{:05}-of-{count:05}.gguf", i + 1), &bytes, Some(length))
    };
    (0..count).map(write).collect()
}

#[test]
fn shards_are_found_and_checked() {
    let directory = Directory::new("shards");
    let paths = shards(&directory, 4);
    let model = Model::open(&paths[0]).unwrap();
    assert_eq!(model.shards().len(), 4);
    assert_eq!(model.parameters(), 4 * 256 * 256);
    assert_eq!(model.tensors()[3].shard, 3);
    assert_eq!(model.shards()[1].identity.size, fs::metadata(&paths[1]).unwrap().len());

    let last = Model::open(&paths[1]).unwrap_err();
    assert!(last.to_string().contains("m-00001-of-00004.gguf"), "{last}");

    File::options().write(true).open(&paths[3]).unwrap().set_len(1000).unwrap();
    let short = Model::open(&paths[0]).unwrap_err();
    assert!(matches!(&short, ModelError::Short { path, length: 1000, .. } if *path == paths[3]), "{short}");

    fs::remove_file(&paths[2]).unwrap();
    let missing = Model::open(&paths[0]).unwrap_err().to_string();
    assert_eq!(missing, format!("shard 3 of 4 is missing: {}", paths[2].display()));
}

#[test]
fn links_to_blobs_are_followed_by_their_own_names() {
    let directory = Directory::new("links");
    let paths = shards(&directory, 2);
    let links = directory.0.join("links");
    fs::create_dir(&links).unwrap();
    for (i, path) in paths.iter().enumerate() {
        let blob = directory.0.join(format!("blob{i}"));
        fs::rename(path, &blob).unwrap();
        symlink(blob, links.join(path.file_name().unwrap())).unwrap();
    }
    assert_eq!(Model::open(&links.join("m-00001-of-00002.gguf")).unwrap().shards().len(), 2);
}

#[test]
fn descriptors_in_the_wrong_order_or_number_are_refused() {
    let directory = Directory::new("descriptors");
    let paths = shards(&directory, 3);
    let open = |i: usize| (paths[i].clone(), File::open(&paths[i]).unwrap());
    assert!(Model::from_files(vec![open(0), open(1), open(2)]).is_ok());
    let swapped = Model::from_files(vec![open(0), open(2), open(1)]).unwrap_err();
    assert!(matches!(swapped, ModelError::Shards { .. }), "{swapped}");
    let few = Model::from_files(vec![open(0), open(1)]).unwrap_err();
    assert!(matches!(few, ModelError::MissingShard { number: 3, count: 3, .. }), "{few}");
    let same = Model::from_files(vec![open(0), open(0), open(2)]).unwrap_err();
    assert!(matches!(same, ModelError::Shards { .. }), "{same}");
    assert!(Model::from_files(Vec::new()).is_err());
}

#[test]
fn nothing_is_read_behind_a_shard_that_does_not_belong() {
    let directory = Directory::new("repeated");
    let paths = shards(&directory, 3);
    fs::write(&paths[2], b"no header").unwrap();
    let open = |name: usize, of: usize| (paths[name].clone(), File::open(&paths[of]).unwrap());
    let same = Model::from_files(vec![open(0, 0), open(1, 0), open(2, 2)]).unwrap_err();
    assert!(matches!(&same, ModelError::Shards { path, .. } if *path == paths[1]), "{same}");
    let bytes = Builder::new().raw("split.no", 10, &[255; 8]).u32("split.count", 2).bytes();
    let far = directory.write("far.gguf", &bytes, Some(1 << 20));
    assert!(matches!(Model::open(&far).unwrap_err(), ModelError::Shards { .. }));
}

/// A header of a shard with so many keys of the architecture, of half a KiB each.
fn wordy(number: u32, count: u32, keys: usize) -> Vec<u8> {
    let key = |i: usize| format!("llama.{i:0500}");
    (0..keys).fold(shard(number, count), |header, i| header.u32(&key(i), 1)).bytes()
}

#[test]
fn what_is_kept_of_all_headers_together_is_bounded() {
    let refused = sentence(&wordy(0, 1, 10_000));
    assert!(refused.contains("more metadata"), "{refused}");
    let many = |count: u32| {
        (0..count).fold(Builder::new(), |header, i| header.tensor(&format!("{i:060}"), &[0], 0, 0))
    };
    assert!(Header::read(many(20_000).bytes().as_slice()).is_ok());
    assert!(sentence(&many(60_000).bytes()).contains("more tensors"));

    let directory = Directory::new("wordy");
    let write = |i: u32| {
        let bytes = wordy(i, 8, 2000);
        let length = (bytes.len() as u64).next_multiple_of(32) + 4 * 256 * 256;
        let name = format!("m-{:05}-of-00008.gguf", i + 1);
        assert!(Header::read(bytes.as_slice()).is_ok(), "each by itself is small enough");
        directory.write(&name, &bytes, Some(length))
    };
    let paths: Vec<PathBuf> = (0..8).map(write).collect();
    let error = Model::open(&paths[0]).unwrap_err();
    assert!(matches!(&error, ModelError::Header { .. }) && error.to_string().contains("more metadata"));
    // Several models that are read together share one allowance as well.
    let mut allowance = Allowance::default();
    let alone = directory.write("alone.gguf", &wordy(0, 1, 2000), Some(2 << 20));
    let mut open = || {
        let file = File::open(&alone).unwrap();
        Model::from_files_within(vec![(alone.clone(), file)], &mut allowance).is_ok()
    };
    assert!(open());
    assert!((0..8).any(|_| !open()));
}

#[test]
fn only_keys_that_are_used_are_kept() {
    let header = Builder::new()
        .u32("gemma.block_count", 3)
        .str("general.architecture", "llama")
        .str("general.description", "long")
        .str("general.name", "Name")
        .u32("llama.block_count", 2)
        .u32("llama2.block_count", 2)
        .list("x.list", 4, 2, &[0; 8])
        .str("tokenizer.chat_template", "short")
        .list("tokenizer.ggml.merges", 8, 1, &[0; 8])
        .u32("split.count", 0);
    let header = Header::read(header.bytes().as_slice()).unwrap();
    let keys: Vec<&str> = header.metadata.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        ["general.architecture", "general.name", "llama.block_count", "split.count", "tokenizer.ggml.merges"]
    );
}

#[test]
fn texts_of_headers_can_not_steer_a_terminal() {
    let hostile = "\u{1b}]0;x\u{7}\u{9b}2J\u{202e}\u{2066}\r\n";
    let replaced = "\u{fffd}]0;x\u{fffd}\u{fffd}2J\u{fffd}\u{fffd}\u{fffd}\u{fffd}";
    let header = Builder::new().str("general.architecture", hostile).tensor(hostile, &[32], 0, 0);
    let header = Header::read(header.bytes().as_slice()).unwrap();
    assert_eq!(header.str("general.architecture").unwrap(), Some(replaced));
    assert_eq!(header.tensors[0].name, replaced);
    for header in [
        Builder::new().raw(hostile, 99, &[]),
        Builder::new().u32(hostile, 1).u32(hostile, 1),
        Builder::new().list(hostile, 9, 1, &[0; 12]),
        Builder::new().raw(hostile, 8, &[255; 8]),
        Builder::new().raw(hostile, 4, &[]),
        Builder::new().tensor(hostile, &[31], 8, 0),
        Builder::new().tensor(hostile, &[32], 0, 0).tensor(hostile, &[32], 0, 128),
    ] {
        let error = sentence(&header.bytes());
        assert!(error.contains(replaced), "{error}");
        assert!(!error.contains(|c: char| c.is_control() || "\u{202e}\u{2066}".contains(c)), "{error:?}");
    }
}

#[test]
fn what_is_no_file_is_named_and_nothing_waits() {
    let directory = Directory::new("kinds");
    let fifo = directory.0.join("fifo.gguf");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, expected) in [
        (directory.0.clone(), "a directory"),
        (fifo, "a FIFO"),
        (PathBuf::from("/dev/null"), "a device"),
        (directory.0.join("nothing.gguf"), "No such file"),
        (directory.write("empty.gguf", b"", None), "empty"),
        (directory.write("text.gguf", b"version https://git-lfs.github.com/spec/v1\n", None), "not a GGUF"),
        (directory.write("hole.gguf", b"", Some(1 << 40)), "not a GGUF"),
    ] {
        let error = Model::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn shard_names_are_taken_apart_as_llama_cpp_does() {
    let name = ShardName::parse("DeepSeek-V3.1-TQ1_0-00002-of-00004.gguf").unwrap();
    assert_eq!((name.number, name.count, name.prefix.as_str()), (2, 4, "DeepSeek-V3.1-TQ1_0"));
    assert_eq!(name.name(4), "DeepSeek-V3.1-TQ1_0-00004-of-00004.gguf");
    for no in
        ["x.gguf", "x-1-of-2.gguf", "x-00001-of-00002.bin", "00001-of-00002.gguf", "x-0000a-of-00002.gguf"]
    {
        assert_eq!(ShardName::parse(no), None, "{no}");
    }
    assert!(shard_paths(Path::new("/m/x-00001-of-00000.gguf")).is_err());
    assert!(shard_paths(Path::new("/m/x-00001-of-99999.gguf")).is_err());
    assert_eq!(shard_paths(Path::new("/m/x.gguf")).unwrap().len(), 1);
}

proptest::proptest! {
    #[test]
    fn made_up_contents_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
        let mut header = b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        header.extend(&bytes);
        let _ = Header::read(header.as_slice());
        let _ = Header::read(bytes.as_slice());
    }

    #[test]
    fn flipped_bytes_never_panic(at in 0_usize..200, with in proptest::prelude::any::<u8>()) {
        let mut bytes = shard(0, 1).u32("general.alignment", 64).list("x", 4, 2, &[0; 8]).bytes();
        let at = at % bytes.len();
        bytes[at] = with;
        let _ = Header::read(bytes.as_slice());
    }
}
