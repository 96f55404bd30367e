//! Swapfiles of the daemon's own: made, used, taken out of use, removed.
//!
//! For a process of its own, outside of any mount namespace (the kernel remembers the path as that process saw
//! it), that may be killed at any moment: what it leaves behind is recognised by its name.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{SysconfVar, UnlinkatFlags, sysconf, unlinkat};

use super::Changed;
use crate::bytes::Bytes;
use crate::ledger::{SwapName, SwapOwner};
use crate::os::{no_copy_on_write, swap_off, swap_on};

/// Sizes are multiples of this.
const UNIT: Bytes = Bytes::mib(1);
/// The largest page that a kernel has.
const HEADER: Bytes = Bytes(64 << 10);
/// Smaller ones are no use: the kernel has room for about 29 areas in all.
const SMALLEST: Bytes = Bytes::mib(16);

/// Why a swapfile could not be made or removed. Each is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum SwapfileError {
    /// The directory is not fit for it.
    #[error("{} can't hold swapfiles: {why}", directory.display())]
    Directory {
        /// Which.
        directory: PathBuf,
        /// Why not.
        why: String,
    },
    /// There is not enough room.
    #[error(
        "a swapfile of {wanted} does not fit: {room} may be used in {places} (see [swap] in plimsoll.toml)"
    )]
    Full {
        /// What was wanted.
        wanted: Bytes,
        /// What the directories have room for, together.
        room: Bytes,
        /// The directories.
        places: String,
    },
    /// Something else.
    #[error("{}: {what}: {source}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// What it holds has no room in memory.
    #[error("{} can't be taken out of use yet: what it holds does not fit in memory", .0.display())]
    NoMemory(PathBuf),
    /// There is none of that name.
    #[error("there is no swapfile {0}: 'plimsoll swap list' shows those that there are")]
    Missing(SwapName),
}

/// A directory that swapfiles may be in, held open, and locked against others that make or remove some there.
pub struct Directory {
    path: PathBuf,
    file: Flock<File>,
}

impl Directory {
    /// Opens a directory, which nobody but root may write to; the last part of its path is made if it is
    /// missing. Waits until nobody else is at work in it.
    ///
    /// # Errors
    /// It is missing, a link, or somebody else's.
    pub fn open(path: &Path) -> Result<Self, SwapfileError> {
        let wrong = |why: String| SwapfileError::Directory { directory: path.to_owned(), why };
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(wrong(error.to_string()));
            }
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| wrong(error.to_string()))?;
        let meta = file.metadata().map_err(|error| wrong(error.to_string()))?;
        if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
            return Err(wrong("it must belong to root, and nobody else may write to it".to_owned()));
        }
        let file =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| wrong(error.to_string()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Makes a swapfile of `size` and uses it. Nothing is left of it where that fails.
    ///
    /// # Errors
    /// The file system can't hold it, or the kernel doesn't take it.
    pub fn create(&self, owner: SwapOwner, size: Bytes) -> Result<SwapName, SwapfileError> {
        let mut random = [0; 24];
        let failed = |what| move |source| SwapfileError::Failed { path: self.path.clone(), what, source };
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut random))
            .map_err(failed("no random numbers"))?;
        let [a, b, c, d, e, f, g, h, uuid @ ..] = random;
        let name = SwapName { owner, id: u64::from_le_bytes([a, b, c, d, e, f, g, h]) };
        let path = self.path.join(name.file_name());
        let result = self.fill(&name, &path, size, uuid);
        if result.is_err() {
            // What went wrong is said; that nothing is left of it shows in the listing.
            let _ = unlinkat(&*self.file, name.file_name().as_str(), UnlinkatFlags::NoRemoveDir);
        }
        result.map(|()| name)
    }

    fn fill(&self, name: &SwapName, path: &Path, size: Bytes, uuid: [u8; 16]) -> Result<(), SwapfileError> {
        let failed =
            |what: &'static str| move |source| SwapfileError::Failed { path: path.to_owned(), what, source };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&*self.file, name.file_name().as_str(), flags, mode)
            .map(File::from)
            .map_err(|error| failed("can't be made")(error.into()))?;
        if fstatfs(&file).is_ok_and(|stat| stat.filesystem_type() == BTRFS_SUPER_MAGIC) {
            no_copy_on_write(&file).map_err(failed("copy-on-write can't be switched off"))?;
        }
        allocate(&file, size).map_err(failed("no room can be set aside for it"))?;
        write_header(&file, size, uuid).map_err(failed("its header can't be written"))?;
        file.sync_all().map_err(failed("it can't be written"))?;
        // By the descriptor: it is this file, whatever happens to its name.
        let itself = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        match swap_on(&itself) {
            // The file system does not say where a file lies that was only set aside: write all of it once.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                write_zeros(&file, size)
                    .and_then(|()| write_header(&file, size, uuid))
                    .and_then(|()| file.sync_all())
                    .map_err(failed("it can't be written"))?;
                swap_on(&itself).map_err(failed("the kernel does not take it as swap"))
            }
            outcome => outcome.map_err(failed("the kernel does not take it as swap")),
        }
    }

    /// Takes a swapfile out of use, if it is, and removes it. Blocks until all that it holds has been read back.
    ///
    /// # Errors
    /// What it holds does not fit in memory, or it is not what it should be.
    pub fn remove(&self, name: &SwapName) -> Result<Changed, SwapfileError> {
        let Some(file) = self.own(name)? else { return Ok(Changed::Unchanged) };
        let path = self.path.join(name.file_name());
        match swap_off(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))) {
            // It was not in use.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                return Err(SwapfileError::NoMemory(path));
            }
            outcome => outcome.map_err(|source| SwapfileError::Failed {
                path: path.clone(),
                what: "it can't be taken out of use",
                source,
            })?,
        }
        self.unlink(name)
    }

    /// Removes a swapfile that is not in use.
    ///
    /// # Errors
    /// It is in use, or not what it should be.
    pub fn clean(&self, name: &SwapName) -> Result<Changed, SwapfileError> {
        // The kernel refuses to unlink or write to a swapfile in use (ETXTBSY or EPERM).
        if self.own(name)?.is_none() { Ok(Changed::Unchanged) } else { self.unlink(name) }
    }

    fn unlink(&self, name: &SwapName) -> Result<Changed, SwapfileError> {
        let path = self.path.join(name.file_name());
        unlinkat(&*self.file, name.file_name().as_str(), UnlinkatFlags::NoRemoveDir).map_err(|error| {
            SwapfileError::Failed { path, what: "can't be removed", source: error.into() }
        })?;
        Ok(Changed::Changed)
    }

    /// A swapfile of this name, opened; none where there is none.
    fn own(&self, name: &SwapName) -> Result<Option<File>, SwapfileError> {
        let path = self.path.join(name.file_name());
        let failed = |error: nix::Error| SwapfileError::Failed {
            path: path.clone(),
            what: "can't be opened",
            source: error.into(),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = match openat(&*self.file, name.file_name().as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(nix::Error::ENOENT) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let meta = file.metadata().map_err(|source| SwapfileError::Failed {
            path: path.clone(),
            what: "can't be looked at",
            source,
        })?;
        if !meta.is_file() || meta.uid() != 0 {
            return Err(failed(nix::Error::EPERM));
        }
        Ok(Some(file))
    }
}

/// A swapfile of the daemon's own in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub path: PathBuf,
    /// Which.
    pub name: SwapName,
    /// Its length.
    pub size: Bytes,
}

/// The swapfiles in a directory, in use or not; none where it can't be read.
#[must_use]
pub fn found(directory: &Path) -> Vec<Found> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let one = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let name = SwapName::of(&path)?;
        let meta = entry.metadata().ok().filter(|meta| meta.is_file() && meta.uid() == 0)?;
        Some(Found { path, name, size: Bytes(meta.len()) })
    };
    entries.flatten().filter_map(one).collect()
}

/// How much of each directory swapfiles may take: what is free there but for `free_space`, and all of them
/// together with what they have taken already at most `max_size`. Directories on one file system share its room.
#[must_use]
pub fn rooms(directories: &[PathBuf], max_size: Bytes, free_space: Bytes) -> Vec<(PathBuf, Bytes)> {
    let taken: Bytes = directories.iter().flat_map(|directory| found(directory)).map(|file| file.size).sum();
    let mut left = max_size - taken;
    let mut seen: Vec<u64> = Vec::new();
    let mut rooms = Vec::new();
    for directory in directories {
        // One that will be made lies on the file system of the one above it.
        let place = if directory.is_dir() { directory } else { directory.parent().unwrap_or(directory) };
        let (Ok(meta), Ok(stat)) = (place.metadata(), nix::sys::statvfs::statvfs(place)) else { continue };
        if seen.contains(&meta.dev()) {
            continue;
        }
        seen.push(meta.dev());
        let free = Bytes(stat.blocks_available().saturating_mul(stat.fragment_size()));
        let room = Bytes((free - free_space).min(left).0 / UNIT.0 * UNIT.0);
        left -= room;
        rooms.push((directory.clone(), room));
    }
    rooms
}

/// The largest size that [`layout`] makes of `rooms`.
#[must_use]
pub fn most(rooms: &[(PathBuf, Bytes)]) -> Bytes {
    rooms.iter().map(|(_, room)| *room).filter(|room| *room >= SMALLEST).map(|room| room - UNIT).sum()
}

/// The files to make for `size`: in the preferred directory as far as it goes, then in the next.
///
/// # Errors
/// They don't have the room together.
pub fn layout(size: Bytes, rooms: &[(PathBuf, Bytes)]) -> Result<Vec<(PathBuf, Bytes)>, SwapfileError> {
    let usable = || rooms.iter().filter(|(_, room)| *room >= SMALLEST);
    // The header of each takes a page, of whatever size.
    let headers = HEADER * u64::try_from(usable().count()).unwrap_or(u64::MAX);
    let size = Bytes((size + headers).max(SMALLEST).0.div_ceil(UNIT.0).saturating_mul(UNIT.0));
    let mut left = size;
    let mut files = Vec::new();
    for (directory, room) in usable() {
        let part = left.min(*room);
        if !part.is_zero() {
            files.push((directory.clone(), part.max(SMALLEST)));
            left -= part;
        }
    }
    if left.is_zero() {
        return Ok(files);
    }
    let places: Vec<String> = rooms.iter().map(|(directory, _)| directory.display().to_string()).collect();
    let places = if places.is_empty() { "no directory".to_owned() } else { places.join(", ") };
    Err(SwapfileError::Full { wanted: size, room: size - left, places })
}

/// Room for a file, without holes.
fn allocate(file: &File, size: Bytes) -> io::Result<()> {
    let length = libc::off_t::try_from(size.0).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, length).map_err(io::Error::from)
}

fn write_zeros(mut file: &File, size: Bytes) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut left = size.0;
    io::Seek::rewind(&mut file)?;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(usize::MAX).min(zeros.len());
        file.write_all(&zeros[..part])?;
        left -= part as u64;
    }
    Ok(())
}

/// The first page of a swap area, `union swap_header` of linux/swap.h.
fn write_header(file: &File, size: Bytes, uuid: [u8; 16]) -> io::Result<()> {
    let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|page| usize::try_from(page).ok()).unwrap_or(4096);
    file.write_all_at(&header(page, size, uuid)?, 0)
}

fn header(page: usize, size: Bytes, uuid: [u8; 16]) -> io::Result<Vec<u8>> {
    let pages = usize::try_from(size.0).unwrap_or(usize::MAX) / page;
    let last = u32::try_from(pages.saturating_sub(1)).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut header = vec![0; page];
    // Version, last page, number of bad pages.
    for (n, number) in [1, last, 0].into_iter().enumerate() {
        header[1024 + 4 * n..][..4].copy_from_slice(&u32::to_ne_bytes(number));
    }
    header[1036..][..16].copy_from_slice(&uuid);
    header[1052..][..8].copy_from_slice(b"plimsoll");
    header[page - 10..].copy_from_slice(b"SWAPSPACE2");
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_directories_are_filled_first() {
        let rooms =
            [("/a", 100), ("/b", 4), ("/c", 1000)].map(|(p, mib)| (PathBuf::from(p), Bytes::mib(mib)));
        let files = |size| {
            let files = layout(size, &rooms).unwrap();
            files.into_iter().map(|(p, size)| (p.display().to_string(), size.0 >> 20)).collect::<Vec<_>>()
        };
        assert_eq!(files(Bytes(1)), [("/a".to_owned(), 16)]);
        assert_eq!(files(Bytes::mib(99)), [("/a".to_owned(), 100)]);
        // What is left over is smaller than a swapfile may be.
        assert_eq!(files(Bytes::mib(100)), [("/a".to_owned(), 100), ("/c".to_owned(), 16)]);
        assert_eq!(most(&rooms), Bytes::mib(1098));
        assert_eq!(files(most(&rooms)), [("/a".to_owned(), 100), ("/c".to_owned(), 999)]);
        let error = layout(Bytes::mib(1100), &rooms).unwrap_err().to_string();
        assert!(error.starts_with("a swapfile of 1.1 GiB does not fit"), "{error}");
        assert!(layout(Bytes::mib(1), &[]).unwrap_err().to_string().contains("no directory"));
    }

    #[test]
    fn a_header_is_what_the_kernel_reads() {
        let header = header(4096, Bytes::mib(1), [7; 16]).unwrap();
        assert_eq!(header.len(), 4096);
        assert_eq!(&header[4086..], b"SWAPSPACE2");
        assert_eq!(header[1024..1036], [1u32, 255, 0].map(u32::to_ne_bytes).concat());
    }
}
