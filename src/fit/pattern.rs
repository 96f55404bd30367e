//! The regular expressions of `--override-tensor`, matched anywhere in a tensor's name.
//!
//! The part of ECMAScript's syntax that people use on tensor names: literals, `.`, classes, groups,
//! alternatives, `* + ? {m,n}` (lazy too), `^ $` and `\d \w \s`. Matching is bounded in steps.

/// A compiled pattern.
#[derive(Clone, Debug)]
pub struct Pattern {
    root: Vec<Vec<Node>>,
}

#[derive(Clone, Debug)]
enum Node {
    Byte(u8),
    Any,
    Class { negated: bool, ranges: Vec<(u8, u8)> },
    Group(Vec<Vec<Node>>),
    Repeat { node: Box<Node>, min: u32, max: u32 },
    Start,
    End,
}

/// No name needs more steps than this with a sane pattern.
const MAX_STEPS: u32 = 100_000;
const MAX_DEPTH: u32 = 16;

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// What a pattern should look like, to go behind "is not".
    pub fn new(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0 };
        let root = parser.alternatives()?;
        if parser.at < parser.text.len() {
            return Err("a regular expression (a parenthesis too many)".to_owned());
        }
        Ok(Self { root })
    }

    /// Whether the pattern matches somewhere in `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let mut steps = MAX_STEPS;
        let name = name.as_bytes();
        (0..=name.len()).any(|start| any(&self.root, name, start, &mut steps, &mut |_, _| true))
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn alternatives(&mut self) -> Result<Vec<Vec<Node>>, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("a regular expression (its groups are nested too deep)".to_owned());
        }
        let mut all = vec![Vec::new()];
        while let Some(byte) = self.peek() {
            match byte {
                b')' => break,
                b'|' => {
                    self.at += 1;
                    all.push(Vec::new());
                }
                _ => {
                    let node = self.item()?;
                    let node = self.repeated(node)?;
                    if let Some(last) = all.last_mut() {
                        last.push(node);
                    }
                }
            }
        }
        self.depth -= 1;
        Ok(all)
    }

    fn item(&mut self) -> Result<Node, String> {
        let byte = self.peek().unwrap_or_default();
        self.at += 1;
        Ok(match byte {
            b'.' => Node::Any,
            b'^' => Node::Start,
            b'$' => Node::End,
            b'(' => {
                if self.text[self.at..].starts_with(b"?:") {
                    self.at += 2;
                }
                let inner = self.alternatives()?;
                if self.peek() != Some(b')') {
                    return Err("a regular expression (a parenthesis is not closed)".to_owned());
                }
                self.at += 1;
                Node::Group(inner)
            }
            b'[' => self.class()?,
            b'\\' => self.escape()?,
            b'*' | b'+' | b'?' => {
                return Err("a regular expression (nothing stands before * + or ?)".to_owned());
            }
            other => Node::Byte(other),
        })
    }

    fn escape(&mut self) -> Result<Node, String> {
        let byte = self.peek().ok_or("a regular expression (it ends in a backslash)")?;
        self.at += 1;
        Ok(match shorthand(byte) {
            Some((negated, ranges)) => Node::Class { negated, ranges },
            None => Node::Byte(byte),
        })
    }

    fn class(&mut self) -> Result<Node, String> {
        const OPEN: &str = "a regular expression (a bracket is not closed)";
        let negated = self.peek() == Some(b'^');
        self.at += usize::from(negated);
        let mut ranges = Vec::new();
        loop {
            let mut byte = self.peek().ok_or(OPEN)?;
            self.at += 1;
            if byte == b']' {
                return Ok(Node::Class { negated, ranges });
            }
            if byte == b'\\' {
                byte = self.peek().ok_or(OPEN)?;
                self.at += 1;
                if let Some((false, short)) = shorthand(byte) {
                    ranges.extend(short);
                    continue;
                }
            }
            let is_range =
                self.peek() == Some(b'-') && self.text.get(self.at + 1).is_some_and(|b| *b != b']');
            if is_range {
                ranges.push((byte, self.text[self.at + 1]));
                self.at += 2;
            } else {
                ranges.push((byte, byte));
            }
        }
    }

    fn repeated(&mut self, node: Node) -> Result<Node, String> {
        let (min, max) = match self.peek() {
            Some(b'*') => (0, u32::MAX),
            Some(b'+') => (1, u32::MAX),
            Some(b'?') => (0, 1),
            Some(b'{') => {
                let rest = &self.text[self.at..];
                let end = rest
                    .iter()
                    .position(|b| *b == b'}')
                    .ok_or("a regular expression (a brace is not closed)")?;
                let inner = std::str::from_utf8(&rest[1..end]).unwrap_or_default();
                let (low, high) = inner.split_once(',').unwrap_or((inner, inner));
                let number =
                    |s: &str| s.parse::<u32>().map_err(|_| "a regular expression (a count is no number)");
                self.at += end;
                (number(low)?, if high.is_empty() { u32::MAX } else { number(high)? })
            }
            _ => return Ok(node),
        };
        self.at += 1;
        if self.peek() == Some(b'?') {
            self.at += 1; // lazy: whether there is a match is the same
        }
        Ok(Node::Repeat { node: Box::new(node), min, max })
    }
}

/// `\d`, `\w`, `\s` and their negations.
fn shorthand(byte: u8) -> Option<(bool, Vec<(u8, u8)>)> {
    let ranges = match byte.to_ascii_lowercase() {
        b'd' => vec![(b'0', b'9')],
        b'w' => vec![(b'0', b'9'), (b'a', b'z'), (b'A', b'Z'), (b'_', b'_')],
        b's' => vec![(b' ', b' '), (b'\t', b'\r')],
        _ => return None,
    };
    Some((byte.is_ascii_uppercase(), ranges))
}

type Next<'a> = dyn FnMut(usize, &mut u32) -> bool + 'a;

fn any(alternatives: &[Vec<Node>], name: &[u8], at: usize, steps: &mut u32, next: &mut Next) -> bool {
    alternatives.iter().any(|nodes| sequence(nodes, name, at, steps, next))
}

fn sequence(nodes: &[Node], name: &[u8], at: usize, steps: &mut u32, next: &mut Next) -> bool {
    if *steps == 0 {
        return false;
    }
    *steps -= 1;
    let Some((node, rest)) = nodes.split_first() else { return next(at, steps) };
    one(node, name, at, steps, &mut |at, steps| sequence(rest, name, at, steps, next))
}

fn one(node: &Node, name: &[u8], at: usize, steps: &mut u32, next: &mut Next) -> bool {
    let byte = name.get(at).copied();
    match node {
        Node::Byte(b) => byte == Some(*b) && next(at + 1, steps),
        Node::Any => byte.is_some() && next(at + 1, steps),
        Node::Class { negated, ranges } => {
            let inside = |b: u8| ranges.iter().any(|(low, high)| (*low..=*high).contains(&b));
            byte.is_some_and(|b| inside(b) != *negated) && next(at + 1, steps)
        }
        Node::Start => at == 0 && next(at, steps),
        Node::End => at == name.len() && next(at, steps),
        Node::Group(inner) => any(inner, name, at, steps, next),
        Node::Repeat { node, min, max } => repeat(node, (*min, *max), name, at, steps, next),
    }
}

fn repeat(
    node: &Node,
    (min, max): (u32, u32),
    name: &[u8],
    at: usize,
    steps: &mut u32,
    next: &mut Next,
) -> bool {
    if *steps == 0 {
        return false;
    }
    *steps -= 1;
    let again = max > 0
        && one(node, name, at, steps, &mut |after, steps| {
            // An empty match again would go on for ever.
            (after > at || min > 0)
                && repeat(node, (min.saturating_sub(1), max - 1), name, after, steps, next)
        });
    again || (min == 0 && next(at, steps))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("(a*)*b", true),
        ] {
            let name = if pattern == "(a*)*b" { "aaaaaaaaaaaaaaaaaaaab" } else { name };
            assert_eq!(Pattern::new(pattern).unwrap().matches(name), expected, "{pattern}");
        }
    }

    #[test]
    fn refuses_what_is_no_pattern_and_ends_on_hostile_ones() {
        for pattern in ["(", ")", "[a", "*", "a{", "a{x}", "\\", &"(".repeat(1000)] {
            assert!(Pattern::new(pattern).is_err(), "{pattern}");
        }
        let evil = Pattern::new("(a|a|a)*(a|a)*(a|a)*c").unwrap();
        assert!(!evil.matches(&"a".repeat(60)));
    }
}
