"""TRACE from a data set of the hub: its real client, in a process that is told of a hub on this machine. The
server answers as the hub does."""

import json
import os
import subprocess
import sys

from archives import BENCHMARK, files, laid_out, packed
from served import COMMIT, body, data_set, served, status

# Each command of a list in turn, and the code and text of each. The hub's client reads its address when it is
# imported.
HUB = """
import contextlib, io, json, sys
from codyra_llm.cli import main
found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""


def on_hub(address, tmp_path, *commands):
    """Exit code and text of each command, in one process for which the hub is at `address`."""
    known = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    asked = json.dumps([[*map(str, words)] for words in commands])
    done = subprocess.run(
        [sys.executable, "-c", HUB, asked],
        capture_output=True,
        text=True,
        timeout=300,
        env=known,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_data_sets_of_a_hub(tmp_path):
    """Its client is the real one; the server answers as the hub does."""
    answers = {}
    zipped = packed(tmp_path / "t.zip", files("a")).read_bytes()
    answers |= data_set("own/files", {**files(BENCHMARK), "README.md": b"hello", "big.bin": b"0"})
    answers |= data_set("own/packed", {f"deep/{BENCHMARK}.zip": zipped})
    answers |= data_set("own/other", {"a.json": b"[]"})
    for path in list(answers):
        if path.endswith(("README.md", "big.bin")):
            answers[path] = status(500)  # not asked for
    for name, code, error in (("gated", 403, "GatedRepo"), ("none", 404, "RepoNotFound")):
        answers[f"/api/datasets/own/{name}/revision/main"] = body(b"", code, X_Error_Code=error)
    answers |= data_set("own/broken", {"a.zip": zipped})
    path = f"/datasets/own/broken/resolve/{COMMIT}/a.zip"
    answers[path] = body(zipped[:100], length=len(zipped), X_Repo_Commit=COMMIT, ETag='"1"')
    names = ("files", "packed", "other", "none", "gated", "broken")
    commands = [["data", "get", "trace", "--from", f"own/{name}", tmp_path / name] for name in names]
    with served(answers) as address:
        found = on_hub(address, tmp_path, *commands)
    said = dict(zip(names, found, strict=True))
    for name in ("files", "packed"):
        code, text = said.pop(name)
        assert code == 0 and "0 faults" in text, text
        assert len(laid_out(tmp_path / name / BENCHMARK)) == 9
    for name, expected in (
        ("other", "own/other holds no task of TRACE (C-STANCE"),
        ("none", "'own/none' is not on the hub, or is private; check its name, and run `hf auth login`"),
        ("gated", "'own/gated' is gated; accept its terms at https://huggingface.co/datasets/own/gated"),
        ("broken", "'own/broken' can't be had from the hub ("),
    ):
        code, text = said[name]
        assert code == 2 and expected in text and "Traceback" not in text, text
        assert list((tmp_path / name).iterdir()) == []
