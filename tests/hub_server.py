"""A hub on this machine: folders served as repositories, answered as huggingface.co answers.

The real huggingface_hub talks to it, so its real errors, downloads and cache are what is tested.
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `repos[name]`, a folder, as repository `name`.

    Attributes:
        refused: repository -> (status, `X-Error-Code`) in place of its files.
        cut: names of files whose connection breaks half way.
        asked: names of the files asked for, in order.
    """

    def __init__(self):
        self.repos: dict[str, Path] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop answering: from now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, repo: str, name: str) -> tuple[int, str, bytes]:
        """Status, error code and body for one file."""
        if repo in self.refused:
            return *self.refused[repo], b""
        if repo not in self.repos:
            return 401, "RepoNotFound", b""
        path = self.repos[repo] / name
        return (200, "", path.read_bytes()) if path.is_file() else (404, "EntryNotFound", b"")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._reply()

    def do_GET(self) -> None:
        self._reply()

    def _reply(self) -> None:
        owner, repo, _, _, name = self.path.strip("/").split("/", 4)  # .../resolve/REVISION/FILE
        status, code, body = self.hub.answer(f"{owner}/{repo}", name)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no, says the hub")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            self.hub.asked.append(name)
        elif name in self.hub.cut:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Not on the test's stderr."""
