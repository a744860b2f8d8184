"""Open-ended prompts, which have no reference answer: reading the files that a recipe names."""

from pathlib import Path

from codyra_llm.config.sections import OpenEndedSection
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import expanded
from codyra_llm.data.readers import KINDS, kind, rows, stem
from codyra_llm.data.records import record_faults, refuse
from codyra_llm.evaluate.suite import drawn

RECORD = 'records {"prompt": text}'


def criterion(name: str) -> str:
    """What answers to a file of prompts are judged by: safety for TRACE's harmless_*, helpfulness for all
    others."""
    return "safety" if name.startswith("harmless") else "helpfulness"


def find_questions(section: OpenEndedSection) -> dict[str, list[str]]:
    """The prompts that a recipe asks for, by the name of their file without its suffix. Raises one Fault with
    everything that is wrong."""
    if section.prompts is None:
        return {}
    root = Path(expanded(section.prompts))
    if not root.exists():
        raise Fault(
            f"open_ended.prompts: there is no file or folder '{section.prompts}'; give a file that ends in "
            f"{', '.join(KINDS)}, a folder of such, or null"
        )
    paths = sorted(p for p in (root.iterdir() if root.is_dir() else [root]) if kind(p) and p.is_file())
    known = {stem(path): path for path in paths}
    faults = [
        f"open_ended.files: '{name}' is not a file of {root}.{nearest(name, known)} Known: "
        f"{', '.join(known) or 'none'}"
        for name in section.files or ()
        if name not in known
    ]
    if not known or len(known) < len(paths):
        found = "two files of one name" if known else f"no {', '.join(KINDS)}"
        faults.append(
            f"open_ended.prompts: {root} holds {found}; give files with {RECORD}, each of another name"
        )
    if faults:
        raise Fault(*faults)
    found = {name: _read(known[name]) for name in dict.fromkeys(section.files or known)}
    chosen = {}
    for name, prompts in found.items():
        places = drawn(name, {name: len(prompts)}, section.limit, section.seed)[name]
        chosen[name] = [prompts[i] for i in places]
    return chosen


def _read(path: Path) -> list[str]:
    """The prompts of one file. Raises one Fault with everything that is wrong with it."""
    records = rows(path, RECORD)
    if not records:
        raise Fault(f"{path} holds no record, expected {RECORD}; write at least one")
    faults = []
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        own = record_faults({**record, "answer": ""} if isinstance(record, dict) else record, "test", where)
        if not own and not str(record["prompt"]).strip():
            own = [f"{where}: 'prompt' is empty; fill it in or remove the record"]
        faults += own
    refuse(faults, path, len(records))
    return [str(record["prompt"]) for record in records]
