//! The regular expressions of `--override-tensor`, matched anywhere in a tensor's name.
//!
//! The part of ECMAScript's syntax that people use on tensor names: literals, `.`, classes, groups,
//! alternatives, `* + ? {m,n}` (lazy too), `^ $` and `\d \w \s`. Nothing here looks back or ahead, and only whether
//! there is a match counts: so all ways to match are followed at once, a byte of the name at a time (Thompson's
//! simulation), and neither time nor stack depend on how a pattern is written. Anybody may have the daemon match one.

/// The longest pattern; bytes. One that lists all of 512 layers has 2 KiB.
pub(super) const MAX_BYTES: usize = 4096;
/// Groups within groups.
const MAX_DEPTH: u32 = 16;
/// The largest count of `{m,n}`. A tensor's name has 63 bytes.
const MAX_COUNT: usize = 1000;
/// The most steps that a pattern may become. Real ones become a hundred.
const MAX_STEPS: usize = 4096;

/// A compiled pattern: a match is a way through all of its steps.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    steps: Vec<Step>,
    classes: Vec<Class>,
}

/// What has to be at the place, or where to go on.
#[derive(Clone, Copy, Debug)]
enum Step {
    Byte(u8),
    Any,
    /// By its place among the classes.
    Class(u16),
    Start,
    End,
    /// Goes on with the next step, and also with the one that is so many further.
    Fork(u16),
    /// Goes on so many steps further.
    Jump(u16),
    /// Goes back so many steps.
    Back(u16),
}

/// One bit for each byte that it holds.
#[derive(Clone, Copy, Debug, Default)]
struct Class([u64; 4]);

impl Class {
    fn insert(&mut self, low: u8, high: u8) {
        for byte in low..=high {
            self.0[usize::from(byte / 64)] |= 1 << (byte % 64);
        }
    }

    fn holds(&self, byte: u8) -> bool {
        self.0[usize::from(byte / 64)] >> (byte % 64) & 1 == 1
    }

    fn with(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    fn negated(self) -> Self {
        Self(self.0.map(|bits| !bits))
    }
}

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// What a pattern should look like and where it doesn't, to go behind "is not".
    pub fn new(text: &str) -> Result<Self, String> {
        if text.len() > MAX_BYTES {
            let bytes = text.len();
            return Err(format!("a regular expression of at most {MAX_BYTES} bytes (it has {bytes})"));
        }
        let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0, classes: Vec::new() };
        let steps = parser.alternatives()?;
        if parser.at < parser.text.len() {
            return Err(parser.wrong("a parenthesis too many"));
        }
        Ok(Self { steps, classes: parser.classes })
    }
}

/// Matches one pattern with names, one after the other.
pub(super) struct Search<'a> {
    pattern: &'a Pattern,
    now: Reached,
    next: Reached,
}

impl<'a> Search<'a> {
    pub fn new(pattern: &'a Pattern) -> Self {
        let steps = pattern.steps.len();
        Self { pattern, now: Reached::new(steps), next: Reached::new(steps) }
    }

    /// Whether the pattern matches somewhere in `name`. What it takes goes off `fuel`, in steps looked at, at most
    /// [`MAX_STEPS`] for each byte of the name; none where that runs out.
    pub fn matches(&mut self, name: &str, fuel: &mut u64) -> Option<bool> {
        self.now.clear();
        self.next.clear();
        let name = name.as_bytes();
        for at in 0..=name.len() {
            // A match may start anywhere.
            self.now.add(0);
            if self.advance(name, at) {
                return Some(true);
            }
            *fuel = fuel.checked_sub(self.now.steps.len() as u64)?;
            std::mem::swap(&mut self.now, &mut self.next);
            self.next.clear();
        }
        Some(false)
    }

    /// Takes the byte at a place of the name. Whether a match is complete before it.
    fn advance(&mut self, name: &[u8], at: usize) -> bool {
        let byte = name.get(at).copied();
        let mut looked_at = 0;
        while let Some(&i) = self.now.steps.get(looked_at) {
            looked_at += 1;
            let Some(step) = self.pattern.steps.get(i) else { return true };
            let taken = match *step {
                Step::Byte(b) => byte == Some(b),
                Step::Any => byte.is_some(),
                Step::Class(n) => byte.is_some_and(|b| self.pattern.classes[usize::from(n)].holds(b)),
                _ => false,
            };
            if taken {
                self.next.add(i + 1);
            }
            match *step {
                Step::Start if at == 0 => self.now.add(i + 1),
                Step::End if at == name.len() => self.now.add(i + 1),
                Step::Fork(far) => {
                    self.now.add(i + 1);
                    self.now.add(i + usize::from(far));
                }
                Step::Jump(far) => self.now.add(i + usize::from(far)),
                Step::Back(far) => self.now.add(i - usize::from(far)),
                _ => {}
            }
        }
        false
    }
}

/// The steps reached at one place of a name, each once.
struct Reached {
    steps: Vec<usize>,
    seen: Vec<bool>,
}

impl Reached {
    /// For as many steps, and the end behind them.
    fn new(steps: usize) -> Self {
        Self { steps: Vec::new(), seen: vec![false; steps + 1] }
    }

    fn add(&mut self, step: usize) {
        if !std::mem::replace(&mut self.seen[step], true) {
            self.steps.push(step);
        }
    }

    fn clear(&mut self) {
        for step in self.steps.drain(..) {
            self.seen[step] = false;
        }
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    depth: u32,
    classes: Vec<Class>,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn wrong(&self, what: &str) -> String {
        format!("a regular expression ({what}, at byte {})", self.at)
    }

    fn small(&self, steps: usize) -> Result<(), String> {
        if steps > MAX_STEPS {
            return Err(self.wrong("its repetitions make it too large"));
        }
        Ok(())
    }

    fn alternatives(&mut self) -> Result<Vec<Step>, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.wrong("its groups are nested too deep"));
        }
        let mut all = vec![self.sequence()?];
        while self.peek() == Some(b'|') {
            self.at += 1;
            all.push(self.sequence()?);
        }
        self.depth -= 1;
        let steps = either(all);
        self.small(steps.len())?;
        Ok(steps)
    }

    fn sequence(&mut self) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        while self.peek().is_some_and(|byte| !matches!(byte, b'|' | b')')) {
            let of_no_width = matches!(self.peek(), Some(b'^' | b'$'));
            let item = self.item()?;
            if of_no_width && matches!(self.peek(), Some(b'*' | b'+' | b'?' | b'{')) {
                return Err(self.wrong("^ and $ can't be repeated"));
            }
            let item = self.repeated(item)?;
            self.small(steps.len() + item.len())?;
            steps.extend(item);
        }
        Ok(steps)
    }

    fn item(&mut self) -> Result<Vec<Step>, String> {
        let byte = self.peek().unwrap_or_default();
        self.at += 1;
        Ok(match byte {
            b'.' => vec![Step::Any],
            b'^' => vec![Step::Start],
            b'$' => vec![Step::End],
            b'(' => {
                if self.text[self.at..].starts_with(b"?:") {
                    self.at += 2;
                }
                let inner = self.alternatives()?;
                if self.peek() != Some(b')') {
                    return Err(self.wrong("a parenthesis is not closed"));
                }
                self.at += 1;
                inner
            }
            b'[' => {
                let class = self.class()?;
                vec![self.one_of(class)]
            }
            b'\\' => vec![self.escape()?],
            b'*' | b'+' | b'?' => return Err(self.wrong("nothing stands before * + or ?")),
            other => vec![Step::Byte(other)],
        })
    }

    fn one_of(&mut self, class: Class) -> Step {
        self.classes.push(class);
        // One a byte of the pattern at most.
        Step::Class(distance(self.classes.len() - 1))
    }

    fn escape(&mut self) -> Result<Step, String> {
        let byte = self.peek().ok_or_else(|| self.wrong("it ends in a backslash"))?;
        self.at += 1;
        Ok(match shorthand(byte) {
            Some(class) => self.one_of(class),
            None => Step::Byte(byte),
        })
    }

    fn class(&mut self) -> Result<Class, String> {
        const OPEN: &str = "a bracket is not closed";
        let negated = self.peek() == Some(b'^');
        self.at += usize::from(negated);
        let mut class = Class::default();
        loop {
            let mut byte = self.peek().ok_or_else(|| self.wrong(OPEN))?;
            self.at += 1;
            if byte == b']' {
                return Ok(if negated { class.negated() } else { class });
            }
            if byte == b'\\' {
                byte = self.peek().ok_or_else(|| self.wrong(OPEN))?;
                self.at += 1;
                if let Some(short) = shorthand(byte) {
                    class = class.with(short);
                    continue;
                }
            }
            let is_range =
                self.peek() == Some(b'-') && self.text.get(self.at + 1).is_some_and(|b| *b != b']');
            if is_range {
                class.insert(byte, self.text[self.at + 1]);
                self.at += 2;
            } else {
                class.insert(byte, byte);
            }
        }
    }

    /// An item as often as what stands behind it says.
    fn repeated(&mut self, item: Vec<Step>) -> Result<Vec<Step>, String> {
        let (min, max) = match self.peek() {
            Some(b'*') => (0, None),
            Some(b'+') => (1, None),
            Some(b'?') => (0, Some(1)),
            Some(b'{') => self.counts()?,
            _ => return Ok(item),
        };
        // Asked before anything is made of it: this is all that makes a pattern larger than its text.
        let copies = max.unwrap_or(min + 1);
        self.small(copies.saturating_mul(item.len() + 2))?;
        self.at += 1;
        if self.peek() == Some(b'?') {
            self.at += 1; // lazy: whether there is a match is the same
        }
        Ok(times(&item, min, max))
    }

    /// The counts in braces, up to the closing one; no second one is no limit.
    fn counts(&mut self) -> Result<(usize, Option<usize>), String> {
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|b| *b == b'}').ok_or_else(|| self.wrong("a brace is not closed"))?;
        let inner = std::str::from_utf8(&rest[1..end]).unwrap_or_default();
        let (low, high) = inner.split_once(',').unwrap_or((inner, inner));
        let number = |text: &str| match text.parse::<usize>() {
            Ok(n) if n > MAX_COUNT => Err(self.wrong(&format!("a count is larger than {MAX_COUNT}"))),
            Ok(n) => Ok(n),
            Err(_) => Err(self.wrong("a count is no number, or far too large a one")),
        };
        let (min, max) = (number(low)?, (!high.is_empty()).then(|| number(high)).transpose()?);
        if max.is_some_and(|max| max < min) {
            return Err(self.wrong("the counts are in the wrong order"));
        }
        self.at += end;
        Ok((min, max))
    }
}

/// Steps for any of the alternatives.
fn either(mut all: Vec<Vec<Step>>) -> Vec<Step> {
    let Some(last) = all.pop() else { return Vec::new() };
    let mut left = all.iter().map(|steps| steps.len() + 2).sum::<usize>() + last.len();
    let mut whole = Vec::with_capacity(left);
    for steps in all {
        whole.push(Step::Fork(distance(steps.len() + 2)));
        left -= steps.len() + 2;
        whole.extend(steps);
        whole.push(Step::Jump(distance(left + 1)));
    }
    whole.extend(last);
    whole
}

/// Steps for `min` to `max` times an item.
fn times(item: &[Step], min: usize, max: Option<usize>) -> Vec<Step> {
    let mut whole = item.repeat(min);
    match max {
        Some(max) => {
            for left in (1..=max - min).rev() {
                whole.push(Step::Fork(distance(left * (item.len() + 1))));
                whole.extend(item);
            }
        }
        None => {
            whole.push(Step::Fork(distance(item.len() + 2)));
            whole.extend(item);
            whole.push(Step::Back(distance(item.len() + 1)));
        }
    }
    whole
}

/// How far it is over so many steps, of which there are [`MAX_STEPS`] at most.
fn distance(steps: usize) -> u16 {
    u16::try_from(steps).unwrap_or(u16::MAX)
}

/// `\d`, `\w`, `\s` and their negations.
fn shorthand(byte: u8) -> Option<Class> {
    let ranges: &[(u8, u8)] = match byte.to_ascii_lowercase() {
        b'd' => &[(b'0', b'9')],
        b'w' => &[(b'0', b'9'), (b'a', b'z'), (b'A', b'Z'), (b'_', b'_')],
        b's' => &[(b' ', b' '), (b'\t', b'\r')],
        _ => return None,
    };
    let mut class = Class::default();
    ranges.iter().for_each(|(low, high)| class.insert(*low, *high));
    Some(if byte.is_ascii_uppercase() { class.negated() } else { class })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let pattern = Pattern::new(pattern).unwrap();
        Search::new(&pattern).matches(name, &mut u64::MAX.clone()).unwrap()
    }

    #[test]
    fn matches_what_people_write() {
        let name = "blk.17.ffn_gate_exps.weight";
        for (pattern, expected) in [
            (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", true),
            (r"blk\.17\.", true),
            (r"blk\.1\.", false),
            (r"blk\.(1[0-9]|2\d)\.ffn_.*_exps", true),
            ("exps", true),
            ("^exps", false),
            (r"^blk\.\d{1,2}\.ffn_[a-z]+_exps\.weight$", true),
            (r"blk\.([2-9]|1[0-6])\..*exps", false),
            ("[^x]zzz", false),
            (r"^[\D]+17\.(?:ffn|attn)_\w+?\W", true),
            ("", true),
            ("^$", false),
            ("weight$|^output", true),
            ("f{2}", true),
            ("f{3}", false),
            ("f{2,}n", true),
            ("^(blk|ffn|gate|exps|weight|17|[._]){11}$", true),
            ("^(blk|ffn|gate|exps|weight|17|[._]){12}$", false),
            ("(^)*(b?){5}l", true),
            ("x{0}blk", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern}");
        }
        assert!(matches("(a*)*b", "aaaaaaaaaaaaaaaaaaaab"));
    }

    #[test]
    fn refuses_what_is_no_pattern_and_says_where() {
        for pattern in
            ["(", ")", "[a", "*", "a{", "a{x}", "a{,2}", "a{2,1}", "^*", "$?", "\\", &"(".repeat(1000)]
        {
            assert!(Pattern::new(pattern).is_err(), "{pattern}");
        }
        let wrong = "a regular expression (a count is larger than 1000, at byte 4)";
        assert_eq!(Pattern::new("exps{9999}").unwrap_err(), wrong);
    }

    #[test]
    fn hostile_patterns_are_refused_before_they_are_large() {
        for pattern in ["^{99999}", "(x{1000}){1000}", "((((a{9}){9}){9}){9}){9}", "[a-z]{4096}"] {
            assert!(Pattern::new(pattern).is_err(), "{pattern}");
        }
        let long = Pattern::new(&"(a)".repeat(10 << 20)).unwrap_err();
        assert_eq!(long, "a regular expression of at most 4096 bytes (it has 31457280)");
    }

    /// They neither recurse nor take more than the name is long.
    #[test]
    fn hostile_patterns_end_soon() {
        let name = "a".repeat(63);
        for (pattern, expected) in [
            ("(a|a|a)*(a|a)*(a|a)*c", false),
            ("((((a*)*)*)*)*c", false),
            ("(^){1000}a", true),
            ("((^)+)+a", true),
            ("(){1000}c", false),
            ("(a?){63}(a?){63}a{63}$", true),
            ("(.{0,40}){0,40}c", false),
            (&"^".repeat(MAX_BYTES), true),
            (&"(a)?".repeat(MAX_BYTES / 4), true),
            (&"|".repeat(1000), true),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            let mut fuel = 64 * (MAX_STEPS as u64 + 1);
            assert_eq!(Search::new(&pattern).matches(&name, &mut fuel), Some(expected), "{pattern:?}");
        }
    }
}
