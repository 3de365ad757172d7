"""A local server for the page in demo/, which records requests and can lack, change or hold back files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "demo"


class DemoServer(ThreadingHTTPServer):
    """Serves the files of demo/, and those of a folder as model/."""

    daemon_threads = True

    def __init__(self, model: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        """The requested paths, such as `/model/config.json`."""
        self.missing: set[str] = set()
        """Paths answered with 404."""
        self.changed: dict[str, bytes] = {}
        """Contents that replace those of files, by path."""
        self.gate = threading.Event()
        """While it is not set, ONNX files are not sent."""
        self.gate.set()


class _Handler(SimpleHTTPRequestHandler):
    server: DemoServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path in self.server.missing:
            self.send_error(404)
        elif content := self.server.changed.get(self.path):
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(self.path))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            if self.path.endswith(".onnx"):
                self.server.gate.wait(60)
            super().do_GET()

    def translate_path(self, path: str) -> str:
        folder, _, name = path.removeprefix("/").partition("/")
        if folder == "model":
            return str(self.server.model / name)
        return str(PAGE / path.removeprefix("/"))

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")  # a changed file takes effect
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Not to the terminal."""


@contextmanager
def serve(model: Path) -> Iterator[DemoServer]:
    server = DemoServer(model)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
