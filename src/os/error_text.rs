//! What an error of the system says.

use std::io;

/// The error without Rust's "(os error N)", for a sentence.
#[must_use]
pub fn error_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_left_out_and_nothing_else() {
        assert_eq!(error_text(&io::Error::from_raw_os_error(13)), "Permission denied");
        assert_eq!(error_text(&io::Error::other("too long (by 3)")), "too long (by 3)");
    }
}
