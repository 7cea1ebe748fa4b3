"""Remotes for the sync: a bare repository on disk, and the same behind HTTP with a token, as on GitHub."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.manifest import Entry, update_manifest
from pkbrokers_redis.settings import Settings, load_settings

MADE_AT = "2026-11-20T15:36:02+05:30"
SECONDS_MAX = 60  # a test that forgot its gate
BRANCH, FOLDER = "data", "results/kite"
HOME = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
WHO = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"
}  # fmt: skip


class Repository:
    """A bare repository; `git(…)` runs git in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", ".")
        self.git("config", "uploadpack.allowFilter", "true")
        self.git("config", "http.receivepack", "true")

    def git(self, *arguments: str, given: bytes | None = None) -> str:
        ran = subprocess.run(
            ["git", *arguments],
            cwd=self.path,
            env={**HOME, **WHO},
            input=given,
            capture_output=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr.decode()
        return ran.stdout.decode().strip()

    def commit(self, files: dict[str, bytes], message: str = "by hand") -> str:
        """Commit these files to the branch as another author, and keep its other files."""
        index = {**HOME, **WHO, "GIT_INDEX_FILE": str(self.path / "other-index")}

        def git(*arguments: str, given: bytes | None = None) -> str:
            ran = subprocess.run(
                ["git", *arguments], cwd=self.path, env=index, input=given, capture_output=True, check=True
            )
            return ran.stdout.decode().strip()

        tip = self.tip()
        (self.path / "other-index").unlink(missing_ok=True)
        if tip:
            git("read-tree", tip)
        for name, content in files.items():
            blob = git("hash-object", "-w", "--stdin", given=content)
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
        tree = git("write-tree")
        commit = git("commit-tree", tree, *(["-p", tip] if tip else []), "-m", message)
        git("update-ref", f"refs/heads/{BRANCH}", commit)
        return commit

    def tip(self) -> str:
        return self.git("for-each-ref", "--format=%(objectname)", f"refs/heads/{BRANCH}")

    def read(self, name: str) -> bytes:
        ran = subprocess.run(
            ["git", "cat-file", "blob", f"{BRANCH}:{name}"],
            cwd=self.path,
            env=HOME,
            capture_output=True,
            check=True,
        )
        return ran.stdout

    def names(self) -> list[str]:
        return self.git("ls-tree", "-r", "--name-only", BRANCH).splitlines()

    def log(self) -> list[str]:
        return self.git("log", "--format=%s", BRANCH).splitlines()

    def objects_after_gc(self) -> tuple[int, int]:
        """How many objects, and how many KiB they take, after unreferenced objects are deleted."""
        self.git("gc", "--quiet", "--prune=now")
        counted = dict(line.split(": ") for line in self.git("count-objects", "-v").splitlines())
        return int(counted["in-pack"]) + int(counted["count"]), int(counted["size-pack"])


def snapshot(folder: Path, name: str, content: bytes, made_at: str = MADE_AT) -> None:
    """A file in the folder and the manifest, as a snapshot writes it."""
    with replacing(folder / name) as file:
        file.write(content)
    entry = Entry(hashlib.sha256(content).hexdigest(), len(content), 1, 1, "", "", made_at, "ticks")
    update_manifest(folder, {name: entry})


def partition(day: str, interval: str = "1m") -> str:
    """A Parquet partition's name."""
    return f"parquet/interval={interval}/date={day}/candles.parquet"


def sync_settings(repository: Repository, data: Path, **more: Any) -> Settings:
    """Settings of a machine whose data folder is `data`, and whose sync target is the repository."""
    options = {"github_url": f"file://{repository.path}", "github_branch": BRANCH, "github_path": FOLDER}
    return load_settings(**{**options, "data_dir": data, **more})


class Gate:
    """Where the host stops: `reached` when it does, until `release()`; `passed` when that request is over."""

    def __init__(self, method: str = "", path_end: str = "", bytes_min: int = -1) -> None:
        self.method, self.path_end, self.bytes_min = method, path_end, bytes_min
        self.reached, self.passed, self._open = threading.Event(), threading.Event(), threading.Event()

    def stop(self) -> None:
        self.reached.set()
        self._open.wait(SECONDS_MAX)

    def release(self) -> None:
        self._open.set()


class GitHost:
    """`http://127.0.0.1:port/repository.git` for requests with the token, and `/raw/branch/…`.

    `seen` are the request lines, `authorizations` the headers that came, `bytes_sent` the bodies we sent,
    `bytes_taken` those that came.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self.seen: list[str] = []
        self.authorizations: list[str] = []
        self.bytes_sent = self.bytes_taken = 0
        self.redirect_to = ""
        self._gates: list[Gate] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.seen.append(f"{self.command} {self.path}")
                given = self.headers.get("Authorization", "")
                host.authorizations.append(given)
                body = self._body()
                host.bytes_taken += len(body)
                gate = host._gate(
                    lambda gate: gate.method == self.command and self.path.endswith(gate.path_end)
                )
                if gate is not None:
                    gate.stop()
                self._served(given, body)
                if gate is not None:
                    gate.passed.set()

            def _served(self, given: str, body: bytes) -> None:
                if host.redirect_to:
                    self._answer(302, b"", {"Location": host.redirect_to + self.path})
                elif self.path.startswith("/raw/"):
                    self._raw(given)
                elif given != "Basic " + base64.b64encode(f"x-access-token:{token}".encode()).decode():
                    self._answer(401, b"no", {"WWW-Authenticate": 'Basic realm="git"'})
                else:
                    self._git(body)

            do_POST = do_GET  # noqa: N815

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _raw(self, given: str) -> None:
                if given != f"token {token}":
                    return self._answer(404, b"")
                try:
                    found = repository(unquote(self.path.removeprefix("/raw/")))
                except subprocess.CalledProcessError:
                    return self._answer(404, b"")
                etag = f'"{hashlib.sha256(found).hexdigest()}"'
                if self.headers.get("If-None-Match") == etag:
                    return self._answer(304, b"", {"ETag": etag})
                return self._answer(200, found, {"ETag": etag})

            def _git(self, body: bytes) -> None:
                path, _, query = self.path.partition("?")
                env = {
                    **HOME,
                    "GIT_PROJECT_ROOT": str(folder), "GIT_HTTP_EXPORT_ALL": "1", "REMOTE_USER": "u",
                    "PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": self.command,
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                }  # fmt: skip
                ran = subprocess.run(
                    ["git", "http-backend"], env=env, input=body, capture_output=True, check=False
                )
                head, _, content = ran.stdout.partition(b"\r\n\r\n")
                headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
                self._answer(int(headers.pop("Status", "200").split()[0]), content, headers)

            def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                host.bytes_sent += len(content)
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                gate = host._gate(lambda gate: 0 <= gate.bytes_min <= len(content))
                if gate is not None:
                    self.wfile.write(content[: len(content) // 2])
                    content = content[len(content) // 2 :]
                    gate.stop()
                if status != 304:
                    with contextlib.suppress(OSError):  # the client may be dead
                        self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        def repository(name: str) -> bytes:
            branch, _, path = name.partition("/")
            return subprocess.run(
                ["git", "cat-file", "blob", f"{branch}:{path}"],
                cwd=next(folder.glob("*.git")), env=HOME, capture_output=True, check=True,
            ).stdout  # fmt: skip

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def hold(self, method: str, path_end: str) -> Gate:
        """Stop the next such request before it is looked at."""
        self._gates.append(Gate(method, path_end))
        return self._gates[-1]

    def hold_answer(self, bytes_min: int) -> Gate:
        """Stop the next answer of that size in its middle."""
        self._gates.append(Gate(bytes_min=bytes_min))
        return self._gates[-1]

    def _gate(self, fits: Callable[[Gate], bool]) -> Gate | None:
        for gate in self._gates:
            if fits(gate):
                self._gates.remove(gate)
                return gate
        return None

    def __enter__(self) -> GitHost:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def words(text: str) -> set[str]:
    """For looking whether a secret is among them."""
    return set(re.split(r"\W+", text))
