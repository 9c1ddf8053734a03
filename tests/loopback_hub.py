"""A model hub in this process, at 127.0.0.1: just enough of its HTTP interface to push a folder and load it by name."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class LoopbackHub(ThreadingHTTPServer):
    """Holds what was pushed: `files[repository][path]`, bytes; `commits`, their messages."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            self.server.files.setdefault(name, {})
            return self._answer({"url": f"{self.server.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/main", path):
            name, what = found.groups()
            if what == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self._answer({"files": files})
            for line in body.decode("utf-8").splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.commits.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[name][entry["value"]["path"]] = content
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            return self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._missing()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "someone", "orgs": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            if (files := self.server.files.get(found[1])) is None:
                return self._missing()
            return self._answer({"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            content = self.server.files.get(found[1], {}).get(found[2])
            return self._missing() if content is None else self._send(200, content)
        return self._missing()

    do_HEAD = do_GET

    def _answer(self, content: dict):
        self._send(200, json.dumps(content).encode("utf-8"), "application/json")

    def _missing(self):
        self._send(404, b"", error="EntryNotFound")

    def _send(self, code: int, content: bytes, kind: str = "application/octet-stream", error: str | None = None):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def loopback_hub():
    hub = LoopbackHub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
