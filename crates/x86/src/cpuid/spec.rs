//! `MODEL[,+feature,-feature,feature=on|off]`, as the command line has it.

use super::{FeatureSet, MODELS, Model, canonical, feature_names, find_model};
use std::str::FromStr;

/// A CPU as asked for.
#[derive(Debug, Clone)]
pub struct CpuSpec {
    /// The model.
    pub model: &'static Model,
    /// Changes to its features, in order: canonical name, on or off. The last one about a feature counts.
    pub changes: Vec<(&'static str, bool)>,
    /// What a model that follows the engine is kept to, beside the changes; all that the engine offers if `None`.
    pub within: Option<FeatureSet>,
}

/// Why a CPU description is not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// No such model.
    #[error("CPU model {name:?} is not known; models: {known}")]
    Model {
        /// As given.
        name: String,
        /// All there are.
        known: String,
    },
    /// No such feature.
    #[error("CPU feature {name:?} is not known{hint}")]
    Feature {
        /// As given.
        name: String,
        /// What may have been meant, ready to append.
        hint: String,
    },
    /// Neither `+name` nor `-name` nor `name=on|off`.
    #[error("CPU option {item:?} is not understood; write +feature, -feature, feature=on or feature=off")]
    Item {
        /// As given.
        item: String,
    },
}

impl CpuSpec {
    /// A model without changes.
    pub fn plain(model: &'static Model) -> CpuSpec {
        CpuSpec { model, changes: Vec::new(), within: None }
    }
}

impl FromStr for CpuSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<CpuSpec, SpecError> {
        let mut items = text.split(',');
        let name = items.next().unwrap_or_default().trim();
        let model = find_model(name).ok_or_else(|| SpecError::Model {
            name: name.into(),
            known: MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", "),
        })?;
        let mut changes = Vec::new();
        for item in items {
            let bad = || SpecError::Item { item: item.into() };
            let item = item.trim();
            let (feature, on) = match (item.split_at_checked(1), item.split_once('=')) {
                (Some(("+", f)), _) => (f, true),
                (Some(("-", f)), _) => (f, false),
                (_, Some((f, "on" | "yes" | "true"))) => (f, true),
                (_, Some((f, "off" | "no" | "false"))) => (f, false),
                _ => return Err(bad()),
            };
            if feature.is_empty() {
                return Err(bad());
            }
            let known = canonical(feature)
                .ok_or_else(|| SpecError::Feature { name: feature.into(), hint: hint(feature) })?;
            changes.push((known, on));
        }
        Ok(CpuSpec { model, changes, within: None })
    }
}

/// Close names: few edits away, or sharing a beginning; else where to find all.
fn hint(name: &str) -> String {
    let name = name.to_ascii_lowercase().replace('_', "-");
    let short: String = name.chars().take(40).collect();
    let allowed = if short.len() <= 4 { 1 } else { 2 };
    let mut near: Vec<(usize, &str)> = feature_names()
        .map(|f| (distance(&short, f), f))
        .filter(|(d, f)| *d <= allowed || (short.len() >= 3 && f.starts_with(&short)))
        .collect();
    near.sort();
    near.truncate(5);
    if near.is_empty() {
        "; `--cpu help` lists all".into()
    } else {
        format!("; did you mean {}?", near.iter().map(|n| n.1).collect::<Vec<_>>().join(", "))
    }
}

/// Edit distance (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
