//! Talking to a world's daemon: requests as such, and what tests do with capsules all the time.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use std::{fs, thread};

use node::vmm::cloud_hypervisor::spawn::NAME_PREFIX;
use serde_json::{Value, json};

use crate::world::{LOOK_AGAIN, World};

/// Longest a guest may take to boot under emulation on a busy machine.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest anything else may take that is not bounded by its own nature.
const PATIENCE: Duration = Duration::from_secs(60);
/// Parts of a form are separated by this, which no test puts into a file.
const BOUNDARY: &str = "0123456789abcdef0123456789abcdef";

/// An answer of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, as it came.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; `null` where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The status and the stable code of an error answer.
    #[must_use]
    pub fn refusal(&self) -> (u16, String) {
        let code = self.json()["error"]["code"].clone();
        (self.status, code.as_str().unwrap_or_default().to_owned())
    }

    /// What an error answer says to people.
    #[must_use]
    pub fn message(&self) -> String {
        let message = self.json()["error"]["message"].clone();
        message.as_str().unwrap_or_default().to_owned()
    }
}

/// Waits until `look` finds something, for as long as `patience`.
pub fn wait_for<T>(patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Requests.
impl World {
    /// A GET without a key; `None` where nobody answers.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<Answer> {
        self.send("GET", path, &[], None)
    }

    /// A request with the bootstrap key and a JSON body.
    ///
    /// # Panics
    /// Where nobody answers.
    #[must_use]
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.try_call(method, path, body).unwrap_or_else(|| {
            panic!(
                "{method} {path}: no answer; the daemon's log:\n{}",
                self.log()
            )
        })
    }

    /// A request with the bootstrap key and a JSON body; `None` where nobody answers.
    #[must_use]
    pub fn try_call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Answer> {
        let key = self.key();
        let mut headers = vec![("X-API-Key", key.as_str())];
        let bytes = body.map(|body| body.to_string().into_bytes());
        if bytes.is_some() {
            headers.push(("Content-Type", "application/json"));
        }
        self.send(method, path, &headers, bytes.as_deref())
    }

    /// A request about one capsule: `path` follows its id.
    #[must_use]
    pub fn about(&self, method: &str, id: &str, path: &str, body: Option<&Value>) -> Answer {
        self.call(method, &format!("/v1/capsules/{id}{path}"), body)
    }

    /// Any request; `None` where nobody answers.
    #[must_use]
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Option<Answer> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(BOOT_TIMEOUT))
            .build();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let agent = ureq::Agent::new_with_config(config);
        let mut response = match body {
            Some(body) => agent.run(request.body(body).expect("a request")).ok()?,
            None => agent.run(request.body(()).expect("a request")).ok()?,
        };
        let status = response.status().as_u16();
        let body = response
            .body_mut()
            .with_config()
            .limit(u64::MAX)
            .read_to_vec()
            .ok()?;
        Some(Answer { status, body })
    }

    /// Sends bytes as they are, ends the sending side, and returns what comes back as text.
    ///
    /// # Panics
    /// Where nobody listens.
    #[must_use]
    pub fn send_raw(&self, bytes: &[u8]) -> String {
        let address = self.url().replace("http://", "");
        let mut stream = TcpStream::connect(address).expect("the API listens");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout above zero");
        // The daemon may answer and close before it has read everything.
        let _closed = stream.write_all(bytes);
        let _closed = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Writes a file into a capsule; `route` is `files/write` or `files/stream/write`.
    #[must_use]
    pub fn upload(&self, id: &str, route: &str, path: &str, contents: &[u8]) -> Answer {
        let (kind, body) = form(path, contents);
        self.send_form(id, route, &kind, &body)
    }

    /// Sends a form about a capsule.
    ///
    /// # Panics
    /// Where nobody answers.
    #[must_use]
    pub fn send_form(&self, id: &str, route: &str, kind: &str, body: &[u8]) -> Answer {
        let key = self.key();
        let headers = [("X-API-Key", key.as_str()), ("Content-Type", kind)];
        self.send(
            "POST",
            &format!("/v1/capsules/{id}/{route}"),
            &headers,
            Some(body),
        )
        .unwrap_or_else(|| panic!("{route}: no answer; the daemon's log:\n{}", self.log()))
    }
}

/// The content type and the body of a form with the fields `path` and `file`.
#[must_use]
pub fn form(path: &str, contents: &[u8]) -> (String, Vec<u8>) {
    let mut body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n\
         --{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"upload\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(contents);
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    (form_type(), body)
}

/// The content type of [`form`]s.
#[must_use]
pub fn form_type() -> String {
    format!("multipart/form-data; boundary={BOUNDARY}")
}

/// Capsules.
impl World {
    /// A running capsule of the `minimal` template.
    ///
    /// # Panics
    /// When it does not get running.
    #[must_use]
    pub fn capsule(&self) -> String {
        self.capsule_with(&json!({ "memory_mb": 256 }))
    }

    /// A running capsule.
    ///
    /// # Panics
    /// When it does not get running.
    #[must_use]
    pub fn capsule_with(&self, request: &Value) -> String {
        let created = self.call("POST", "/v1/capsules", Some(request));
        assert!(
            matches!(created.status, 201 | 202),
            "{created:?}\n{}",
            self.log()
        );
        let id = created.json()["id"].as_str().expect("an id").to_owned();
        self.wait_status(&id, "running");
        id
    }

    /// A capsule whose VMM runs and whose guest does not answer yet.
    ///
    /// # Panics
    /// When it does not get that far, or is ready already.
    #[must_use]
    pub fn booting_capsule(&self) -> String {
        // The create is answered when the guest is ready, so it is sent and left alone.
        let body = json!({ "memory_mb": 256 }).to_string();
        let (key, length) = (self.key(), body.len());
        let address = self.url().replace("http://", "");
        let mut stream = TcpStream::connect(address).expect("the API listens");
        write!(
            stream,
            "POST /v1/capsules HTTP/1.1\r\nHost: test\r\nX-API-Key: {key}\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .expect("the API takes requests");
        let booting = wait_for(BOOT_TIMEOUT, || {
            let list = self.call("GET", "/v1/capsules", None).json();
            let new = list[0]["id"].as_str().unwrap_or_default().to_owned();
            let boots =
                list[0]["status"] == "starting" && !processes_naming(&new, is_vmm).is_empty();
            boots.then_some(new)
        });
        booting.expect("a guest that boots")
    }

    /// What the API says of a capsule.
    #[must_use]
    pub fn record(&self, id: &str) -> Value {
        self.about("GET", id, "", None).json()
    }

    /// Ids of the capsules that the API lists.
    #[must_use]
    pub fn listed(&self) -> Vec<String> {
        let list = self.call("GET", "/v1/capsules", None).json();
        let ids = list.as_array().into_iter().flatten();
        ids.filter_map(|capsule| capsule["id"].as_str().map(str::to_owned))
            .collect()
    }

    /// Waits until a capsule has a status, and returns what the API says then.
    ///
    /// # Panics
    /// When it gets another final one, or takes too long.
    pub fn wait_status(&self, id: &str, wanted: &str) -> Value {
        let seen = self.wait_settled(id, wanted);
        assert_eq!(seen["status"], wanted, "{seen}\n{}", self.log());
        seen
    }

    /// Waits until a capsule has ended, and returns what the API says then.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn wait_ended(&self, id: &str) -> Value {
        self.wait_settled(id, "stopped")
    }

    /// Waits until a capsule runs or has ended, and returns what the API says then.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn wait_decided(&self, id: &str) -> Value {
        self.wait_settled(id, "running")
    }

    /// Waits for a status or a final one.
    fn wait_settled(&self, id: &str, wanted: &str) -> Value {
        let seen = wait_for(BOOT_TIMEOUT, || {
            let seen = self.record(id);
            let status = seen["status"].as_str().unwrap_or_default();
            ([wanted, "stopped", "error"].contains(&status)).then_some(seen)
        });
        seen.unwrap_or_else(|| panic!("{} is not {wanted}\n{}", self.record(id), self.log()))
    }

    /// Runs a command in a capsule.
    #[must_use]
    pub fn run(&self, id: &str, request: &Value) -> Answer {
        self.about("POST", id, "/exec", Some(request))
    }

    /// Runs a shell line in a capsule.
    ///
    /// # Panics
    /// When it cannot be run; a line that fails is an answer.
    #[must_use]
    pub fn exec(&self, id: &str, line: &str) -> Value {
        let request = json!({ "cmd": "/bin/sh", "args": ["-c", line], "timeout_sec": 60 });
        let answer = self.run(id, &request);
        assert_eq!(answer.status, 200, "{line}: {}", answer.json());
        answer.json()
    }

    /// What a shell line prints in a capsule, without the last line break.
    ///
    /// # Panics
    /// When it fails.
    pub fn output(&self, id: &str, line: &str) -> String {
        let ran = self.exec(id, line);
        assert_eq!(ran["exit_code"], 0, "{line}: {ran}");
        ran["stdout"]
            .as_str()
            .unwrap_or_default()
            .trim_end()
            .to_owned()
    }

    /// Ends a capsule and waits until it has ended.
    ///
    /// # Panics
    /// When it cannot be ended.
    pub fn destroy(&self, id: &str) {
        let answer = self.about("DELETE", id, "", None);
        assert!(matches!(answer.status, 202 | 204), "{answer:?}");
        let _ended = self.wait_ended(id);
    }

    /// The one VMM that works for a capsule.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn vmm_pid(&self, id: &str) -> u32 {
        only(&processes_naming(id, is_vmm))
    }

    /// The one shim that works for a capsule.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn shim_pid(&self, id: &str) -> u32 {
        only(&processes_naming(id, is_shim))
    }
}

fn only(pids: &[u32]) -> u32 {
    assert_eq!(pids.len(), 1, "there is not one process: {pids:?}");
    pids[0]
}

/// Live processes with an id in their command line that is of the kind.
fn processes_naming(id: &str, kind: fn(&str) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let names_it = |pid: &u32| {
        let line = command_line(*pid);
        line.contains(id) && kind(&line)
    };
    pids.filter(names_it).collect()
}

/// The command line of a process, a NUL after each part; empty if it has ended.
#[must_use]
pub fn command_line(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).into_owned()
}

/// Whether this is the command line of a VMM: Cloud Hypervisor, QEMU, or what a test has put in
/// QEMU's place, which may be a script behind its interpreter.
#[must_use]
pub fn is_vmm(line: &str) -> bool {
    let is_qemu = |part: &str| {
        let name = part.rsplit('/').next().unwrap_or_default();
        name == "qemu" || name.starts_with("qemu-system")
    };
    line.starts_with(NAME_PREFIX) || line.split('\0').take(2).any(is_qemu)
}

fn is_shim(line: &str) -> bool {
    line.split('\0').take(2).any(|part| part.contains("shim"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_is_known_whichever_it_is_and_nothing_else_is() {
        for line in [
            "/usr/bin/qemu-system-x86_64\0-name\0/data/cl-1",
            "/bin/sh\0/tmp/world/qemu\0-name\0/data/cl-1",
            "cloud-hypervisor:/data/cl-1\0--api-socket\0fd=3",
        ] {
            assert!(is_vmm(line), "{line}");
        }
        for line in [
            "",
            "wrenn\0shim\0--dir\0/data/qemu/cl-1",
            "wrenn\0pager\0--dir\0/data/cl-1",
            "qemu-img\0create\0/data/cl-1",
            "/bin/cloud-hypervisor\0--version",
        ] {
            assert!(!is_vmm(line), "{line}");
        }
    }
}
