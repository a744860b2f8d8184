"""Give the commands in environments that are unlike a developer's: each must work, or say in one sentence why
not; no traceback, and nothing that hangs.

`python tests/environments.py [--only TEXT] [--out FOLDER] [--seconds 120]` prints a line for each case. Those
that need root say so where they are left out.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos import quiet
from tiny import SIZES, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from codyra_llm.experiment import run as runs

LOADED = (runs,)  # what the forked processes need is imported once, here
ROOT = Path(__file__).parents[1]
TASK = "Größe 数"
# The commands one after the other, in processes that a fresh one forks, so that packages are imported once.
PROGRAM = """
import gc, json, os, sys
from codyra_llm.cli import main
from codyra_llm.experiment import plan, run
from transformers import LlamaForCausalLM
gc.collect()
gc.freeze()  # the processes need not walk, and so copy, what they were forked with
result, commands = sys.argv[1], json.loads(sys.argv[2])
codes = {}
for words in commands:
    child = os.fork()
    if not child:
        main(words)
        os._exit(0)
    codes[words[0]] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with open(result, "w") as file:
    json.dump(codes, file)
"""
# A root that modes of files hold for, as they do for others.
ORDINARY = "setpriv --bounding-set -dac_override,-dac_read_search --inh-caps -dac_override,-dac_read_search"
OWN_MOUNTS = 0x00020000  # CLONE_NEWNS of unshare(2)

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """An environment: what the shell does before the commands of a fresh process, or what a forked one does,
    where the commands find and write things, and what `run` says if it can't work."""

    name: str
    before: str = ""
    start: str = ""
    closed: str = ""
    inside: Change | None = None
    model: str = "model"
    data: str = "data"
    out: str = "run"
    says: str = ""
    needs_root: bool = False
    checks: bool = False  # `plan` and `data check` are given too
    arrange: Change = field(default=lambda folder: None)


def _linked(folder: Path) -> None:
    (folder / "run").mkdir()
    for name in ("model", "data", "run"):
        (folder / name).rename(folder / f"real {name}")
        (folder / name).symlink_to(f"real {name}")


def _shut(*names: str) -> Change:
    """Nobody may write below these folders."""

    def arrange(folder: Path) -> None:
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            subprocess.run(["chmod", "-R", "a-w,a+rX", folder / name], check=True)

    return arrange


def _mount(*commands: str) -> Change:
    """These mounts, for this process alone."""

    def change(folder: Path) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(OWN_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        for command in ("mount --make-rprivate /", *commands):
            subprocess.run(["bash", "-c", command], cwd=folder, check=True)

    return change


def _read_only(*names: str) -> Change:
    binds = [f"mkdir -p {name} && mount --bind {name} {name}" for name in names]
    return _mount(*binds, *(f"mount -o remount,ro,bind {name}" for name in names))


def _files(most: int) -> Change:
    return lambda folder: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


ODD = {
    "spaces": "a  b",
    "quotes": 'it\'s "so"',
    "brackets": "[/b] {x} (y)",
    "emoji": "🙂 né",
    "a leading dash": "-rf",
    "a newline": "two\nlines",
    "a percent sign": "100%",
    "a leading equals sign": "=1+1",
}
CASES = [
    Case("nothing changed", checks=True),
    Case("HOME unset", before="unset HOME"),
    Case(
        "HOME unset and a user without an entry in passwd",
        before="unset HOME USER LOGNAME; touch empty; mount --bind empty /etc/passwd",
        start="unshare -m",
        needs_root=True,
    ),
    Case("HOME that can't be written", before="export HOME=/proc/none"),
    Case("locale C", before="export LC_ALL=C"),
    Case(
        "locale POSIX, without UTF-8 mode",
        before="export LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
        says="PYTHONUTF8=1",
    ),
    Case("standard streams in ASCII", before="export PYTHONIOENCODING=ascii"),
    Case("standard streams in Latin-1", before="export PYTHONIOENCODING=latin-1"),
    Case("umask 077", inside=lambda folder: os.umask(0o077)),
    Case("64 file descriptors", inside=_files(64)),
    Case("32 file descriptors", inside=_files(32)),
    Case(
        "read-only model and data, by mode",
        start=ORDINARY,
        needs_root=True,
        arrange=_shut("model", "data"),
    ),
    Case(
        "read-only output, by mode",
        start=ORDINARY,
        needs_root=True,
        arrange=_shut("run"),
        says="run.*Permission denied",
    ),
    Case(
        "a model that may not be read",
        start=ORDINARY,
        needs_root=True,
        arrange=lambda folder: (folder / "model" / "model.safetensors").chmod(0),
        says="model.safetensors.*Permission denied",
    ),
    Case("read-only model and data, by mount", inside=_read_only("model", "data"), needs_root=True),
    Case(
        "read-only output, by mount",
        inside=_read_only("run"),
        needs_root=True,
        says="run.*Read-only file system",
    ),
    Case("folders that are symbolic links", arrange=_linked, inside=lambda folder: None),
    Case("TMPDIR that is not there", before="export TMPDIR=/nowhere"),
    Case(
        "TMPDIR that is full",
        before="mkdir tmp && mount -t tmpfs -o size=4k none tmp && head -c 4096 /dev/zero > tmp/x; "
        "export TMPDIR=$PWD/tmp",
        start="unshare -m",
        needs_root=True,
    ),
    Case("no /dev/shm", inside=_mount("mount -t tmpfs -o ro,size=4k none /dev/shm"), needs_root=True),
    Case("no /sys", inside=_mount("mount -t tmpfs -o ro,size=4k none /sys"), needs_root=True),
    Case("standard input closed", closed="<&-"),
    Case("standard output closed", closed=">&-"),
    Case("standard error closed", closed="2>&-"),
    Case("all three closed", closed="<&- >&- 2>&-"),
    Case("no PATH", before="export PATH="),
    Case("a terminal of one column", before="export COLUMNS=1 TERM=dumb"),
    Case("a time zone that is none", before="export TZ=Nowhere/None"),
    *(
        Case(f"names with {kind}", model=f"m{name}", data=f"d{name}", out=name, inside=lambda folder: None)
        for kind, name in ODD.items()
    ),
    Case(
        "a name with an escape sequence",
        data="d\x1b[31mred",
        inside=lambda folder: None,
        says="data.root: .*holds a control character",
    ),
    Case(
        "a name with $HOME, which recipes write out",
        data="$HOME",
        inside=lambda folder: None,
        says="data.root: there is no folder",
    ),
]
TOGETHER = Case(  # for a quick look: what goes together, at once
    "all of these at once",
    before="unset HOME; export LC_ALL=POSIX TMPDIR=/nowhere TERM=dumb; umask 077; ulimit -n 64",
    closed="<&-",
    model="m [/b] {x}",
    data='d it\'s "🙂"',
    out="-a\nb",
    checks=True,
)


def make(folder: Path) -> Path:
    """A model of two layers and a task of a name and prompts beyond ASCII, to be copied for each case."""
    save_tiny(folder / "model", LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False))
    (folder / "data" / TASK).mkdir(parents=True)
    for split, count in (("train", 8), ("eval", 2), ("test", 2)):
        rows = [{"prompt": f"Wie groß ist {i}? 数 🙂\u202e[/b]", "answer": f"{i} m²"} for i in range(count)]
        (folder / "data" / TASK / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    rows = [{"prompt": "é", "prediction": "数", "answer": "数"}]
    (folder / "predictions.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return folder


def commands(case: Case, folder: Path) -> list[list[str]]:
    recipe = {
        "model": {"path": str(folder / case.model)},
        "data": {"root": str(folder / case.data), "tasks": [TASK], "epochs": 1},
        "method": {"name": "seqlora", "rank": 2},
        "optim": {"lr": 1e-3, "batch_size": 4},
        "eval": {"max_new_tokens": 2},
        "output": str(folder / case.out),
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, ensure_ascii=False), "utf-8")
    out = str(folder / case.out)
    return [
        *[["plan", "recipe.json"], ["data", "check", str(folder / case.data)]] * case.checks,
        ["run", "recipe.json"],
        ["status", out],
        ["report", out],
        ["score", TASK, "predictions.json"],
    ]


def tried(case: Case, made: Path, folder: Path, seconds: float) -> str:
    """ "works", "says so", "left out", or what is wrong."""
    if case.needs_root and os.geteuid():
        return "left out: needs root"
    for name, target in (("model", case.model), ("data", case.data)):
        shutil.copytree(made / name, folder / target)
    shutil.copy(made / "predictions.json", folder)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    asked = commands(case, folder)
    case.arrange(folder)
    folder.chmod(0o777)
    return (_forked if case.inside else _fresh)(case, folder, asked, seconds) or judged(case, folder)


def _forked(case: Case, folder: Path, asked: list[list[str]], seconds: float) -> str:
    """Each command in a fork of this process, which has loaded all packages; what is wrong, or ''."""
    codes = {}
    for words in asked:
        child = multiprocessing.get_context("fork").Process(target=_inside, args=(case, folder, words))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            return f"{words[0]} hangs: more than {seconds:.0f} s"
        codes[words[0]] = child.exitcode
    (folder / "codes.json").write_text(json.dumps(codes))
    return ""


def _inside(case: Case, folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    log = folder / "said"
    log.touch()
    log.chmod(0o666)
    case.inside(folder)
    quiet(words, log)


def _fresh(case: Case, folder: Path, asked: list[list[str]], seconds: float) -> str:
    """All commands in forks of one fresh process; what is wrong, or ''."""
    program = shlex.join([sys.executable, "-c", PROGRAM, str(folder / "codes.json"), json.dumps(asked)])
    streams = {1: ">>said", 2: "2>>said"}
    opened = [
        to for number, to in streams.items() if {1: ">&-", 2: "2>&-"}[number] not in case.closed.split()
    ]
    script = f"cd {shlex.quote(str(folder))}; {case.before}\nexec {program} {' '.join(opened)} {case.closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        command = [*case.start.split(), "bash", "-c", script]
        subprocess.run(command, env=environment, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"hangs: more than {seconds:.0f} s"
    return ""


def judged(case: Case, folder: Path) -> str:
    said = folder / "said"
    words = said.read_text("utf-8", errors="replace") if said.is_file() else ""
    if "Traceback" in words:
        return f"a traceback: {words.strip().splitlines()[-1]}"
    if not (folder / "codes.json").is_file():
        return f"ended early: {words[-300:]}"
    codes = json.loads((folder / "codes.json").read_text())
    if case.says and codes["run"] == 2:
        found = re.search(f"error: .*({case.says}).*", words)
        return "says so" if found else f"says something else: {words[-300:]}"
    wrong = {command: code for command, code in codes.items() if code}
    return f"codes {wrong}: {words[-300:]}" if wrong else "works"


FINE = ("works", "says so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has one of these, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="environments"))
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o755)
    made = make(out / "made")
    counts: dict[str, int] = {}
    for number, case in enumerate([*CASES, TOGETHER]):
        if any(part in case.name for part in given.only.split(",")):
            (folder := out / str(number)).mkdir()
            found = tried(case, made, folder, given.seconds)
            key = found if found in FINE else found.partition(":")[0]
            counts[key] = counts.get(key, 0) + 1
            print(f"{case.name}: {found}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
