"""A local server with the layout of NCBI's PubMed folders, which can fail like real servers and networks."""

import gzip
import hashlib
import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from local_server import LocalServer

Fault = Literal["cut", "wrong bytes", "silent"] | int  # an int is the status of the response


def write_pubmed_file(path: Path, content: bytes) -> bytes:
    """Write a gzip file and its checksum file in NCBI's format; return the bytes of the gzip file."""
    compressed = gzip.compress(content, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compressed)
    path.with_name(f"{path.name}.md5").write_text(f"MD5({path.name})= {hashlib.md5(compressed).hexdigest()}\n")
    return compressed


class NcbiServer(LocalServer):
    """Serves a folder with baseline/ and updatefiles/ in it, and records the requests."""

    def __init__(self, folder: Path):
        super().__init__(_Handler)
        self.folder = folder
        self.base_url = f"{self.origin}/pubmed/"
        self.requests: list[str] = []
        """The requested paths, such as `baseline/` or `baseline/pubmed26n0001.xml.gz.md5`."""
        self.times: list[float] = []
        """When each request arrived, in seconds of `time.monotonic`."""
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        """By path, the faults of the next requests, in order."""
        self.odd_links: list[str] = []
        """Additional links in the listing of baseline/."""
        self.retry_after: str | None = None
        """Retry-After header of error responses."""
        self.gate = threading.Event()
        """While it is not set, responses with PubMed files stop halfway."""
        self.gate.set()
        self.lock = threading.Lock()
        self.open_connections = 0
        self.at_once = self.most_at_once = 0
        """Requests in progress, now and at most."""

    def shutdown(self) -> None:
        self.gate.set()
        super().shutdown()

    def count(self, connections: int = 0, requests: int = 0) -> None:
        with self.lock:
            self.open_connections += connections
            self.at_once += requests
            self.most_at_once = max(self.most_at_once, self.at_once)

    def requested(self, ending: str) -> list[str]:
        """The requested paths with this ending."""
        return [path for path in self.requests if path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    server: NcbiServer
    protocol_version = "HTTP/1.1"  # keeps connections open, like NCBI

    def setup(self) -> None:
        super().setup()
        self.server.count(connections=1)

    def finish(self) -> None:
        self.server.count(connections=-1)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.removeprefix("/pubmed/")
        self.server.requests.append(path)
        self.server.times.append(time.monotonic())
        self.server.count(requests=1)
        try:
            rest = self._answer(path)
        except OSError:  # the client has closed the connection
            rest, self.close_connection = b"", True
        # Counted as finished before the last bytes are sent: then the client may request the next file at once.
        self.server.count(requests=-1)
        self.wfile.write(rest)

    def _answer(self, path: str) -> bytes:
        """Send a response except for its last bytes, which are returned."""
        faults = self.server.faults[path]
        fault = faults.pop(0) if faults else None
        if fault == "silent":
            self.server.closing.wait()
            self.close_connection = True
            return b""
        body = self._body(path)
        if isinstance(fault, int):
            return self._head(fault, b"not now", self.server.retry_after)
        if body is None:
            return self._head(404, b"not found")
        if fault == "wrong bytes":
            body = bytes([body[0] ^ 1]) + body[1:]
        rest = self._head(200, body)
        self.wfile.write(rest[: len(rest) // 2])
        self.wfile.flush()
        if path.endswith(".xml.gz"):
            self.server.gate.wait()
        if fault == "cut":
            self.close_connection = True
            return b""
        return rest[len(rest) // 2 :]

    def _head(self, status: int, body: bytes, retry_after: str | None = None) -> bytes:
        self.send_response(status)
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def _body(self, path: str) -> bytes | None:
        """A listing, or the file with the last name of the path, so that even an odd link leads to a valid file."""
        if path in ("baseline/", "updatefiles/"):
            return self._listing(path).encode()
        name = re.split(r"[/\\]", unquote(path))[-1]
        found = sorted(self.server.folder.glob(f"*/{name}")) if name else []
        return found[0].read_bytes() if found else None

    def _listing(self, folder: str) -> str:
        """A listing in Apache's format."""
        names = sorted(file.name for file in (self.server.folder / folder).glob("*"))
        links = ["README.txt", *names, "pubmed26n0001_stats.html", *(self.server.odd_links if "base" in folder else [])]
        lines = [f'<a href="{link}">{link}</a>  2026-01-05 12:00   19M  ' for link in links]
        return "\n".join(
            [
                f"<!DOCTYPE HTML>\n<html><head><title>Index of /pubmed/{folder}</title></head><body><pre>",
                '<a href="?C=N;O=D">Name</a> <a href="?C=M;O=A">Last modified</a> <a href="?C=S;O=A">Size</a><hr>',
                '<a href="/pubmed/">Parent Directory</a>                             -   ',
                *lines,
                "<hr></pre></body></html>\n",
            ]
        )
