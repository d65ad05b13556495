"""A local web page to search with: one form, its hits as pictures; nothing but Python's own server."""

from __future__ import annotations

import logging
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from eval.report import templates

if TYPE_CHECKING:
    from eval.search import VisualSearch

log = logging.getLogger(__name__)

LONGEST_QUERY = 1000  # characters
PICTURE = re.compile(r"/picture/(\d{1,12})\.jpg")
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'"


def make_server(search: VisualSearch, host: str, port: int, count: int, candidates: int) -> ThreadingHTTPServer:
    """A server that is bound and not running yet; port 0 takes a free one. Raises OSError when it is taken."""

    class Handler(_Handler):
        """Requests to this search."""

        settings = (search, count, candidates)

    return ThreadingHTTPServer((host, port), Handler)


def serve(search: VisualSearch, host: str, port: int, count: int, candidates: int) -> None:
    """Serve the page until Ctrl-C."""
    with make_server(search, host, port, count, candidates) as server:
        sys.stdout.write(f"search page: http://{host}:{server.server_port}/   (Ctrl-C ends it)\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.stdout.write("\n")


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page, with ?q=TEXT its hits; GET /picture/N.jpg a visual's frames."""

    settings: tuple[VisualSearch, int, int]

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

    def _page(self, query: str) -> str:
        search, count, candidates = self.settings
        hits, problem = [], ""
        if query:
            try:
                hits = search.find(query, count, candidates)
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
        search = self.settings[0]
        try:
            if visual >= search.dataset.num_visuals:
                raise OSError(f"there is no visual {visual}")
            content, _ = search.picture(visual)
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
        """Requests go to the log, not to the console."""
        log.debug(format, *args)
