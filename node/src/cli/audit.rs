//! `wrenn audit`: who changed what.

use std::process::ExitCode;

use clap::Args;
use http::Method;
use serde_json::{Value, json};

use super::error::CliError;
use super::{Global, print};

/// Records that one answer has at most.
const PAGE: usize = 200;

/// Which records.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How many at most, the newest ones.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 50)]
    limit: usize,
    /// Only about these kinds of things, such as capsule, api_key or host.
    #[arg(long = "type", value_name = "KIND", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Only these actions, such as create or capsule.destroy.
    #[arg(long, value_name = "ACTION", value_delimiter = ',')]
    action: Vec<String>,
    /// Only about the thing of this id.
    #[arg(long, value_name = "ID")]
    of: Option<String>,
    /// Only by this member, this key, or the `system`.
    #[arg(long, value_name = "ID")]
    by: Option<String>,
    /// Those of this team instead of one's own.
    #[arg(long, value_name = "TEAM", conflicts_with = "all_teams")]
    team: Option<String>,
    /// Those of all teams and of the cluster itself.
    #[arg(long)]
    all_teams: bool,
}

/// Does it.
pub(super) async fn run(global: &Global, options: Options) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let mut items: Vec<Value> = Vec::new();
    let mut before = None;
    while items.len() < options.limit {
        let path = options.path(options.limit - items.len(), before.as_deref())?;
        let mut page = client.call(Method::GET, &path, None).await?;
        if let Some(more) = page["items"].as_array_mut() {
            items.append(more);
        }
        match page["next_before_id"].as_str() {
            Some(next) => before = Some(next.to_owned()),
            None => break,
        }
    }
    if global.json {
        print::json(&json!(items))?;
    } else {
        show(&items)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Options {
    fn path(&self, rest: usize, before: Option<&str>) -> Result<String, CliError> {
        let route = if self.all_teams {
            "/v1/admin/audit-logs"
        } else {
            "/v1/audit-logs"
        };
        let words = [
            ("resource_type", Some(self.kinds.join(","))),
            ("action", Some(self.action.join(","))),
            ("resource_id", self.of.clone()),
            ("actor_id", self.by.clone()),
            ("team_id", self.team.clone()),
            ("before_id", before.map(str::to_owned)),
        ];
        let mut path = format!("{route}?limit={}", rest.min(PAGE));
        for (name, value) in words {
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                continue;
            };
            let plain = |it: char| it.is_ascii_alphanumeric() || "-_.,".contains(it);
            if !value.chars().all(plain) {
                return Err(CliError::usage(format!("{value:?} names nothing there is")));
            }
            path.push_str(&format!("&{name}={value}"));
        }
        Ok(path)
    }
}

fn show(items: &[Value]) -> Result<(), CliError> {
    let row = |item: &Value| {
        let kind = print::text(item, "resource_type");
        let what = format!("{kind}.{}", print::text(item, "action"));
        vec![
            print::text(item, "created_at"),
            first_of(item, &["actor_name", "actor_id", "actor_type"]),
            print::text(item, "source_ip"),
            what,
            first_of(item, &["resource_name", "resource_id"]),
            first_of(item, &["error", "status"]),
        ]
    };
    let rows: Vec<_> = items.iter().map(row).collect();
    print::table(&["WHEN", "WHO", "FROM", "WHAT", "OF", "OUTCOME"], &rows)
}

fn first_of(item: &Value, keys: &[&str]) -> String {
    let texts = keys.iter().map(|key| print::text(item, key));
    texts
        .into_iter()
        .find(|text| !text.is_empty())
        .unwrap_or_default()
}
