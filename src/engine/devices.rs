//! The devices that a llama-server can offload to, from what `llama-server --list-devices` prints.

use crate::bytes::MIB;

/// A device as the engine lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The engine's name for it, backend and number: `ROCm0`, `Vulkan0`, `CUDA0`.
    pub name: String,
    /// What it is, as its driver says.
    pub description: String,
    /// All its memory in bytes. On unified memory this is what the driver lets it use.
    pub total_bytes: u64,
    /// Its free memory in bytes, when it was asked.
    pub free_bytes: u64,
}

impl Listed {
    /// The backend: the name without its number.
    #[must_use]
    pub fn backend(&self) -> &str {
        self.name.trim_end_matches(|c: char| c.is_ascii_digit())
    }
}

/// Reads the output of `llama-server --list-devices`; empty for an engine without devices. None when
/// it has no list: the engine did not understand the question.
///
/// ```text
/// Available devices:
///   Vulkan0: AMD Radeon Graphics (RADV GFX1151) (112640 MiB, 111000 MiB free)
/// ```
#[must_use]
pub fn parse(text: &str) -> Option<Vec<Listed>> {
    let mut lines = text.lines().take(1000).skip_while(|line| line.trim() != "Available devices:");
    lines.next()?;
    Some(lines.take_while(|line| line.starts_with(' ')).filter_map(device).collect())
}

fn device(line: &str) -> Option<Listed> {
    let (name, rest) = line.trim().split_once(": ")?;
    let (description, memory) = rest.strip_suffix(')')?.rsplit_once(" (")?;
    let (total, free) = memory.split_once(", ")?;
    let mib = |text: &str| text.strip_suffix(" MiB")?.parse::<u64>().ok()?.checked_mul(MIB);
    Some(Listed {
        name: name.to_owned(),
        description: description.chars().take(100).collect(),
        total_bytes: mib(total)?,
        free_bytes: mib(free.strip_suffix(" free")?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_list_among_the_log() {
        let text = "ggml_vulkan: Found 1 Vulkan devices:\n\
                    ggml_vulkan: 0 = AMD Radeon Graphics (RADV GFX1151) (radv) | uma: 1\n\
                    Available devices:\n  Vulkan0: AMD Radeon Graphics (RADV GFX1151) (112640 MiB, 111000 MiB free)\n\
                    \x20 CUDA10: NVIDIA GeForce RTX 3080 Ti (11909 MiB, 11650 MiB free)\nggml_cuda_init: done\n";
        let found = parse(text).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].description, "AMD Radeon Graphics (RADV GFX1151)");
        assert_eq!((found[0].total_bytes, found[0].free_bytes), (112_640 * MIB, 111_000 * MIB));
        assert_eq!((found[0].backend(), found[1].backend()), ("Vulkan", "CUDA"));
    }

    #[test]
    fn none_is_not_the_same_as_no_answer() {
        assert_eq!(parse("Available devices:\n  (none)\n"), Some(Vec::new()));
        assert_eq!(parse("error: invalid argument: --list-devices\n"), None);
        let overflow = "Available devices:\n  X0: y (99999999999999999999 MiB, 0 MiB free)\n";
        assert_eq!(parse(overflow), Some(Vec::new()));
    }
}
