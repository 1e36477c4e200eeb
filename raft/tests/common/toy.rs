//! A machine simple enough to predict: `key=value` sets, `key=` removes, and the answer is the
//! entry's index followed by what was there before.

use rpds::RedBlackTreeMapSync;
use wrenn_raft::machine::{Applied, Machine, Row, Unreadable};

/// The state: keys and values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toy {
    /// What was set and not removed.
    pub map: RedBlackTreeMapSync<Vec<u8>, Vec<u8>>,
}

impl Machine for Toy {
    fn empty() -> Self {
        Self::default()
    }

    fn apply(&mut self, index: u64, proposal: &[u8]) -> Result<Applied, Unreadable> {
        let middle = proposal.iter().position(|&byte| byte == b'=');
        let Some(middle) = middle else {
            return Err(Unreadable {
                what: "entry",
                why: "it has no equals sign".into(),
            });
        };
        let (key, value) = (proposal[..middle].to_vec(), proposal[middle + 1..].to_vec());
        let before = self.map.get(&key).cloned().unwrap_or_default();
        let row = if value.is_empty() {
            self.map.remove_mut(&key);
            (key, None)
        } else {
            self.map.insert_mut(key.clone(), value.clone());
            (key, Some(value))
        };
        Ok(Applied {
            answer: [index.to_string().into_bytes(), vec![b' '], before].concat(),
            rows: vec![row],
        })
    }

    fn rows(&self) -> impl Iterator<Item = Row> + Send {
        self.map
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
    }

    fn from_rows(rows: impl IntoIterator<Item = Row>) -> Result<Self, Unreadable> {
        Ok(Self {
            map: rows.into_iter().collect(),
        })
    }
}
