"""Web servers for tests: a handler without logging, and servers that run in threads until the end of a block."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from needs import module


class Handler(BaseHTTPRequestHandler):
    """Keeps connections and logs nothing."""

    protocol_version = "HTTP/1.1"

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a complete answer; headers may contain any characters."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value.encode("utf-8").decode("latin-1"))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serving(handler: Any, **state: Any) -> Iterator[Any]:
    """A server with the attributes `state`; its handlers reach it as `self.server`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        for name, value in state.items():
            setattr(server, name, value)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def encrypt(server: ThreadingHTTPServer) -> Any:
    """Make a server use TLS as localhost; returns the authority that signed its certificate."""
    authority = module("trustme", "trustme").CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return authority
