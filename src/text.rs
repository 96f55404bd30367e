//! Texts that others wrote, made fit for a terminal.

/// Texts of model files, engines and others, without what would command the terminal: what it
/// obeys ([`is_obeyed`]) becomes [`REPLACEMENT`]; line ends stay.
#[must_use]
pub fn harmless(text: &str) -> String {
    text.replace(|c| c != '\n' && is_obeyed(c), REPLACEMENT)
}

/// What stands for what is not shown: U+FFFD.
pub const REPLACEMENT: &str = "\u{fffd}";

/// Whether a terminal obeys a character instead of showing it: control characters, and those that turn the direction
/// of writing round.
#[must_use]
pub fn is_obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_commands_the_terminal() {
        assert_eq!(
            harmless("loading \x1b]52;c;eA==\x07\r\nñ 1 %"),
            "loading \u{fffd}]52;c;eA==\u{fffd}\u{fffd}\nñ 1 %"
        );
        assert_eq!(harmless("a\u{202e}b\u{9b}31m"), "a\u{fffd}b\u{fffd}31m");
    }
}
