"""A model hub on localhost, as much of it as huggingface_hub needs to download a snapshot.

with Hub() as hub:
    hub.add("owner/name", {"config.json": b"..."}, revision="main")
    run(..., env=hub.environment(cache))
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves what was added; `requests` lists (method, path) of what was asked."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[tuple[str, str], str] = {}
        """(repository, revision) -> commit; a commit is a revision of itself."""
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.hang = threading.Event()
        """While set, requests are accepted and never answered."""
        self.cut_after: int | None = None
        """Bytes of a file after which the connection is closed."""
        self._stop = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commit these files as what `revision` names from now on; the commit's hash."""
        digest = hashlib.sha1(repo.encode() + revision.encode())
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.revisions[repo, revision] = self.revisions[repo, commit] = commit
        return commit

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Environment of a process that uses this hub and a cache of its own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**kept, **no_proxy, "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}

    def downloads(self) -> list[str]:
        """Names of the files that were fetched since the last call."""
        names = [path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path]
        self.requests.clear()
        return sorted(names)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            while hub.hang.is_set():
                if hub._stop.wait(0.05):
                    return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo, rest = "/".join(parts[2:4]), parts[4:]
                revision = rest[1] if len(rest) > 1 else "main"
                self.describe(repo, revision, tree=rest[:1] == ["tree"])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.fail(404, "")

        def commit_of(self, repo: str, revision: str) -> str | None:
            """The commit, or None after an error was sent."""
            if repo in hub.gated:
                self.fail(403, "GatedRepo")
            elif not any(known == repo for known, _ in hub.revisions):
                self.fail(404, "RepoNotFound")
            elif (repo, revision) not in hub.revisions:
                self.fail(404, "RevisionNotFound")
            else:
                return hub.revisions[repo, revision]
            return None

        def describe(self, repo: str, revision: str, *, tree: bool) -> None:
            commit = self.commit_of(repo, revision)
            if commit is None:
                return
            files = hub.commits[commit]
            if tree:
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.reply(200, json.dumps(listing).encode(), {})
                return
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self.reply(200, json.dumps(info).encode(), {})

        def send_file(self, repo: str, revision: str, name: str) -> None:
            commit = self.commit_of(repo, revision)
            if commit is None:
                return
            data = hub.commits[commit].get(name)
            if data is None:
                self.fail(404, "EntryNotFound")
                return
            self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})

        def fail(self, status: int, code: str) -> None:
            self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut_after is not None and "ETag" in headers and len(body) > hub.cut_after:
                body = body[: hub.cut_after]
                self.close_connection = True
            self.wfile.write(body)

    return Handler
