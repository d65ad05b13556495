"""Serves a local search page by Python's own HTTP server: a form, and hits as pictures."""

from __future__ import annotations

import errno
import logging
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from eval.report.gallery import strip
from eval.report.page import templates
from runtime.errors import AccessError

if TYPE_CHECKING:
    from eval.search.visual_search import VisualSearch

log = logging.getLogger(__name__)

LONGEST_QUERY = 1000  # characters
PICTURE = re.compile(r"/picture/(\d{1,12})\.jpg")
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'"


class SearchServer(ThreadingHTTPServer):
    """Binds its address at once, so that a used port is reported before a corpus is encoded; answers by `search`.

    Raises:
        AccessError: the address cannot be listened on; port 0 takes a free one.
    """

    def __init__(self, host: str, port: int, count: int, candidates: int) -> None:
        self.search: VisualSearch | None = None
        self.host, self.count, self.candidates = host, count, candidates
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise AccessError(_refused(host, port, error)) from None

    def serve_until_interrupted(self) -> None:
        """Serve the page until Ctrl-C."""
        sys.stdout.write(f"search page: http://{self.host}:{self.server_port}/   (Ctrl-C to stop)\n")
        sys.stdout.flush()
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            sys.stdout.write("\n")


def _refused(host: str, port: int, error: OSError | OverflowError) -> str:
    """The error of an address that cannot be listened on, with the remedy."""
    if isinstance(error, OverflowError):
        return f"--port {port}: a port is a number from 1 to 65535, or 0 for any free one"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use by another program: choose another --port, 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} needs an administrator's rights: give one from 1024 on with --port"
    return f"--host {host} is not an address of this machine ({error.strerror}): 127.0.0.1 is local only, 0.0.0.0 all"


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page, with ?q=TEXT its hits; GET /picture/N.jpg a visual's frames."""

    server: SearchServer

    def do_GET(self) -> None:
        """Answer a request."""
        url = urlsplit(self.path)
        picture = PICTURE.fullmatch(url.path)
        if url.path == "/":
            query = parse_qs(url.query).get("q", [""])[0].strip()[:LONGEST_QUERY]
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self._page(query).encode())
        elif picture:
            self._picture(int(picture[1]))
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"no such page; the search is at /\n")

    def _search(self) -> VisualSearch:
        assert self.server.search is not None, "served before the corpus was encoded"
        return self.server.search

    def _page(self, query: str) -> str:
        search = self._search()
        hits, problem = [], ""
        if query:
            try:
                hits = search.find(query, self.server.count, self.server.candidates)
            except ValueError as error:
                problem = str(error)
        shown: dict[str, Any] = {
            "query": query,
            "hits": hits,
            "problem": problem,
            "media_type": search.dataset.media_type,
            "corpus": search.dataset.name,
            "num_visuals": int(search.visuals.present.sum()),
            "num_missing": int((~search.visuals.present).sum()),
        }
        return templates().get_template("search.html.j2").render(**shown)

    def _picture(self, visual: int) -> None:
        search = self._search()
        try:
            if visual >= search.dataset.num_visuals:
                raise OSError(f"there is no visual {visual}")
            if not (frames := search.frames(visual)):
                raise AccessError(f"{search.dataset.sources[visual]} cannot be read")
            content = strip(frames)
        except OSError as error:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", f"{error}\n".encode())
            return
        self._send(HTTPStatus.OK, "image/jpeg", content)

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests instead of writing them to stderr."""
        log.debug(format, *args)
