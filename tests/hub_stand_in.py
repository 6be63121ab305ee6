"""A stand-in for the hub on the loopback interface, and its cache, for the tests of weights."""

import contextlib
import hashlib
import http.server
import shutil
import socket
import threading
from pathlib import Path

from huggingface_hub import constants

from hf_lopt.weights import hub, loading


def isolate(monkeypatch, cache):
    """Offline, with the empty cache folder `cache` and nothing remembered."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "_failed", {})
    monkeypatch.setattr(loading, "_warned", set())


def use_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    # The library composes this once, when it is imported.
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def put_in_cache(repo_id, filename, source):
    """As the hub's library lays out its cache."""
    commit = "0" * 40
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    target = folder / "snapshots" / commit / filename
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses. `server.files`: (repository, file) -> content."""

    def do_HEAD(self):
        owner, name, _, _, filename = self.path.strip("/").split("/", 4)
        self.server.asked.append((self.command, f"{owner}/{name}", filename))
        repo = {file: data for (repo, file), data in self.server.files.items() if repo == f"{owner}/{name}"}
        if self.server.status is not None:
            self.send_response(self.server.status)
        elif filename not in repo:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repo else "RepoNotFound")
        else:
            self.send_response(200)
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(repo[filename]).hexdigest()}"')
            self.send_header("Content-Length", str(len(repo[filename])))
            self.end_headers()
            return repo[filename]
        self.send_header("Content-Length", "0")
        self.end_headers()
        return b""

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def stuck_server(drip: bytes = b""):
    """Never finishes an answer, but sends `drip` again and again. Yields (endpoint, connections)."""
    connections, stop = [], threading.Event()

    def serve(listener):
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connections.append(listener.accept()[0])
                threading.Thread(target=answer, args=(connections[-1],), daemon=True).start()

    def answer(connection):
        with contextlib.suppress(OSError):
            if drip:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while drip and not stop.wait(0.02):
                connection.sendall(drip)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        finally:
            stop.set()
            thread.join()
            for connection in connections:
                connection.close()
