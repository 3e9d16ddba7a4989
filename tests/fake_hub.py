"""A server that answers as much of the Hub's API as pushing and loading a model takes, and remembers what it was sent."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = "someone"


class FakeHub:
    """Repositories by `(id, revision)`, each a dict of files by name.

    Args:
        token: the one token that may write.
        trouble: by what a path contains, how to answer the first requests to it: a status, or "drop" to hang up.
    """

    def __init__(self, token: str, trouble: dict[str, list[Any]] | None = None):
        self.token = token
        self.trouble = {name: list(answers) for name, answers in (trouble or {}).items()}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: dict[tuple[str, str], list[str]] = {}
        self.troubled: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, or make trouble."""
        body = _body(request)
        path = request.path.split("?")[0]
        for name, answers in self.trouble.items():
            if name in path and answers:
                answer = answers.pop(0)
                self.troubled.append(path)
                if answer == "drop":
                    request.close_connection = True
                    request.connection.close()
                    return
                _send(request, answer, {"error": "in trouble"})
                return
        for pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                writes = request.command in ("POST", "PUT") and "/lfs/" not in path and "validate-yaml" not in path
                if writes and request.headers.get("Authorization") != f"Bearer {self.token}":
                    _send(request, 401, {"error": "who are you?"})
                    return
                handler(self, request, body, *found.groups())
                return
        _send(request, 404, {"error": f"no such address: {path}"})

    def create(self, request, body) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        known = (repo, "main") in self.files
        self.files.setdefault((repo, "main"), {".gitattributes": b""})
        answer = {"url": f"{self.address}/{repo}", "id": repo, "name": repo}
        _send(request, 409 if known else 200, answer)

    def branch(self, request, body, repo, revision) -> None:
        known = (repo, revision) in self.files
        self.files.setdefault((repo, revision), dict(self.files[repo, "main"]))
        _send(request, 409 if known else 200, {})

    def validate(self, request, body) -> None:
        _send(request, 200, {"errors": [], "warnings": []})

    def who(self, request, body) -> None:
        _send(request, 200, {"name": USER, "type": "user", "orgs": []})

    def preupload(self, request, body, repo, revision) -> None:
        asked = json.loads(body)["files"]
        # Newer clients send large files to another service, in a format of its own: they are asked for them inline.
        large = "lfs" if "hf_hub/0." in request.headers.get("User-Agent", "") else "regular"
        files = [
            {
                "path": file["path"],
                "uploadMode": large if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked
        ]
        _send(request, 200, {"files": files, "commitOid": "0" * 40})

    def batch(self, request, body, repo) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.address}/lfs/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        _send(request, 200, {"transfer": "basic", "objects": objects})

    def store(self, request, body, oid) -> None:
        self.blobs[oid] = body
        _send(request, 200, {})

    def commit(self, request, body, repo, revision) -> None:
        files = self.files[repo, revision]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.setdefault((repo, revision), []).append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        oid = self.oid(repo, revision)
        answer = {"success": True, "commitUrl": f"{self.address}/{repo}/commit/{oid}", "commitOid": oid}
        _send(request, 200, {**answer, "hookOutput": "", "pullRequestUrl": None})

    def info(self, request, body, repo, revision="main") -> None:
        if (repo, revision) not in self.files:
            _send(request, 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.files[repo, revision]]
        answer = {"id": repo, "modelId": repo, "sha": self.oid(repo, revision), "siblings": siblings, "tags": []}
        _send(request, 200, {**answer, "private": False, "downloads": 0})

    def tree(self, request, body, repo, revision, folder="") -> None:
        files = self.files.get((repo, self.named(repo, revision)), {})
        inside = folder.strip("/") + "/" if folder.strip("/") else ""
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
            if name.startswith(inside)
        ]
        if entries:
            _send(request, 200, entries)
        else:
            _send(request, 404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})

    def resolve(self, request, body, repo, revision, name) -> None:
        files = self.files.get((repo, self.named(repo, revision)))
        if files is None or name not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            _send(request, 404, {"error": code}, {"X-Error-Code": code})
            return
        content = files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.oid(repo, self.named(repo, revision)),
        }
        _send(request, 200, content, headers)

    def oid(self, repo: str, revision: str) -> str:
        """Return the commit that a branch is at."""
        content = json.dumps(
            {name: hashlib.sha1(data).hexdigest() for name, data in self.files[repo, revision].items()}
        )
        return hashlib.sha1(content.encode()).hexdigest()

    def named(self, repo: str, revision: str) -> str:
        """Return the branch that a revision, a branch or a commit, stands for."""
        for known, branch in self.files:
            if known == repo and revision in (branch, self.oid(repo, branch)):
                return branch
        return revision


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"/api/repos/create", FakeHub.create),
    (r"/api/validate-yaml", FakeHub.validate),
    (r"/api/whoami-v2", FakeHub.who),
    (rf"/api/models/{_REPO}/branch/([\w.-]+)", FakeHub.branch),
    (rf"/api/models/{_REPO}/preupload/([\w.-]+)", FakeHub.preupload),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", FakeHub.batch),
    (r"/lfs/(\w+)", FakeHub.store),
    (rf"/api/models/{_REPO}/commit/([\w.-]+)", FakeHub.commit),
    (rf"/api/models/{_REPO}/revision/([\w.-]+)", FakeHub.info),
    (rf"/api/models/{_REPO}/tree/([\w.-]+)(/.*)?", FakeHub.tree),
    (rf"/api/models/{_REPO}", FakeHub.info),
    (rf"/{_REPO}/resolve/([\w.-]+)/(.+)", FakeHub.resolve),
]


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(request.rfile.readline().strip() or b"0", 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))


def _send(request: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    request.send_header(
        "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
    )
    request.send_header("Content-Length", str(len(data)))
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
