//! The context lengths at which a model may run.

/// A slot's share of the context is padded up to this.
const STEP: u64 = 256;
/// Rungs at the most: enough for steps of a thousandth of any context, few enough to price at once.
const RUNGS: u64 = 128;
/// Without a configured context the model is trusted down to this; less is no use to anybody.
const LEAST: u64 = 4096;
/// The smallest context that a refusal advises.
const LEAST_ADVISED: u64 = 512;

/// From the wanted context down to the smallest allowed one; tokens of all slots together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contexts {
    /// Descending, never empty.
    pub allowed: Vec<u64>,
    /// Smaller ones, for advice only; descending.
    pub advised: Vec<u64>,
}

/// What was asked for and what is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// For this start alone: exactly that.
    pub once: Option<u64>,
    /// Configured, by key, argument or variable; none: what the model was trained on.
    pub configured: Option<u64>,
    /// It may be reduced to this.
    pub least: Option<u64>,
    /// What the model was trained on; 0 where it does not say.
    pub trained: u64,
    /// Slots.
    pub slots: u64,
}

/// Works out the ladder.
pub(super) fn contexts(asked: Asked) -> Contexts {
    let trained = if asked.trained == 0 { LEAST } else { asked.trained };
    let (wanted, least) = match (asked.once, asked.configured) {
        (Some(once), _) => (once, once),
        (None, Some(configured)) => (configured, asked.least.unwrap_or(configured)),
        (None, None) => (trained, asked.least.unwrap_or(LEAST)),
    };
    let wanted = wanted.max(1);
    let least = least.clamp(1, wanted);
    let grain = STEP.saturating_mul(asked.slots.max(1));
    // Rounded up to whole grains, so that there are never more rungs than allowed.
    let step = (wanted - least).div_ceil(RUNGS - 2).max(1).div_ceil(grain).saturating_mul(grain);
    let mut allowed = vec![wanted];
    let below = std::iter::successors((wanted - 1).checked_div(step).map(|n| n * step), |context| {
        context.checked_sub(step)
    });
    allowed.extend(below.take_while(|context| *context > least));
    if least < wanted {
        allowed.push(least);
    }
    let advised = std::iter::successors(Some(least / 2), |context| Some(context / 2));
    let advised =
        advised.map(|context| context / STEP * STEP).take_while(|context| *context >= LEAST_ADVISED);
    Contexts { allowed, advised: advised.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(configured: Option<u64>, least: Option<u64>) -> Asked {
        Asked { once: None, configured, least, trained: 131_072, slots: 1 }
    }

    #[test]
    fn a_configured_context_is_never_reduced_without_leave() {
        let fixed = contexts(asked(Some(65536), None));
        assert_eq!(fixed.allowed, [65536]);
        assert_eq!(fixed.advised, [32768, 16384, 8192, 4096, 2048, 1024, 512]);
        let free = contexts(asked(Some(65536), Some(16384)));
        assert_eq!((free.allowed[0], *free.allowed.last().unwrap()), (65536, 16384));
        assert_eq!(free.advised[0], 8192);
    }

    #[test]
    fn without_a_configured_one_the_model_says() {
        let own = contexts(asked(None, None));
        assert_eq!((own.allowed[0], *own.allowed.last().unwrap()), (131_072, 4096));
        let silent = contexts(Asked { trained: 0, ..asked(None, None) });
        assert_eq!(silent.allowed, [4096]);
        let small = contexts(Asked { trained: 2048, ..asked(None, None) });
        assert_eq!(small.allowed, [2048]);
        let once = contexts(Asked { once: Some(1000), ..asked(Some(65536), Some(16384)) });
        assert_eq!(once.allowed, [1000]);
    }

    #[test]
    fn ladders_descend_in_whole_slots_and_are_short() {
        for (wanted, least, slots) in [
            (131_072, 4096, 1),
            (1 << 20, 256, 4),
            (u64::MAX, 1, 1),
            (4097, 4096, 1),
            (300, 1, 64),
            (1, 0, 0),
            (0, 0, 0),
        ] {
            let ladder = contexts(Asked {
                once: None,
                configured: Some(wanted),
                least: Some(least),
                trained: 0,
                slots,
            });
            assert!(u64::try_from(ladder.allowed.len()).unwrap() <= RUNGS, "{wanted} {least} {slots}");
            assert!(ladder.allowed.windows(2).all(|pair| pair[0] > pair[1]), "{:?}", ladder.allowed);
            let inner = ladder.allowed.get(1..ladder.allowed.len() - 1).unwrap_or_default();
            assert!(inner.iter().all(|context| context % (256 * slots.max(1)) == 0));
        }
    }
}
