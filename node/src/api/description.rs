//! The description of the interface: what the handlers say of themselves, and what all routes share.
//!
//! What a route needs of its caller is in the table of scopes alone, and comes from there.

use axum::http::Method;
use bytes::Bytes;
use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{ContentBuilder, OpenApi, PathItem, Ref, Response, ResponseBuilder};

use super::builds::ALIASES;
use super::scopes::{Needs, needs};

/// Our key schemes: the header that client libraries send, and the one that others have anyway.
const SCHEMES: [&str; 2] = ["api_key", "bearer"];
/// What a route needs, spelled out for readers who know no role names of key schemes.
const SCOPE: &str = "x-required-scope";
/// Whether the key must be one of the platform's own team.
const PLATFORM: &str = "x-platform-only";

/// Completes the description and spells it as JSON.
pub(super) fn describe(mut description: OpenApi) -> Bytes {
    proto::version::PRODUCT.clone_into(&mut description.info.version);
    let components = description.components.get_or_insert_default();
    let [by_header, bearer] = SCHEMES;
    let key = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
    components.add_security_scheme(by_header, SecurityScheme::ApiKey(key));
    let token = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.add_security_scheme(bearer, token);
    let paths = &mut description.paths.paths;
    for (alias, path) in ALIASES {
        if let Some(item) = paths.get(path).cloned() {
            paths.insert(alias.to_owned(), item);
        }
    }
    let refusal = refusal();
    for (path, item) in paths {
        for (method, operation) in operations(item) {
            let responses = &mut operation.responses.responses;
            responses.insert("default".into(), refusal.clone().into());
            operation.operation_id = Some(name_of(&method, path));
            secure(operation, needs(&method, path));
        }
    }
    description.to_json().unwrap_or_default().into()
}

/// What every route answers from status 400 up.
fn refusal() -> Response {
    let body = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("ErrorBody")))
        .build();
    ResponseBuilder::new()
        .description("Something went wrong; the code says what.")
        .content("application/json", body)
        .build()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    let all = [
        (Method::GET, &mut item.get),
        (Method::POST, &mut item.post),
        (Method::PUT, &mut item.put),
        (Method::PATCH, &mut item.patch),
        (Method::DELETE, &mut item.delete),
    ];
    let all = all.into_iter();
    all.filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// A name that no other operation has: handlers are called alike, paths are not.
fn name_of(method: &Method, path: &str) -> String {
    let words = path.trim_start_matches("/v1").split('/');
    let words = words.map(|word| word.trim_matches(['{', '}']).replace(['-', '.'], "_"));
    let words = words.filter(|word| !word.is_empty()).collect::<Vec<_>>();
    format!("{}_{}", method.as_str().to_lowercase(), words.join("_"))
}

fn secure(operation: &mut Operation, needs: Option<Needs>) {
    let Some(needs) = needs else {
        // Said outright: without a word, a reader would not know whether it was forgotten.
        operation.security = Some(Vec::new());
        return;
    };
    let scope = needs.scope().word();
    let mut ways: Vec<_> = SCHEMES
        .map(|scheme| SecurityRequirement::new(scheme, [scope]))
        .into();
    if let Needs::Socket(_) = needs {
        // A browser sets no header on a WebSocket: its key is in the first frame.
        ways.push(SecurityRequirement::default());
    }
    operation.security = Some(ways);
    let extensions = operation.extensions.get_or_insert_default();
    let is_platform = matches!(needs, Needs::Platform(_));
    extensions.merge(Extensions::from_iter([
        (SCOPE, serde_json::Value::from(scope)),
        (PLATFORM, serde_json::Value::from(is_platform)),
    ]));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::super::scopes::{ANY, TABLE};
    use super::*;

    fn described() -> Vec<(Method, String, Value)> {
        let text = super::super::openapi();
        let whole: Value = serde_json::from_str(&text).expect("JSON");
        let paths = whole["paths"].as_object().expect("paths");
        let all = paths.iter().flat_map(|(path, item)| {
            let methods = item.as_object().expect("methods").iter();
            methods.map(move |(method, it)| {
                let method = method.to_uppercase().parse().expect("a method");
                (method, path.clone(), it.clone())
            })
        });
        all.collect()
    }

    #[test]
    fn every_route_says_which_key_it_takes_and_which_scope() {
        for (method, path, operation) in described() {
            let ways = operation["security"].as_array();
            let ways = ways.unwrap_or_else(|| panic!("{method} {path} says nothing"));
            let Some(needs) = needs(&method, &path) else {
                assert!(
                    !path.starts_with("/v1/"),
                    "{method} {path} takes any caller"
                );
                assert_eq!(ways, &[] as &[Value], "{method} {path}");
                continue;
            };
            let scope = needs.scope().word();
            let keys = [json!({"api_key": [scope]}), json!({"bearer": [scope]})];
            assert_eq!(ways[..2], keys, "{method} {path}");
            let is_socket = matches!(needs, Needs::Socket(_));
            assert_eq!(
                ways.get(2),
                is_socket.then_some(&json!({})),
                "{method} {path}"
            );
            assert_eq!(operation[SCOPE], scope);
            assert_eq!(operation[PLATFORM], matches!(needs, Needs::Platform(_)));
        }
    }

    #[test]
    fn every_route_of_the_table_is_described_unless_it_only_points_elsewhere() {
        let described: BTreeSet<(String, String)> = described()
            .into_iter()
            .map(|(method, path, _)| (method.to_string(), path))
            .collect();
        for (method, path, _) in TABLE.iter().filter(|(method, ..)| *method != ANY) {
            let known = ((*method).to_owned(), (*path).to_owned());
            // People's accounts: later.rs.
            let points_elsewhere = *path == "/v1/me" && *method != "GET";
            assert_eq!(!described.contains(&known), points_elsewhere, "{known:?}");
        }
    }

    #[test]
    fn no_two_operations_have_one_name() {
        let mut names = BTreeSet::new();
        for (method, path, operation) in described() {
            let name = operation["operationId"].to_string();
            assert!(
                names.insert(name.clone()),
                "{method} {path} is another {name}"
            );
        }
    }
}
