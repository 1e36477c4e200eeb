"""A stand-in for a Jupyter server, run inside a capsule: one kernel, and just what the SDK's code runner hears.

Speaks HTTP/1.1 and WebSocket by itself, since a plain capsule has Python and nothing else.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import socketserver
import struct
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

_KERNEL = {"id": "kernel-1", "name": "wrenn"}
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_names, _kernels = {}, []


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.endswith("/channels"):
            self._channels()
        else:
            self._answer(200, _kernels)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        _kernels.append(_KERNEL)
        self._answer(201, _KERNEL)

    def _answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _channels(self):
        key = self.headers["Sec-WebSocket-Key"].encode()
        accepted = base64.b64encode(hashlib.sha1(key + _MAGIC).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accepted)
        self.end_headers()
        self.close_connection = True
        while (text := self._receive()) is not None:
            self._run(json.loads(text))

    def _receive(self):
        """The next text message; `None` at the end. The SDK's fit into one frame."""
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 0x0F == 8:
                return None
            length = head[1] & 0x7F
            if length == 126:
                (length,) = struct.unpack("!H", self.rfile.read(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", self.rfile.read(8))
            mask, data = self.rfile.read(4), self.rfile.read(length)
            data = bytes(it ^ mask[at % 4] for at, it in enumerate(data))
            if head[0] & 0x0F == 1:
                return data
            if head[0] & 0x0F == 9:
                self._frame(0x8A, data)

    def _frame(self, opcode, data):
        size = bytes([len(data)]) if len(data) < 126 else struct.pack("!BH", 126, len(data))
        self.wfile.write(bytes([opcode]) + size + data)

    def _tell(self, request, kind, content):
        header = {"msg_type": kind}
        told = {"header": header, "parent_header": request["header"], "content": content}
        self._frame(0x81, json.dumps(told).encode())

    def _run(self, request):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                value = _evaluate(request["content"]["code"])
        except Exception as err:
            lines = traceback.format_exc().splitlines()
            said = {"ename": type(err).__name__, "evalue": str(err), "traceback": lines[-2:]}
            self._tell(request, "error", said)
        else:
            if printed.getvalue():
                self._tell(request, "stream", {"name": "stdout", "text": printed.getvalue()})
            if value is not None:
                bundle = {"data": {"text/plain": repr(value)}, "execution_count": 1}
                self._tell(request, "execute_result", bundle)
        self._tell(request, "status", {"execution_state": "idle"})

    def log_message(self, *_):
        pass


def _evaluate(code):
    """Runs all of it; the value of its last line, where that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), _names)
    if last is not None:
        return eval(compile(ast.Expression(last.value), "cell", "eval"), _names)
    return None


_Server(("127.0.0.1", 8888), _Handler).serve_forever()
