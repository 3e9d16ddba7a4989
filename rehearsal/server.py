"""
A Hub on this machine, for `HF_ENDPOINT`: what `huggingface_hub` and `datasets` ask of the real one, answered from a folder.

    python -m rehearsal.server FOLDER            # prints the address, and serves until it is ended

The folder holds `models/<owner>/<name>/...` and `datasets/<owner>/<name>/...`. What is pushed stays in memory. Large files
are redirected to an address of their own, as the real Hub does it, and can be asked for by ranges. Left out is Xet, the
newer transfer: `HF_HUB_DISABLE_XET=1` makes the clients use plain HTTP.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

USER = "rehearsal"
TOKEN = "hf_rehearsal"  # of the one account there is; without it everything is read-only
_LARGE = (".parquet", ".safetensors", ".zip", ".bin")
_DATE = "2026-01-01T00:00:00.000Z"
_LONGEST_FAULT = 1 << 12  # bytes sent before a connection is cut


class Repo:
    """One repository: its branches, each a dict of files by name.

    Args:
        id: `owner/name`.
        kind: `"models"` or `"datasets"`.
        files: of the branch `main`.
    """

    def __init__(self, id: str, kind: str, files: Mapping[str, Path | bytes]):
        self.id, self.kind = id, kind
        self.branches: dict[str, dict[str, Path | bytes]] = {"main": dict(files)}

    def commit(self, branch: str) -> str:
        """Return the commit that a branch is at: the hash of its files' names and contents."""
        named = [(name, _digest(content)) for name, content in sorted(self.branches[branch].items())]
        return hashlib.sha1(json.dumps([self.id, named]).encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        """Return the branch that a revision, a branch or a commit, stands for; None where there is none."""
        for branch in self.branches:
            if revision in (branch, f"refs/heads/{branch}", self.commit(branch)):
                return branch
        return None


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(_bytes(content)).hexdigest()


def _bytes(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def repos_of(folder: Path) -> dict[tuple[str, str], Repo]:
    """Return the repositories that a folder holds, by kind and id."""
    found = {}
    for kind in ("models", "datasets"):
        for path in sorted(folder.glob(f"{kind}/*/*")):
            files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
            id = path.relative_to(folder / kind).as_posix()
            found[kind, id] = Repo(id, kind, files)
    return found


class RehearsalHub:
    """The server; it listens once it is made.

    Args:
        folder: the repositories.
        gated: ids whose files are given to nobody but those with access, which nobody has.
        cut: what a path contains, for downloads that break off in the middle, each time.
        port: 0 takes a free one.
    """

    def __init__(self, folder: Path, *, gated: Iterable[str] = (), cut: Iterable[str] = (), port: int = 0):
        self.repos = repos_of(folder)
        self.gated, self.cut = set(gated), tuple(cut)
        self.blobs: dict[str, Path | bytes] = {}
        self.asked: list[str] = []  # every request, as "GET /path"
        self.unknown: list[str] = []  # those that no route answers
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                hub.answer(Request(self))

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as clients expect it
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reload(self, folder: Path) -> None:
        """Take up what a folder holds by now."""
        self.repos |= repos_of(folder)

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: "Request") -> None:
        """Answer one request by the first route that fits it."""
        self.asked.append(f"{request.method} {request.path}")
        for pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found is None:
                continue
            named = found.groupdict()
            if "repo" in named and self._refused(request, named):
                return
            route(self, request, **named)
            return
        self.unknown.append(f"{request.method} {request.path}")
        request.send(404, {"error": f"no such address: {request.path}"})

    def _refused(self, request: "Request", named: dict[str, str]) -> bool:
        """Answer for a repository that is not there, or that this caller may not have."""
        kind = (named.get("kind") or "models").rstrip("/")
        named["kind"] = kind
        if (kind, named["repo"]) not in self.repos:
            request.fail(404, "RepoNotFound", "Repository not found")
            return True
        if request.writes and request.token != TOKEN:
            request.fail(401, "", "Invalid username or password.")
            return True
        # What a gated repository is called and holds is known to all; its files are not.
        if named["repo"] in self.gated and "/resolve/" in request.path:
            what = f"{kind.removesuffix('s')} {named['repo']}"
            if request.token is None:
                advice = "You must have access to it and be authenticated to access it. Please log in."
            else:
                advice = f"You are not in the authorized list. Visit {self.address}/{named['repo']} to ask for access."
            status = 401 if request.token is None else 403
            request.fail(status, "GatedRepo", f"Access to {what} is restricted. {advice}")
            return True
        return False

    def _files(self, request: "Request", kind: str, repo: str, revision: str) -> dict[str, Path | bytes] | None:
        """Return the files of a revision; answers where there is none."""
        found = self.repos[kind, repo]
        branch = found.branch(unquote(revision))
        if branch is None:
            request.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found.branches[branch]

    # Reading.

    def info(self, request: "Request", kind: str, repo: str, revision: str = "main") -> None:
        """What there is to know of a repository."""
        files = self._files(request, kind, repo, revision)
        if files is None:
            return
        found = self.repos[kind, repo]
        told = {
            "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
            "id": repo,
            "author": repo.split("/")[0],
            "sha": found.commit(found.branch(unquote(revision)) or "main"),
            "private": False,
            "gated": "auto" if repo in self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": _DATE,
            "createdAt": _DATE,
            "siblings": [{"rfilename": name} for name in files],
        }
        if kind == "models":
            told["modelId"] = repo
        request.send(200, told)

    def tree(self, request: "Request", kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        """The entries of a folder, or, with `recursive`, all that lies below it."""
        files = self._files(request, kind, repo, revision)
        if files is None:
            return
        inside = unquote(folder or "").strip("/")
        prefix = f"{inside}/" if inside else ""
        recursive = request.query.get("recursive", ["false"])[0].casefold() in ("true", "1")
        entries: dict[str, dict] = {}
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = prefix + "/".join(parts[:depth])
                entries[path] = _folder(path)
            if recursive or len(parts) == 1:
                entries[name] = _file(name, content)
        if not entries:
            request.fail(404, "EntryNotFound", f"{inside} does not exist on {revision}")
            return
        request.send(200, list(entries.values()))

    def paths_info(self, request: "Request", kind: str, repo: str, revision: str) -> None:
        """The entries of some paths; those that are not there are left out."""
        files = self._files(request, kind, repo, revision)
        if files is None:
            return
        entries = []
        for path in request.form("paths"):
            if path in files:
                entries.append(_file(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder(path))
        request.send(200, entries)

    def refs(self, request: "Request", kind: str, repo: str) -> None:
        """The branches of a repository."""
        found = self.repos[kind, repo]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": found.commit(name)} for name in found.branches
        ]
        request.send(200, {"branches": branches, "tags": [], "converts": []})

    def resolve(self, request: "Request", kind: str, repo: str, revision: str, name: str) -> None:
        """A file: itself where it is small, the address of its contents where it is large."""
        files = self._files(request, kind, repo, revision)
        if files is None:
            return
        found, name = self.repos[kind, repo], unquote(name)
        commit = found.commit(found.branch(unquote(revision)) or "main")
        if name not in files:
            request.fail(404, "EntryNotFound", f"Entry not found: {name}", {"X-Repo-Commit": commit})
            return
        content, digest = files[name], _digest(files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if name.endswith(_LARGE):
            self.blobs[digest] = content
            size = str(len(_bytes(content)))
            headers |= {"X-Linked-Size": size, "X-Linked-ETag": f'"{digest}"'}
            headers["Location"] = f"{self.storage}/blobs/{digest}/{quote(name)}"
            request.send(302, b"", headers)
            return
        request.send(200, _bytes(content), headers)

    def blob(self, request: "Request", digest: str, name: str) -> None:
        """The contents of a large file, whole or a range of them."""
        if digest not in self.blobs:
            request.send(403, {"error": "the address has expired"})
            return
        content = _bytes(self.blobs[digest])
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if request.method == "GET" and any(part in unquote(name) for part in self.cut):
            request.cut_off(content, headers)
            return
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            request.send(200, content, headers)
            return
        size = len(content)
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last or 0))
        end = min(int(last), size - 1) if first and last else size - 1
        if start >= size:
            request.send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
            return
        request.send(206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"})

    # Writing.

    def who(self, request: "Request") -> None:
        """Whose token it is."""
        if request.token != TOKEN:
            request.fail(401, "", "Invalid credentials in Authorization header")
            return
        request.send(200, {"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def not_offered(self, request: "Request") -> None:
        """Answer for what the library asks in passing and does without."""
        request.send(404, {"error": "not offered here"})

    def create(self, request: "Request") -> None:
        """Make a repository."""
        asked = json.loads(request.body)
        owner = asked.get("organization") or USER
        if request.token != TOKEN:
            request.fail(401, "", "Invalid username or password.")
            return
        if owner != USER:
            request.fail(403, "", f"You don't have the rights to create a {asked.get('type')} under {owner}")
            return
        id, kind = f"{owner}/{asked['name']}", f"{asked.get('type') or 'model'}s"
        known = (kind, id) in self.repos
        if not known:
            self.repos[kind, id] = Repo(id, kind, {".gitattributes": b""})
        prefix = "" if kind == "models" else f"{kind}/"
        request.send(409 if known else 200, {"url": f"{self.address}/{prefix}{id}", "id": id, "name": id})

    def make_branch(self, request: "Request", kind: str, repo: str, revision: str) -> None:
        """Make a branch of `main`."""
        branches = self.repos[kind, repo].branches
        known = unquote(revision) in branches
        branches.setdefault(unquote(revision), dict(branches["main"]))
        request.send(409 if known else 200, {})

    def validate(self, request: "Request") -> None:
        """Check a card's metadata."""
        request.send(200, {"errors": [], "warnings": []})

    def preupload(self, request: "Request", kind: str, repo: str, revision: str) -> None:
        """Say which files are sent within the commit, and which before it."""
        files = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        found = self.repos[kind, repo]
        branch = found.branch(unquote(revision)) or "main"
        request.send(200, {"files": files, "commitOid": found.commit(branch)})

    def batch(self, request: "Request", kind: str, repo: str) -> None:
        """Say where large files are sent, and where it is to be told that they were."""
        objects = []
        for each in json.loads(request.body)["objects"]:
            upload = {"href": f"{self.address}/uploads/{each['oid']}", "header": {}}
            verify = {"href": f"{self.address}/verify/{each['oid']}", "header": {}}
            objects.append({**each, "actions": {"upload": upload, "verify": verify}})
        request.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, request: "Request", oid: str) -> None:
        """Take a large file."""
        if hashlib.sha256(request.body).hexdigest() != oid:
            request.send(400, {"error": "the contents have another hash"})
            return
        self.blobs[oid] = request.body
        request.send(200, {})

    def verify(self, request: "Request", oid: str) -> None:
        """Say whether a large file has come."""
        request.send(200 if oid in self.blobs else 404, {})

    def commit(self, request: "Request", kind: str, repo: str, revision: str) -> None:
        """Change the files of a branch."""
        files = self._files(request, kind, repo, revision)
        if files is None:
            return
        for line in request.body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif change["key"] == "deletedFile":
                files.pop(value["path"], None)
        found = self.repos[kind, repo]
        oid = found.commit(found.branch(unquote(revision)) or "main")
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.address}/{prefix}{repo}/commit/{oid}"
        request.send(200, {"success": True, "commitUrl": url, "commitOid": oid, "pullRequestUrl": None})


def _folder(path: str) -> dict:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _file(path: str, content: Path | bytes) -> dict:
    data = _bytes(content)
    entry: dict[str, Any] = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _digest(data), "size": len(data), "pointerSize": 134}
    return entry


class Request:
    """One request, its body read, and how it is answered."""

    def __init__(self, handler: BaseHTTPRequestHandler):
        self._handler = handler
        parts = urlsplit(handler.path)
        self.method, self.path, self.query = handler.command, parts.path, parse_qs(parts.query)
        self.headers = handler.headers
        given = handler.headers.get("Authorization")
        self.token = given.removeprefix("Bearer ") if given else None
        self.writes = self.method in ("POST", "PUT") and not self.path.partition("/paths-info/")[1]
        self.body = self._read()

    def _read(self) -> bytes:
        stream = self._handler.rfile
        if self.headers.get("Transfer-Encoding") != "chunked":
            return stream.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(stream.readline().strip() or b"0", 16):
            pieces.append(stream.read(size))
            stream.readline()
        stream.readline()
        return b"".join(pieces)

    def form(self, name: str) -> list[str]:
        """Return the values of a field of the body, JSON or a form."""
        if "json" in self.headers.get("Content-Type", ""):
            return list(json.loads(self.body)[name])
        return parse_qs(self.body.decode())[name]

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer with bytes, or with anything else as JSON."""
        raw = isinstance(content, bytes)
        data = content if raw else json.dumps(content).encode()
        self._begin(status, len(data), "application/octet-stream" if raw else "application/json", headers or {})
        if self.method != "HEAD":
            self._handler.wfile.write(data)

    def fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer with an error, in the Hub's two headers and in the body."""
        told = {"X-Error-Message": message, **(headers or {})}
        if code:
            told["X-Error-Code"] = code
        self.send(status, {"error": message}, told)

    def cut_off(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Begin to send, and hang up in the middle."""
        self._begin(200, len(content), "application/octet-stream", headers)
        self._handler.wfile.write(content[: min(len(content) // 2, _LONGEST_FAULT)])
        self._handler.wfile.flush()
        self._handler.close_connection = True
        self._handler.connection.close()

    def _begin(self, status: int, length: int, kind: str, headers: Mapping[str, str]) -> None:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"/api/repos/create", RehearsalHub.create),
    (r"/api/validate-yaml", RehearsalHub.validate),
    (r"/api/whoami-v2", RehearsalHub.who),
    (r"/api/agent-harnesses", RehearsalHub.not_offered),
    (rf"{_API}/branch/{_REVISION}", RehearsalHub.make_branch),
    (rf"{_API}/preupload/{_REVISION}", RehearsalHub.preupload),
    (rf"{_API}/commit/{_REVISION}", RehearsalHub.commit),
    (rf"{_API}/revision/{_REVISION}", RehearsalHub.info),
    (rf"{_API}/tree/{_REVISION}(?P<folder>/.*)?", RehearsalHub.tree),
    (rf"{_API}/paths-info/{_REVISION}", RehearsalHub.paths_info),
    (rf"{_API}/refs", RehearsalHub.refs),
    (_API, RehearsalHub.info),
    (rf"{_PAGE}\.git/info/lfs/objects/batch", RehearsalHub.batch),
    (rf"{_PAGE}/resolve/{_REVISION}/(?P<name>.+)", RehearsalHub.resolve),
    (r"/blobs/(?P<digest>\w+)/(?P<name>.+)", RehearsalHub.blob),
    (r"/uploads/(?P<oid>\w+)", RehearsalHub.upload),
    (r"/verify/(?P<oid>\w+)", RehearsalHub.verify),
]


def main() -> None:
    """Serve a folder until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `python -m rehearsal.contents` has made")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--gated", nargs="*", default=[], metavar="ID", help="ids that nobody has access to")
    parser.add_argument("--cut", nargs="*", default=[], metavar="PART", help="downloads that break off")
    options = parser.parse_args()
    hub = RehearsalHub(options.folder, gated=options.gated, cut=options.cut, port=options.port)
    sys.stdout.write(f"{hub.address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
