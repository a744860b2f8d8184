"""Types by pyright, with the settings of pyproject.toml: `python .ci/types.py`. The number of errors of each
package stands in types.json and may only fall; `--write` notes lower numbers, and those of new packages.

Packages that are not in types.json have none. Exits with 1 where there are more, and lists them.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = Path(__file__).with_name("types.json")
CLEAN = {"codyra_llm/core", "codyra_llm/config", "codyra_llm/store", "codyra_llm/report"}


def found() -> dict[str, list[str]]:
    """By package, `file:line: what is wrong`."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: there are errors
        sys.exit(f"pyright failed: {done.stderr or done.stdout}")
    errors: dict[str, list[str]] = defaultdict(list)
    for told in json.loads(done.stdout)["generalDiagnostics"]:
        if told["severity"] == "error":
            file = Path(told["file"]).relative_to(ROOT)
            line = told["range"]["start"]["line"] + 1
            errors[package(file)].append(f"{file}:{line}: {told['message']}")
    return errors


def package(file: Path) -> str:
    """The first two folders, or the file where it lies in the first."""
    return "/".join(file.parts[:2])


def more(counts: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    """By package how many errors are too many."""
    over = {name: count - allowed.get(name, 0) for name, count in counts.items()}
    return {name: count for name, count in over.items() if count > 0}


def lowered(counts: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    """The numbers to note: never higher than before, and none for packages that must stay clean."""
    known = {name: min(count, allowed.get(name, count)) for name, count in counts.items()}
    return {name: count for name, count in sorted(known.items()) if count and name not in CLEAN}


def main() -> None:
    allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    errors = found()
    counts = {name: len(told) for name, told in errors.items()}
    if "--write" in sys.argv:
        allowed = lowered(counts, allowed)
        ALLOWED.write_text(json.dumps(allowed, indent=1) + "\n", encoding="utf-8")
    over = more(counts, allowed)
    for name, count in over.items():
        print(*errors[name], f"{name}: {count} errors more than {ALLOWED.name} has", sep="\n")
    if sum(counts.values()) < sum(allowed.values()) and not over:
        print(f"fewer errors than {ALLOWED.name} has; note them with: python .ci/types.py --write")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
