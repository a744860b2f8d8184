"""A web server on this machine that answers as it is told to, well or badly, and a stand-in for the hub."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def served(answers: dict[str, Answer]) -> Iterator[str]:
    """The server's address. `answers`: by path, without what follows a question mark; read anew each time."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answers.get(self.path.partition("?")[0], status(404))(self)

        def do_HEAD(self) -> None:
            self.do_GET()

        def end_headers(self) -> None:
            self.send_header("Connection", "close")  # else the client goes on in the closed one
            super().end_headers()

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def body(data: bytes, code: int = 200, length: int | None = None, **headers: str) -> Answer:
    """`data` with these headers. `length`: what the server says that it sends; default: the truth."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    return answer


def status(code: int) -> Answer:
    return body(b"<html>", code)


def moved(to: str) -> Answer:
    return body(b"", 302, Location=to)


def chunked(data: bytes, ends: bool = True) -> Answer:
    """One chunk without a length told before. `ends`: whether the last, empty one follows."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if ends:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def stalled(data: bytes, until: threading.Event) -> Answer:
    """Half of `data`, and then nothing."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        until.wait(30)

    return answer


def data_set(name: str, files: dict[str, bytes]) -> dict[str, Answer]:
    """What the hub answers for a data set of these files at one commit: its facts, its tree, each file."""
    about = json.dumps({"id": name, "sha": COMMIT, "private": False, "siblings": []}).encode()
    tree = [
        {"type": "file", "path": path, "size": len(data), "oid": f"{number:040x}"}
        for number, (path, data) in enumerate(files.items())
    ]
    listed = json.dumps(tree).encode()
    answers = {
        f"/api/datasets/{name}": body(about, Content_Type="application/json"),
        f"/api/datasets/{name}/revision/main": body(about, Content_Type="application/json"),
        f"/api/datasets/{name}/tree/{COMMIT}": body(listed, Content_Type="application/json"),
    }
    for number, (path, data) in enumerate(files.items()):
        answers[f"/datasets/{name}/resolve/{COMMIT}/{path}"] = body(
            data, X_Repo_Commit=COMMIT, ETag=f'"{number:040x}"'
        )
    return answers
