"""A server that speaks as much of the Hugging Face hub's API as uploading and downloading a small repository takes."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of repositories in memory: {"USER/NAME": {path: bytes}}."""

    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        data = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path.startswith("/api/repos/create"):
            request = json.loads(data)
            name = "/".join(filter(None, (request.get("organization") or "me", request["name"])))
            self.repositories.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        elif "preupload" in parts:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(data)["files"]
            ]
            self.answer({"files": files})
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self.answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer({"errors": [], "warnings": []})  # validate-yaml

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            self.answer([{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()])
        elif parts[0] == "api":
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
        elif (path := "/".join(parts[4:])) in files:
            self.answer(body=files[path], ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"')
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def hub_server() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """(address, repositories) of a hub of one's own."""
    kind = type("OwnHub", (Hub,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind.repositories
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
