"""Give the commands in environments that are unlike a developer's: each must work, or say in one sentence why
not; no traceback, and nothing that hangs.

`python tests/environments.py [--only TEXT] [--out FOLDER] [--seconds 120]` prints a line for each case. Those
that need root say so where they are left out.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tiny import SIZES, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
TASK = "Größe 数"
# The commands one after the other, in processes that a fresh one forks, so that packages are imported once.
PROGRAM = """
import json, os, sys
from codyra_llm.cli import main
from codyra_llm.experiment import plan, run
from transformers import LlamaForCausalLM
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
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups"


@dataclass(frozen=True)
class Case:
    """An environment: what the shell does before the commands, what it starts them with, where they find and
    write things, and what they say if they can't work."""

    name: str
    before: str = ""
    start: str = ""
    closed: str = ""
    model: str = "model"
    data: str = "data"
    out: str = "run"
    says: str = ""
    needs_root: bool = False
    checks: bool = False  # `plan` and `data check` are given too
    arrange: Callable[[Path], None] = field(default=lambda folder: None)


def _linked(folder: Path) -> None:
    for name in ("model", "data", "run"):
        (folder / f"real {name}").mkdir(exist_ok=True) if name == "run" else (folder / name).rename(
            folder / f"real {name}"
        )
        (folder / name).symlink_to(f"real {name}")


def _shut(*names: str) -> Callable[[Path], None]:
    """Nobody may write below these folders."""

    def arrange(folder: Path) -> None:
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            subprocess.run(["chmod", "-R", "a-w,a+rX", folder / name], check=True)

    return arrange


def _mounted(*names: str) -> str:
    """Within a mount namespace of its own, these folders read-only."""
    mounts = [f"mkdir -p {name} && mount --bind {name} {name}" for name in names]
    mounts += [f"mount -o remount,ro,bind {name}" for name in names]
    return " && ".join(mounts)


ODD = {
    "spaces": "a  b",
    "quotes": 'it\'s "so"',
    "brackets": "[/b] {x} (y)",
    "emoji": "🙂 né",
    "a leading dash": "-rf",
    "a newline": "two\nlines",
    "a percent sign and a dollar": "100% $HOME",
    "an escape sequence": "\x1b[31mred",
    "a leading equals sign": "=1+1",
}
UNMADE = "HF_HOME=$PWD/cache"

CASES = [
    Case("nothing changed", checks=True),
    Case("HOME unset", before="unset HOME"),
    Case(
        "HOME unset, a user without an entry in passwd",
        before=f"unset HOME USER LOGNAME; export {UNMADE}",
        start="setpriv --reuid 12345 --regid 12345 --clear-groups",
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
    Case("umask 077", before="umask 077"),
    Case("64 file descriptors", before="ulimit -n 64"),
    Case("32 file descriptors", before="ulimit -n 32"),
    Case("read-only model and data, by mode", start=NOBODY, needs_root=True, arrange=_shut("model", "data")),
    Case(
        "read-only output, by mode",
        start=NOBODY,
        needs_root=True,
        arrange=_shut("run"),
        says=r"run.* can't be written \(Permission denied\)|run: Permission denied",
    ),
    Case(
        "a model that may not be read",
        start=NOBODY,
        needs_root=True,
        arrange=lambda folder: (folder / "model" / "model.safetensors").chmod(0),
        says="model.safetensors.*Permission denied",
    ),
    Case("read-only model and data, by mount", before=_mounted("model", "data"), needs_root=True),
    Case(
        "read-only output, by mount",
        before=_mounted("run"),
        needs_root=True,
        says="run.*Read-only file system",
    ),
    Case("folders that are symbolic links", arrange=_linked),
    Case("TMPDIR that is not there", before="export TMPDIR=/nowhere"),
    Case(
        "TMPDIR that is full",
        before="mkdir tmp && mount -t tmpfs -o size=4k none tmp && head -c 4096 /dev/zero > tmp/x; "
        "export TMPDIR=$PWD/tmp",
        needs_root=True,
    ),
    Case("no /dev/shm", before="mount -t tmpfs -o ro,size=4k none /dev/shm", needs_root=True),
    Case("no /sys", before="mount -t tmpfs -o ro,size=4k none /sys", needs_root=True),
    Case("standard input closed", closed="<&-"),
    Case("standard output closed", closed=">&-"),
    Case("standard error closed", closed="2>&-"),
    Case("all three closed", closed="<&- >&- 2>&-"),
    Case("no PATH", before="export PATH="),
    Case("a terminal of one column", before="export COLUMNS=1 TERM=dumb"),
    Case("a time zone that is none", before="export TZ=Nowhere/None"),
    *(Case(f"names with {kind}", model=f"m{name}", data=f"d{name}", out=name) for kind, name in ODD.items()),
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
    asked = commands(case, folder)
    case.arrange(folder)
    folder.chmod(0o777)
    program = shlex.join([sys.executable, "-c", PROGRAM, str(folder / "codes.json"), json.dumps(asked)])
    streams = case.closed or ""
    opened = [f"{n}>>{folder}/said" for n in (1, 2) if f"{'' if n == 1 else n}>&-" not in streams.split()]
    script = f"cd {shlex.quote(str(folder))}\n{case.before}\nexec {case.start} {program} {' '.join(opened)} {streams}"
    shell = ["unshare", "-m", "bash", "-c"] if case.needs_root and "mount" in case.before else ["bash", "-c"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([*shell, script], env=environment, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"hangs: more than {seconds:.0f} s"
    return judged(case, folder)


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
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="environments"))
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o755)
    made = make(out / "made")
    counts: dict[str, int] = {}
    for number, case in enumerate([*CASES, TOGETHER]):
        if given.only in case.name:
            (folder := out / str(number)).mkdir()
            found = tried(case, made, folder, given.seconds)
            key = found if found in FINE else found.partition(":")[0]
            counts[key] = counts.get(key, 0) + 1
            print(f"{case.name}: {found}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
