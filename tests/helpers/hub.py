"""A Hub on the loopback interface: it keeps what it is sent in memory, and gives it back. Enough of the protocol for
`huggingface_hub` to create repositories, commit files to them and download them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """`repositories` is name -> file -> content. With `fails_at` set, commits end with that HTTP status."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.fails_at: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, folder: Path) -> dict[str, str]:
        """What makes a process use this Hub, with a cache of its own."""
        home = str(folder / "home")
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HOME": home}

    def revision(self, name: str) -> str:
        return hashlib.sha1(f"{name} {self.commits[name]}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str, text: str, **headers: str) -> None:
        self.answer({"error": text}, 404, X_Error_Code=code, X_Error_Message=text, **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request.get('organization') or 'somebody'}/{request['name']}"
            existed = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self.server.commits.setdefault(name, 0)
            url = f"{self.server.endpoint}/{name}"
            return self.answer({"url": url, "name": name, "id": name}, 409 if existed else 200)
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name, action = "/".join(parts[2:4]), parts[4]
        if name not in self.server.repositories:
            return self.missing("RepoNotFound", "Repository Not Found")
        if action == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit", self.path
        if self.server.fails_at is not None:
            return self.answer({"error": "the disk of the Hub is full"}, self.server.fails_at)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[name][entry["value"]["path"]] = content
            if entry["key"] == "deletedFile":
                del self.server.repositories[name][entry["value"]["path"]]
        self.server.commits[name] += 1
        revision = self.server.revision(name)
        url = f"{self.server.endpoint}/{name}/commit/{revision}"
        return self.answer(
            {"success": True, "commitOid": revision, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        )

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            return self.answer({"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.missing("RepoNotFound", "Repository Not Found")
        if is_api and len(parts) > 4 and parts[4] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self.answer(entries)
        if is_api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer(
                {"id": name, "modelId": name, "sha": self.server.revision(name), "siblings": siblings, "tags": []}
            )
        path = "/".join(parts[4:])
        assert parts[2] == "resolve", self.path
        if parts[3] not in ("main", self.server.revision(name)):
            return self.missing("RevisionNotFound", f"Invalid rev id: {parts[3]}")
        if path not in files:
            return self.missing("EntryNotFound", "Entry not found", X_Repo_Commit=self.server.revision(name))
        content = files[path]
        tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": self.server.revision(name)}
        return self.answer(content, Content_Type="application/octet-stream", Accept_Ranges="bytes", **tags)

    do_HEAD = do_GET


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the end of the block."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
