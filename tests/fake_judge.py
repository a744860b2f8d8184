"""An OpenAI-compatible endpoint on this machine, whose judgement is a function."""

import json
import re
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from codyra_llm.config.recipe import parse_recipe


@contextmanager
def judge(prefers, fails=lambda number: None, delay=0.0):
    """The server: `url`, and `asked`, the bodies of all requests with their "authorization".

    prefers(first, second): the text of the reply. fails(number): None, or status and body in place of a
    reply.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body | {"authorization": self.headers["authorization"], "path": self.path})
            time.sleep(delay)
            if failure := fails(len(asked)):
                return self.answer(*failure)
            text = body["messages"][0]["content"]
            first, second = (
                re.search(rf"<answer_{x}>\n(.*)\n</answer_{x}>", text, re.DOTALL)[1] for x in "AB"
            )
            message = {"role": "assistant", "content": prefers(first, second)}
            self.answer(
                200,
                json.dumps(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": body["model"],
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    }
                ),
            )

        def answer(self, status, body, kind="application/json"):
            try:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body.encode())))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(body.encode())
            except BrokenPipeError:  # the client did not wait
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked = f"http://127.0.0.1:{server.server_port}/v1", asked
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


KEY = "sk-never-to-be-written-0123456789"


def likes_good(first, second):
    letter = "C" if ("GOOD" in first) == ("GOOD" in second) else "A" if "GOOD" in first else "B"
    return f"Neither [[A]] nor [[B]] at first sight, but on reflection\n[[{letter}]]"


def judge_recipe(url=None, **settings):
    section = {
        "prompts": "p",
        "judge": {"base_url": url, "model": "the-judge", "retries": 2, "timeout": 5, **settings},
    }
    return parse_recipe(
        {
            "model": {"path": "m"},
            "data": {"root": "d"},
            "method": "seqlora",
            "output": "o",
            "open_ended": section,
        }
    )
