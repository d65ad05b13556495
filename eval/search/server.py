"""Serves a local search page by Python's own HTTP server: a form, and hits with their pictures."""

from __future__ import annotations

import logging
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from eval.report.gallery import data_url, strip
from eval.report.page import render
from eval.search.visual_search import VisualSearch
from runtime.errors import AccessError

log = logging.getLogger(__name__)

LONGEST_QUERY = 1000  # characters
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'"


class SearchServer(ThreadingHTTPServer):
    """Binds its address at once, so that a used port is reported before a corpus is encoded; answers by `search`.

    Raises:
        AccessError: the address cannot be listened on; port 0 takes a free one.
    """

    def __init__(self, host: str, port: int, count: int, candidates: int | None) -> None:
        self.search: VisualSearch | None = None
        self.host, self.count, self.candidates = host, count, candidates
        self.one_query = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise AccessError(
                f"cannot listen on --host {host} --port {port} ({error}): choose another one; port 0 is any free one, "
                "host 127.0.0.1 this machine only, 0.0.0.0 all its networks"
            ) from None

    def serve_until_interrupted(self) -> None:
        """Serve the page until Ctrl-C."""
        sys.stdout.write(f"search page: http://{self.host}:{self.server_port}/   (Ctrl-C to stop)\n")
        sys.stdout.flush()
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            sys.stdout.write("\n")

    def page(self, query: str) -> str:
        """The page with the hits of a query, or with the form alone."""
        search, hits, problem = self.search, [], ""
        assert search is not None, "served before the corpus was encoded"
        with self.one_query:
            try:
                hits = search.find(query, self.count, self.candidates) if query else []
            except ValueError as error:
                problem = str(error)
            pictures = [strip(search.frames(hit.visual)) for hit in hits]
        return render(
            "search.html.j2",
            query=query,
            hits=[(hit, picture and data_url(picture)) for hit, picture in zip(hits, pictures)],
            problem=problem,
            frames=search.frames_shown,
            corpus=search.dataset.name,
            media_type=search.dataset.media_type,
            num_visuals=int(search.visuals.present.sum()),
            num_missing=int((~search.visuals.present).sum()),
        )


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page, with ?q=TEXT its hits."""

    server: SearchServer

    def do_GET(self) -> None:
        """Answer a request."""
        url = urlsplit(self.path)
        if url.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND, "no such page; the search is at /")
            return
        content = self.server.page(parse_qs(url.query).get("q", [""])[0].strip()[:LONGEST_QUERY]).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests instead of writing them to stderr."""
        log.debug(format, *args)
