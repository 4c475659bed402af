"""A small server that answers as the Hugging Face hub does, on this machine and from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories in memory: by name, by branch, the files of its last commit.

    Attributes:
        repositories: the files by name of the repository and of the branch.
        private: the private repositories; only `token` may see them.
        token: the token that may write.
        requests: the method, the path and the token of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.token = "hf_writer"
        self.requests: list[tuple[str, str, str | None]] = []
        self.address = ""

    def commit(self, name, branch):
        """The 40 digits that name the present state of a branch."""
        state = repr(sorted(self.repositories[name][branch].items()))
        return hashlib.sha1(state.encode()).hexdigest()

    def files(self, name, revision):
        """The files of a branch or commit, and the commit; None if there is none."""
        for branch in self.repositories.get(name, {}):
            commit = self.commit(name, branch)
            if revision in (branch, commit):
                return self.repositories[name][branch], commit
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._read()

    def do_HEAD(self):
        self._read()

    def do_POST(self):
        token, parts = self._note()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if parts == ["api", "validate-yaml"]:
            return self._json({"warnings": [], "errors": []})
        if token != self.hub.token:
            return self._json({"error": "Invalid username or password."}, 401)
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                told = {"error": "You already created it", "url": f"{self.hub.address}/{name}"}
                return self._json(told, 409)
            self.hub.repositories[name] = {"main": {}}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self._json({"url": f"{self.hub.address}/{name}"})
        name, verb, branch = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        branches = self.hub.repositories[name]
        if verb == "branch":
            if branch in branches:
                return self._json({"error": "Reference already exists"}, 409)
            branches[branch] = dict(branches["main"])
            return self._json({})
        if verb == "preupload":
            asked = json.loads(body)["files"]
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return self._json({"files": files})
        assert verb == "commit"
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                branches[branch][value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit(name, branch)
        return self._json(
            {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit}
        )

    def _read(self):
        token, parts = self._note()
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        hidden = name in self.hub.private and token != self.hub.token
        if name not in self.hub.repositories or hidden:
            return self._json({"error": "Repository not found"}, 401, "RepoNotFound")
        rest = parts[4:] if api else parts[2:]
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        found = self.hub.files(name, revision)
        if found is None:
            return self._json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
        files, commit = found
        if rest[:1] == ["resolve"]:
            return self._file(files.get("/".join(rest[2:])), commit)
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()]  # fmt: skip
            return self._json(tree)
        siblings = [{"rfilename": path} for path in files]
        return self._json(
            {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        )

    def _note(self):
        path = urlsplit(self.path).path
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, token))
        return token, path.strip("/").split("/")

    def _file(self, data, commit):
        if data is None:
            return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return self._send(200, data, headers)

    def _json(self, value, status=200, code=None):
        headers = {"Content-Type": "application/json"}
        if code is not None:
            headers["X-Error-Code"] = code
        return self._send(status, json.dumps(value).encode(), headers)

    def _send(self, status, data, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def fake_hub(monkeypatch, cache):
    """Serve a `FakeHub` on this machine, and let huggingface_hub ask it instead of the real one.

    Args:
        monkeypatch: pytest's.
        cache: the folder for what is downloaded.
    """
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as of_transformers

    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.address)  # these two keep the address of before
    monkeypatch.setattr(of_transformers, "_hf_api", None, raising=False)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
