//! HTTP/1.1 over one kept-alive connection, and as little of it as can be.
//!
//! Both sides of a comparison are called through this, so that the difference between them is not
//! the client's. It takes bodies with a length and chunked ones, which is all that servers of
//! ours send.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest silence of a server: an emulated guest that boots on a busy machine.
const SILENCE: Duration = Duration::from_secs(120);
/// Most header lines of an answer.
const MAX_HEADERS: usize = 100;

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    authority: String,
    /// Sent with every request.
    headers: Vec<(&'static str, String)>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The HTTP status.
    pub(crate) status: u16,
    /// The body without its chunks.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// This answer, if it has that status.
    ///
    /// # Errors
    /// It has another one; the body says why.
    pub(crate) fn expect(self, status: u16) -> io::Result<Self> {
        if self.status == status {
            return Ok(self);
        }
        let said = String::from_utf8_lossy(&self.body).into_owned();
        let found = self.status;
        Err(bad(&format!("status {found} in place of {status}: {said}")))
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn json(&self) -> io::Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

impl Connection {
    /// Connects; `headers` go with every request.
    ///
    /// # Errors
    /// Nobody listens.
    pub(crate) fn open(
        address: SocketAddr,
        headers: Vec<(&'static str, String)>,
    ) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self {
            stream: BufReader::new(stream),
            authority: address.to_string(),
            headers,
        })
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// The connection broke, or the answer is not HTTP.
    pub(crate) fn call(&mut self, method: &str, path: &str, body: &[u8]) -> io::Result<Answer> {
        self.send(method, path, body)?;
        self.receive()
    }

    /// Sends a request and does not read its answer.
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) fn send(&mut self, method: &str, path: &str, body: &[u8]) -> io::Result<()> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.authority);
        for (name, value) in &self.headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        let mut request = request.into_bytes();
        request.extend_from_slice(body);
        self.stream.get_mut().write_all(&request)
    }

    fn receive(&mut self) -> io::Result<Answer> {
        let status_line = self.line()?;
        let status = status_line.split(' ').nth(1).and_then(|it| it.parse().ok());
        let status = status.ok_or_else(|| bad(&status_line))?;
        let mut length = 0;
        let mut chunked = false;
        for _ in 0..MAX_HEADERS {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                let body = if chunked {
                    self.chunks()?
                } else {
                    self.exactly(length)?
                };
                return Ok(Answer { status, body });
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(|_| bad(&line))?;
            }
            chunked |= line.starts_with("transfer-encoding:") && line.ends_with("chunked");
        }
        Err(bad("too many headers"))
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let size = self.line()?;
            let size = usize::from_str_radix(&size, 16).map_err(|_| bad(&size))?;
            body.extend(self.exactly(size)?);
            // The line break after a chunk; after the last, empty one it ends the answer.
            if !self.line()?.is_empty() {
                return Err(bad("a chunk is longer than it says, or has a trailer"));
            }
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn exactly(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A connection to a server that sends `answer` to every request, whatever it is.
    fn server_of(answer: &'static str) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            while stream.read(&mut request).unwrap() > 0 {
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        Connection::open(address, vec![("x-key", "k".into())]).unwrap()
    }

    #[test]
    fn one_connection_carries_several_calls() {
        let mut connection = server_of("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
        for _call in 0..3 {
            let answer = connection.call("GET", "/", b"").unwrap();
            assert_eq!((answer.status, answer.body), (200, b"hi".to_vec()));
        }
    }

    #[test]
    fn chunks_are_put_together() {
        let mut connection = server_of(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\na\r\n0123456789\r\n0\r\n\r\n",
        );
        for _call in 0..2 {
            let answer = connection.call("POST", "/", b"x").unwrap();
            assert_eq!(answer.body, b"hi0123456789");
        }
    }

    #[test]
    fn another_status_is_an_error_that_says_why() {
        let mut connection = server_of("HTTP/1.1 409 Conflict\r\nContent-Length: 4\r\n\r\nbusy");
        let refused = connection.call("GET", "/", b"").unwrap().expect(200);
        assert!(refused.unwrap_err().to_string().ends_with("busy"));
    }

    #[test]
    fn what_is_not_http_is_refused() {
        let mut connection = server_of("SSH-2.0-x\r\n");
        assert!(connection.call("GET", "/", b"").is_err());
    }
}
