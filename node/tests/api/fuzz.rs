//! The interface fuzzed from its own description: for every path and method in `/openapi.json`,
//! requests of wrong types, unknown fields, huge and truncated bodies and odd strings.
//!
//! Asked are the real router and handlers over a log in memory. Routes into a guest name a capsule that
//! is not there: the agent of this world runs in this very process. What is asked at random is printed
//! by its seed; `WRENN_FUZZ_SEED` repeats it, `WRENN_FUZZ_ROUNDS` asks for more.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Method;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};

use crate::world::{ADMIN_KEY, Answer, World, full, is_success};

/// An id of the right shape that nobody has.
const NOBODY: &str = "cl-0000000000000000000000001";
/// Requests of each operation.
const ROUNDS: usize = 24;
/// Longest that any answer may take here.
const PATIENCE: Duration = Duration::from_secs(20);

/// Text that parsers have tripped over before.
const ODD: [&str; 18] = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "null",
    "..",
    "../../etc/passwd",
    "a\nb",
    "a\u{0}b",
    "\u{202e}abc",
    "%00",
    "%2e%2e%2f",
    "\u{1f600}",
    "';--",
    "<script>",
    "9999999999999999999999",
    "NaN",
];

/// One operation of the description.
struct Operation {
    method: Method,
    path: String,
    parameters: Vec<Value>,
    body: Option<Value>,
    responses: BTreeMap<String, Value>,
}

fn operations(description: &Value) -> Vec<Operation> {
    let mut all = Vec::new();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, it) in item.as_object().unwrap() {
            let responses = it["responses"].as_object().unwrap();
            all.push(Operation {
                method: method.to_uppercase().parse().unwrap(),
                path: path.clone(),
                parameters: it["parameters"].as_array().cloned().unwrap_or_default(),
                body: it["requestBody"]["content"]["application/json"]["schema"]
                    .as_object()
                    .map(|it| Value::Object(it.clone())),
                responses: responses.clone().into_iter().collect(),
            });
        }
    }
    all
}

/// What a reference stands for.
fn resolved<'a>(description: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => description.pointer(&path[1..]).expect("it is described"),
        None => schema,
    }
}

struct Fuzz {
    random: StdRng,
    description: Value,
}

impl Fuzz {
    fn odd(&mut self) -> String {
        if self.random.random_ratio(1, 40) {
            return "y".repeat(5000);
        }
        (*ODD.choose(&mut self.random).unwrap()).to_owned()
    }

    /// Any JSON at all.
    fn junk(&mut self) -> Value {
        match self.random.random_range(0..9) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(self.random.random::<i64>()),
            3 => json!(1.0e300),
            4 => json!(-1),
            5 => json!([]),
            6 => json!({"a": {"b": [null]}}),
            7 => (0..60).fold(json!(0), |inner, _| json!([inner])),
            _ => json!(self.odd()),
        }
    }

    /// Something that the schema allows, more or less.
    fn fitting(&mut self, schema: &Value, depth: usize) -> Value {
        let description = self.description.clone();
        let schema = resolved(&description, schema);
        if self.random.random_ratio(1, 8) || depth > 5 {
            return self.junk();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => kinds.first().cloned().unwrap_or_default(),
            kind => kind.clone(),
        };
        match kind.as_str() {
            Some("object") | None if schema["properties"].is_object() => {
                let mut object = Map::new();
                for (name, schema) in schema["properties"].as_object().unwrap() {
                    if self.random.random_ratio(2, 3) {
                        object.insert(name.clone(), self.fitting(schema, depth + 1));
                    }
                }
                if self.random.random_ratio(1, 6) {
                    let (name, value) = (self.odd(), self.junk());
                    object.insert(name, value);
                }
                object.into()
            }
            Some("object") => json!({ self.odd(): self.odd() }),
            Some("array") => {
                let items = schema["items"].clone();
                let count = self.random.random_range(0..4);
                (0..count)
                    .map(|_| self.fitting(&items, depth + 1))
                    .collect()
            }
            Some("integer" | "number") => json!(self.random.random_range(-2_i64..5000)),
            Some("boolean") => json!(self.random.random::<bool>()),
            _ => json!(self.odd()),
        }
    }

    fn body(&mut self, schema: Option<&Value>) -> Vec<u8> {
        let Some(schema) = schema else {
            return if self.random.random_ratio(1, 3) {
                b"{\"a\":1}".to_vec()
            } else {
                Vec::new()
            };
        };
        let whole = self.fitting(schema, 0).to_string().into_bytes();
        match self.random.random_range(0..10) {
            0 => whole[..self.random.random_range(0..=whole.len())].to_vec(),
            1 => (0..64).map(|_| self.random.random()).collect(),
            2 => Vec::new(),
            3 if self.random.random_ratio(1, 4) => vec![b'['; 2 << 20],
            _ => whole,
        }
    }

    /// The path with its parameters filled in, and a query.
    fn target(&mut self, operation: &Operation, ids: &Ids) -> String {
        let mut path = operation.path.clone();
        let into_guest = ["exec", "processes", "pty", "files"];
        let is_inside = into_guest.iter().any(|it| path.contains(&format!("/{it}")));
        while let Some(start) = path.find('{') {
            let end = start + path[start..].find('}').unwrap();
            let known = match &path[start + 1..end] {
                "id" if path.contains("/channels/") => &ids.channel,
                "id" if is_inside => NOBODY,
                "id" if path.contains("/tokens/") => "tok-0000000000000000000000001",
                "id" if path.contains("/hosts/") => "node-1",
                "id" => &ids.capsule,
                // Not the node of this world: it would be gone.
                "node" => "node-77",
                _ => "x",
            };
            let filler = match self.random.random_ratio(1, 3) {
                true => escaped(&self.odd()),
                false => known.to_owned(),
            };
            // An empty one is another route.
            let filler = if filler.is_empty() {
                "x".into()
            } else {
                filler
            };
            path.replace_range(start..=end, &filler);
        }
        let mut query = Vec::new();
        for parameter in &operation.parameters {
            if parameter["in"] == "query" && self.random.random_ratio(1, 2) {
                let name = parameter["name"].as_str().unwrap();
                // Waiting for a quorum or a drain is not what is tried here.
                query.push(format!("{name}={}", escaped(&self.odd())));
            }
        }
        if self.random.random_ratio(1, 8) {
            query.push(escaped(&self.odd()));
        }
        match query.is_empty() {
            true => path,
            false => format!("{path}?{}", query.join("&")),
        }
    }
}

struct Ids {
    capsule: String,
    channel: String,
}

/// Percent-encoded, all of it that is no letter or digit.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// Whether `value` is what `schema` says of an answer; says what is not.
fn mismatch(description: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    let schema = resolved(description, schema);
    if let Some(all) = schema["allOf"].as_array() {
        return all
            .iter()
            .find_map(|one| mismatch(description, one, value, at));
    }
    if let Some(some) = schema["oneOf"].as_array() {
        let fits = |one: &Value| mismatch(description, one, value, at).is_none();
        return (!some.iter().any(fits)).then(|| format!("{at}: {value} is none of several"));
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        Value::String(kind) => vec![kind],
        _ => return None,
    };
    let is = |kind: &&str| match *kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        _ => true,
    };
    if !kinds.iter().any(is) {
        return Some(format!("{at}: {value} is no {kinds:?}"));
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
        return values
            .iter()
            .find_map(|it| mismatch(description, items, it, at));
    }
    let object = value.as_object()?;
    let required = schema["required"].as_array().into_iter().flatten();
    let missing = required
        .filter_map(Value::as_str)
        .find(|it| !object.contains_key(*it));
    if let Some(missing) = missing {
        return Some(format!("{at}: {missing} is missing"));
    }
    let properties = schema["properties"].as_object()?;
    properties.iter().find_map(|(name, schema)| {
        let value = object.get(name)?;
        mismatch(description, schema, value, &format!("{at}.{name}"))
    })
}

/// Statuses from 500 up that mean a refusal, and not that we broke.
fn is_documented(status: u16) -> bool {
    matches!(status, 501 | 503)
}

/// A refusal is well formed, and a success is as described.
fn judge(description: &Value, operation: &Operation, answer: &Answer, what: &str) {
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if answer.status >= 500 && !is_documented(answer.status) {
        // A played reconciler that could not start something says so as a guest's failure.
        assert_eq!(answer.status, 502, "{what}: {text}");
    }
    if answer.status >= 400 {
        let error = &answer.json()["error"];
        let is_text = |name: &str| error[name].as_str().is_some_and(|it| !it.is_empty());
        assert!(is_text("code") && is_text("message"), "{what}: {text}");
        return;
    }
    let known = operation.responses.get(&answer.status.to_string());
    let known = known.unwrap_or_else(|| panic!("{} is not described: {what}", answer.status));
    let schema = &known["content"]["application/json"]["schema"];
    if is_success(answer.status) && !schema.is_null() {
        let wrong = mismatch(description, schema, &answer.json(), "body");
        assert_eq!(wrong, None, "{what}: {text}");
    }
}

#[tokio::test]
async fn every_operation_answers_nonsense_with_a_well_formed_refusal() {
    let seed = std::env::var("WRENN_FUZZ_SEED")
        .ok()
        .and_then(|it| it.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    let rounds = std::env::var("WRENN_FUZZ_ROUNDS")
        .ok()
        .and_then(|it| it.parse().ok());
    println!("WRENN_FUZZ_SEED={seed}");
    let short = Duration::from_millis(200);
    let world = World::with_waits(short, short).await;
    let description = world
        .ask(Method::GET, "/openapi.json", "", "")
        .await
        .is(200)
        .json();
    let ids = Ids {
        capsule: world
            .ask(Method::POST, "/v1/capsules", ADMIN_KEY, "{}")
            .await
            .json()["id"]
            .as_str()
            .unwrap()
            .to_owned(),
        channel: "ch-0000000000000000000000001".into(),
    };
    let mut fuzz = Fuzz {
        random: StdRng::seed_from_u64(seed),
        description: description.clone(),
    };
    let mut answered: BTreeMap<u16, usize> = BTreeMap::new();
    for operation in operations(&description) {
        // It has no end.
        if operation.path == "/v1/events/stream" {
            continue;
        }
        for _ in 0..rounds.unwrap_or(ROUNDS) {
            let target = fuzz.target(&operation, &ids);
            let body = fuzz.body(operation.body.as_ref());
            let shown: String = String::from_utf8_lossy(&body).chars().take(300).collect();
            let what = format!("seed {seed}: {} {target} {shown:?}", operation.method);
            let request = world
                .request(operation.method.clone(), &target)
                .header("x-api-key", ADMIN_KEY)
                .header("content-type", "application/json");
            let Ok(request) = request.body(full(body)) else {
                continue;
            };
            let answer = tokio::time::timeout(PATIENCE, world.send(request));
            let answer = answer.await.unwrap_or_else(|_| panic!("no answer: {what}"));
            *answered.entry(answer.status).or_default() += 1;
            judge(&description, &operation, &answer, &what);
        }
        world.ask(Method::GET, "/healthz", "", "").await.is(200);
    }
    println!("answers by status: {answered:?}");
    assert!(answered.keys().any(|it| *it < 300) && answered.contains_key(&400));
}
