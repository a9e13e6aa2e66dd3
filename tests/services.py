"""Small HTTP services on 127.0.0.1 that answer as a test says, in a thread of their own."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Asked:
    """What a service has been asked: (path, headers, JSON body) of every request; `reply` may be put in another's place."""

    def __init__(self, reply):
        self.reply, self.requests, self.url = reply, [], ""

    def paths(self):
        return [path for path, _, _ in self.requests]


@contextmanager
def serving(reply):
    """reply(path, body, turn) -> JSON value, (status, JSON value or bytes, headers), or a function that is handed the handler."""
    asked = Asked(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.requests.append((self.path, dict(self.headers), json.loads(body) if body else None))
            answer = asked.reply(self.path, asked.requests[-1][2], len(asked.requests))
            if callable(answer):
                return answer(self)
            status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *told):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *told: None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    asked.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(server):
    """A server of ours, in a thread; -> its address."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
