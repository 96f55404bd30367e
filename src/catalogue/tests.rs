use super::*;

#[test]
fn every_entry_is_a_model_of_its_published_size() {
    let mut wrong = Vec::new();
    for entry in entries().unwrap() {
        for file in &entry.files {
            let choice = Choice { entry, file };
            let model = choice.model().unwrap();
            let Some(size) = &file.size else { continue };
            let (ours, theirs) = (model.file_bytes(), size.bytes);
            // Half a per mille for the vocabulary in the header and for the last tensor's step.
            let allowed = size.rounding + theirs / 2000 + 12_000_000;
            if ours.abs_diff(theirs) > allowed {
                wrong.push(format!("{}: {ours}, published {}", choice.name(), size.text));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Hyperparameters that are wrong give another number of parameters: the count was published apart from them.
#[test]
fn every_entry_has_as_many_parameters_as_published() {
    let mut without = Vec::new();
    for entry in entries().unwrap().iter().filter(|entry| entry.status == Status::Published) {
        let (Some(text), Some(file)) = (&entry.parameters, entry.files.first()) else {
            without.push(entry.name.as_str());
            continue;
        };
        let ours = Choice { entry, file }.model().unwrap().parameters();
        let (published, allowed) = match text.strip_suffix('B') {
            // Half of the last digit.
            Some(billions) => {
                let digits = billions.split_once('.').map_or(0, |(_, part)| part.len());
                let unit = 1_000_000_000 / 10_u64.pow(u32::try_from(digits).unwrap());
                (billions.replace('.', "").parse::<u64>().unwrap() * unit, unit / 2)
            }
            // Tables of rotary frequencies are in the files and no parameters.
            None => (text.parse().unwrap(), 128),
        };
        assert!(ours.abs_diff(published) <= allowed, "{}: {ours}, published {text}", entry.name);
    }
    // The one is made of another model's layers and nobody counts it without its encoder; the other has no file.
    assert_eq!(without, ["apriel-1.5-15b-thinker", "phi-3-small"]);
}

#[test]
fn names_are_unique_and_found() {
    let mut seen = std::collections::BTreeSet::new();
    for entry in entries().unwrap() {
        for name in entry.names() {
            assert!(seen.insert(plain(name)), "{name} is there twice");
        }
        for file in &entry.files {
            let name = Choice { entry, file }.name();
            assert_eq!(find(&name).unwrap().name(), name);
        }
        assert!(entry.status == Status::Published || entry.note.is_some(), "{}: say why", entry.name);
    }
}

#[test]
fn names_are_forgiving_and_near_misses_are_suggested() {
    for name in ["deepseek-v3.1:tq1_0", "DeepSeek-V3.1:UD-TQ1_0", "unsloth/DeepSeek-V3.1-GGUF:TQ1_0"] {
        assert_eq!(find(name).unwrap().name(), "deepseek-v3.1:tq1_0", "{name}");
    }
    assert_eq!(find("nemo-12b").unwrap().name(), "mistral-nemo-12b:q8_0");
    assert!(find("deepsek-v3.1:tq1_0").unwrap_err().to_string().contains("did you mean deepseek-v3.1?"));
    assert!(find("deepseek-v3.1:q9").unwrap_err().to_string().contains("it has tq1_0"));
    assert!(find("").is_err());
    assert!(find(":").is_err());
}

#[test]
fn mixtures_that_are_open_have_a_size_to_choose_by() {
    for file in entries().unwrap().iter().flat_map(|entry| &entry.files).filter(|file| !file.by_rule()) {
        let open = data().unwrap().mix(file).unwrap().is_open();
        assert!(!open || file.size.is_some(), "{}", file.name);
    }
}

#[test]
fn rules_of_the_quantiser_give_the_sizes_that_its_users_published() {
    // As their publishers list them, in units of ten millions of bytes.
    for (name, published) in [
        ("gemma-2-27b:q4_k_m", 1665),
        ("qwen2.5-32b:q4_k_m", 1985),
        ("glm-4.7-flash:q4_k_m", 1847),
        ("mistral-large-2:q2_k", 4520),
        ("mistral-large-2:q3_k_m", 5910),
        ("mistral-large-2:q4_k_m", 7322),
    ] {
        let ours = find(name).unwrap().model().unwrap().file_bytes() / 10_000_000;
        assert!(ours.abs_diff(published) <= 2, "{name}: {ours}");
    }
}
