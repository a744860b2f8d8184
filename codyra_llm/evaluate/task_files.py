"""Task files of lm-evaluation-harness that come with a data folder: read strictly, and checked before
anything in them runs.

The harness loads functions that a file names, renders its templates without a sandbox and imports metrics by
name, so a task file is a program. Here it is data, unless `general.trust_code` says otherwise.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import parse_yaml, read_text, shown

READERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, for local files; "pandas" runs pickles
OF_READERS = (
    "data_files",
    "field",
    "encoding",
    "keep_default_na",
    "sep",
    "delimiter",
    "quotechar",
    "names",
    "header",
    "skiprows",
    "columns",
    "sample_by",
    "trust_remote_code",  # the harness drops it
)
PROGRAMS = ("custom_dataset", "use_prompt", "unsafe_code", "doc_to_image", "doc_to_audio")
COUNTS = {"num_fewshot": (0, 1000), "repeats": (1, 100)}
MOST_PARTS = 1000
TRUST = "look at what it runs, and set general.trust_code to true"


def read_task(file: Path, trusted: bool) -> dict[str, Any]:
    """The task file's own keys, without those that it includes. Raises Fault where the file is not a task,
    or, unless it is trusted, names code to run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if trusted:
        try:
            return load_yaml(file, recursive=False)
        except Exception as error:  # whatever the code that it names raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise Fault(
                f"general.data: {file} can't be loaded ({reason}); correct it, or take it out of the folder"
            ) from error
    text = read_text(file, "a task of lm-evaluation-harness")
    line = _function(text)
    if line:
        raise Fault(
            f"general.data: {file} runs a function (!function, line {line}), and code in a data folder is "
            f"not run unasked; {TRUST}"
        )
    own = parse_yaml(text, str(file))
    if not isinstance(own, dict):
        raise Fault(
            f"general.data: {file} is not a task of lm-evaluation-harness (it holds {shown(own)}); write "
            "one, or take the file out of the folder"
        )
    return own


def refuse(file: object, own: dict[str, Any], config: dict[str, Any], root: Path) -> None:
    """Raises Fault with everything that is wrong with a task: with its `own` keys, and with the `config` that
    results from them and those that it includes."""
    # A function of the harness's own scores some tasks, under metric names that its registry does not have.
    scored = callable(config.get("process_results"))
    wrong = [*_of_keys(own), *_of_data(config, root), *_of_scoring(own, scored)]
    if wrong:
        raise Fault(*(f"general.data: {file}: {fault}" for fault in wrong))


def included(file: object, pattern: object, harness: Path) -> list[Path]:
    """The harness's own files that `include` names. Raises Fault where there are none."""
    parts = Path(pattern).parts if isinstance(pattern, str) else ()
    if not parts or not isinstance(pattern, str) or parts[0] == "/" or {"..", "**"} & {*parts}:
        raise Fault(
            f"general.data: {file}: include is {shown(pattern)}, expected files of the harness's own folder "
            "of tasks, such as piqa/piqa.yaml; correct it"
        )
    found = sorted(harness.glob(pattern))[: MOST_PARTS + 1]
    if not 1 <= len(found) <= MOST_PARTS:
        raise Fault(
            f"general.data: {file}: include is {shown(pattern)}, and the harness has {len(found):,d} such "
            f"files, expected 1 to {MOST_PARTS:,d}; correct it"
        )
    return found


def _function(text: str) -> int | None:
    """The line of the first !function; None where there is none, or no YAML."""
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.TagToken) and "function" in token.value:
                return token.start_mark.line + 1
    except yaml.YAMLError:  # reported where it is parsed
        pass
    return None


def _of_keys(config: dict[str, Any]) -> Iterator[str]:
    """Faults: unknown keys, keys that run code, counts out of bounds."""
    from lm_eval.config.task import TaskConfig

    known = {field.name for field in fields(TaskConfig)}
    for key in config:
        if key not in known:
            yield f"'{key}' is not a key of a task.{nearest(key, known)} Leave it out"
    for key in PROGRAMS:
        if config.get(key):
            yield f"{key} is {shown(config[key])}, which would run code; leave it out, or {TRUST}"
    for key, (least, most) in COUNTS.items():
        value = config.get(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            yield f"{key} is {shown(value)}, expected {least} to {most:,d}; correct it"


def _of_data(config: dict[str, Any], root: Path) -> Iterator[str]:
    """Faults: data that is not in local files below `root`."""
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs")
    if path not in READERS:
        yield (
            f"dataset_path is {shown(path)}, expected one of {', '.join(READERS)}, since nothing is fetched "
            "for a folder; correct it, and give the files as dataset_kwargs.data_files"
        )
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if not isinstance(files, dict) or not files:
        yield (
            f"dataset_kwargs.data_files is {shown(files)}, expected the file of each split; give it, such as "
            "{test: questions.json}"
        )
        return
    for key in kwargs or ():
        if key not in OF_READERS:
            yield f"dataset_kwargs: '{key}' is not known here.{nearest(key, OF_READERS)} Leave it out"
    for split, file in files.items():
        outside = not isinstance(file, str) or not file or Path(file).is_absolute()
        if outside or ".." in Path(file).parts or "\0" in file:
            yield (
                f"dataset_kwargs.data_files.{split} is {shown(file)}, expected a file below {root}; put it "
                "there, and give its path from there"
            )


def _of_scoring(config: dict[str, Any], scored: bool) -> Iterator[str]:
    """Faults: metrics that the harness does not have, and settings of the wrong kind."""
    import lm_eval.api.metrics  # noqa: F401, which fills the registry
    from lm_eval.api.registry import metric_registry

    for key in ("metric_list", "filter_list"):
        rows = config.get(key)
        if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            yield f"{key} is {shown(rows)}, expected a list of mappings; correct it"
            return
    for row in () if scored else config.get("metric_list") or ():
        name = row.get("metric")
        if not isinstance(name, str) or name not in metric_registry or row.get("hf_evaluate"):
            yield (
                f"metric_list: {shown(name)} is not a metric of the harness, and others are code that would "
                f"be fetched.{nearest(str(name), metric_registry)} Take one of the harness's, or {TRUST}"
            )
    generation = config.get("generation_kwargs")
    if generation is not None and not isinstance(generation, dict):
        yield f"generation_kwargs is {shown(generation)}, expected a mapping; correct it"
