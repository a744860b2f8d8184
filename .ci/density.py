"""How dense the code is: `python .ci/density.py`. By package, the statements with two or more comprehensions
and the assignments inside expressions (`:=`); the numbers stand in density.json and may only fall, `--write`
notes lower ones. No function is longer than 60 lines, no file than 450.

Exits with 1 where there is more, and lists it.
"""

import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALLOWED = Path(__file__).with_name("density.json")
PACKAGE = ROOT / "codyra_llm"
ELSEWHERE = (PACKAGE / "benchmarks", PACKAGE / "recipes")  # links in a checkout: they lie at the top level
FUNCTION, FILE = 60, 450  # lines at most
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Found(NamedTuple):
    """A place that counts: its package, `comprehensions`, `walrus`, `function` or `file`, and where it is."""

    package: str
    kind: str
    where: str


def own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement, without those of the statements in it."""
    waiting = list(ast.iter_child_nodes(statement))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.stmt):
            yield node
            waiting += ast.iter_child_nodes(node)


def of_file(source: str, package: str, name: str) -> Iterator[Found]:
    """What counts in one file."""
    if source.count("\n") > FILE:
        yield Found(package, "file", f"{name}: {source.count(chr(10))} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.NamedExpr):
            yield Found(package, "walrus", f"{name}:{node.lineno}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION:
                yield Found(package, "function", f"{name}:{node.lineno}: {node.name}, {length} lines")
        if isinstance(node, ast.stmt):
            inside = [one for one in own_nodes(node) if isinstance(one, COMPREHENSIONS)]
            if len(inside) > 1:
                yield Found(package, "comprehensions", f"{name}:{node.lineno}")


def found(folder: Path = PACKAGE) -> list[Found]:
    """What counts in all files of the package."""
    places = []
    for path in sorted(folder.rglob("*.py")):
        if not any(path.is_relative_to(other) for other in ELSEWHERE):
            package = path.relative_to(folder).parts[0]
            places += of_file(path.read_text(encoding="utf-8"), package, str(path.relative_to(folder.parent)))
    return places


def counted(places: list[Found]) -> dict[str, int]:
    """By package and kind, how many there are."""
    return dict(Counter(f"{one.package} {one.kind}" for one in places))


def more(counts: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """The packages and kinds of which there are too many."""
    return [key for key, count in counts.items() if count > allowed.get(key, 0)]


def main() -> None:
    allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    places = found()
    counts = counted(places)
    if "--write" in sys.argv:
        allowed = {key: min(counts[key], allowed.get(key, 0)) for key in sorted(counts)}
        allowed = {key: count for key, count in allowed.items() if count}
        ALLOWED.write_text(json.dumps(allowed, indent=1) + "\n", encoding="utf-8")
    over = more(counts, allowed)
    for key in over:
        lines = [one.where for one in places if f"{one.package} {one.kind}" == key]
        print(f"{key}: {counts[key]}, at most {allowed.get(key, 0)}", *lines, sep="\n  ")
    if sum(counts.values()) < sum(allowed.values()) and not over:
        print(f"less than {ALLOWED.name} has; note it with: python .ci/density.py --write")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
