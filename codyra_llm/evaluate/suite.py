"""The tasks of general ability: those of lm-evaluation-harness, with the hub's data or local files."""

import csv
import logging
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codyra_llm.benchmarks.trace import general as shipped
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import expanded
from codyra_llm.evaluate.bounded_tasks import bind, bounded_templates, telling, try_first
from codyra_llm.evaluate.task_files import included, read_task, refuse
from codyra_llm.runtime.quiet import log_level, without_data_bars

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from lm_eval.api.task import ConfigurableTask

    from codyra_llm.config.sections import GeneralSection


NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}

# BBH's answer up to the end of its line, without a full stop. The harness's own filter, kept here as the
# second one, requires any character after the answer: of "the answer is (A)" it takes "(A".
BBH_FILTERS = [
    {
        "name": "whole-answer",
        "filter": [
            {"function": "regex", "regex_pattern": r"(?m)(?<=the answer is )(.+?)\.?\s*$"},
            {"function": "take_first"},
        ],
    },
    {
        "name": "get-answer",
        "filter": [
            {"function": "regex", "regex_pattern": "(?<=the answer is )(.*)(?=.)"},
            {"function": "take_first"},
        ],
    },
]

HUB = {  # the harness's own tasks: TRACE's six, and IFEval
    "mmlu": {"group": "mmlu", "include": "mmlu/default/mmlu_*.yaml", "num_fewshot": 5},
    "gsm8k_cot": {"include": "gsm8k/gsm8k-cot.yaml"},
    "bbh": {"group": "bbh", "include": "bbh/cot_fewshot/[a-z]*.yaml", "filter_list": BBH_FILTERS},
    "boolq": {"include": "super_glue/boolq/default.yaml"},
    "piqa": {"include": "piqa/piqa.yaml"},
    "tydiqa_goldp": {"group": "tydiqa_goldp", "include": "tydiqa/tydiqa_goldp_*.yaml"},
    "ifeval": {"include": "ifeval/ifeval.yaml"},
}


@dataclass(frozen=True)
class Ability:
    """One task of the harness, or a group of them. `configs`: the harness's configuration of each part, by
    name. `local`: it comes from a folder, which may hold anything, rather than from the hub. `trusted`: code
    that its files name may run."""

    name: str
    configs: dict[str, dict[str, Any]]
    local: bool = False
    trusted: bool = False

    @property
    def is_group(self) -> bool:
        return list(self.configs) != [self.name]

    @property
    def files(self) -> list[Path]:
        """The local files that it reads; none where its data is the hub's."""
        return [
            Path(file)
            for config in self.configs.values()
            for file in ((config.get("dataset_kwargs") or {}).get("data_files") or {}).values()
        ]

    @cached_property
    def tasks(self) -> dict[str, "ConfigurableTask"]:
        """The harness's tasks by name, their data read."""
        return {part: self._task(part) for part in self.configs}

    def bounded(self) -> AbstractContextManager[None]:
        """Within this block the templates of a folder have limits."""
        return bounded_templates(self.name) if self.local and not self.trusted else nullcontext()

    def try_out(self, positions: int | None) -> None:
        """Ask and score the first example of a folder's task (of a group: of its first part), without a
        model. Raises Fault where that fails."""
        if self.local:
            with quiet(), self.bounded():
                try_first(self._task(next(iter(self.configs))), self.name, positions)

    def _task(self, part: str) -> "ConfigurableTask":
        if part not in self._made:
            self._made[part] = self._read(part)
        return self._made[part]

    @cached_property
    def _made(self) -> dict[str, "ConfigurableTask"]:
        return {}

    def _read(self, part: str) -> "ConfigurableTask":
        from datasets.exceptions import DatasetsError
        from lm_eval.api.task import ConfigurableTask

        config = deepcopy(self.configs[part])
        try:
            with quiet(), self.bounded():
                if not self.local:
                    return ConfigurableTask(config=config)
                with telling(self.name, OSError, DatasetsError):
                    task = ConfigurableTask(config=config)
                return task if self.trusted else bind(task, self.name)
        except (OSError, DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
            remedy = "check the network and HF_HUB_OFFLINE, or give a folder as general.data"
            if self.files:
                remedy = "correct the files"
            raise Fault(
                f"general.tasks: the data of '{self.name}' can't be read ({reason}); {remedy}"
            ) from None


def find(section: "GeneralSection") -> dict[str, Ability]:
    """The tasks that a recipe's `general` asks for, by name. Raises one Fault with everything that is wrong.

    If the recipe names no `tasks`, these are all of the hub's, or all whose files are in the folder.
    """
    if find_spec("lm_eval") is None:
        raise Fault(
            "general.data: general ability is measured by lm-evaluation-harness, which is not installed; "
            "install codyra-llm[general], or set general.data to mini or null"
        )
    known, root = _offered(section)
    # Of the two variants of IFEval the default is the one that this machine can run.
    unused = "ifeval_no_punkt" if section.data == "hub" or has_punkt() else "ifeval"
    asked = section.tasks
    if asked is None:
        asked = [name for name in known if name != unused]
    found, faults = {}, []
    for name in asked:
        if name not in known:
            faults.append(
                f"general.tasks: '{name}' is not a task of general.data '{section.data}'."
                f"{nearest(name, known)} Known: {', '.join(known)}"
            )
            continue
        try:
            configs = parts(known[name], root, section.trust_code)
        except Fault as fault:
            faults += fault.messages
            continue
        ability = Ability(name, configs, root is not None, section.trust_code)
        missing = _missing(ability)
        if not missing:
            found[name] = ability
        elif section.tasks is not None:  # else the task is left out
            faults += missing
    if not (found or faults):
        faults.append(
            f"general.data: '{section.data}' holds the files of no task; they are read by "
            f"{', '.join(known)}, as docs/evaluation.md says"
        )
    if faults:
        raise Fault(*faults)
    return found


def _offered(section: "GeneralSection") -> tuple[dict[str, Any], Path | None]:
    """The tasks that there are, by name, as `parts` takes them, and the folder that they read (None: the
    hub). Raises Fault where that is not a folder."""
    if section.data == "hub":
        return HUB, None
    assert section.data is not None, "without data nothing is measured"
    root = Path(expanded(section.data))
    if not root.is_dir():
        raise Fault(
            f"general.data: there is no folder '{section.data}'; give a folder of general-ability files, "
            "hub, mini or null"
        )
    folders = (Path(shipped.__path__[0]), root)
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}, root


def parts(spec: dict | Path, root: Path | None, trusted: bool = False) -> dict[str, dict[str, Any]]:
    """The harness's configurations of one task or group: those that `include` names in the harness's own
    folder of tasks, with the rest of `spec` (a task YAML) over them. Paths in `data_files` are below `root`;
    {dataset_name} in them is the name that the harness has for the part. Raises Fault for a task file of the
    folder that is wrong, or, unless it is `trusted`, that runs code."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    harness = Path(tasks.__file__).parent
    with _no_download(root is not None):
        ours = isinstance(spec, dict) or spec.is_relative_to(shipped.__path__[0])
        own = dict(spec) if isinstance(spec, dict) else read_task(spec, ours or trusted)
        pattern = own.pop("include", None)
        bases = [{}] if pattern is None else [load_yaml(file) for file in included(spec, pattern, harness)]
    out = {}
    for base in bases:
        config = {key: value for key, value in {**base, **own}.items() if key not in ("tag", "group")}
        lacking = sorted({"task", "dataset_path"} - config.keys())
        if lacking:
            raise Fault(
                f"general.data: {spec} is not a task of lm-evaluation-harness (it lacks "
                f"{', '.join(lacking)}); write one, or take the file out of the folder"
            )
        if root is not None:
            if not (ours or trusted):
                refuse(spec, own, config, root)
            config |= _local(config, root)
        out[config["task"]] = config
    return out


def drawn(name: str, sizes: dict[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """The positions of the examples to take from each part: all, or `limit` over all parts together. The draw
    depends on (seed, name) alone."""
    pool = [(part, i) for part, n in sizes.items() for i in range(n)]
    if limit is not None and limit < len(pool):
        pool = random.Random(f"{seed} {name}").sample(pool, limit)
    out: dict[str, list[int]] = {}
    for part, i in sorted(pool):
        out.setdefault(part, []).append(i)
    return out


def without_punkt(docs: "Dataset") -> "Dataset":
    """IFEval's prompts whose checks do without nltk's data."""
    return docs.filter(lambda doc: not NEEDS_PUNKT & set(doc["instruction_id_list"]))


def _local(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """The keys of a folder's task with which the harness reads its data below `root`."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if not files:  # of a trusted file, whose code makes the examples
        return {}
    part = str(config.get("dataset_name"))
    kwargs["data_files"] = {
        split: str(root / path.replace("{dataset_name}", part)) for split, path in files.items()
    }
    if config["dataset_path"] == "csv" and all(map(os.path.isfile, kwargs["data_files"].values())):
        kwargs["features"] = _texts(next(iter(kwargs["data_files"].values())))
    return {"dataset_name": None, "dataset_kwargs": kwargs}


def _texts(file: str) -> "Features":
    """Every column of a CSV file as text, so that the choice '0.50' does not become 0.5."""
    from datasets import Features, Value

    with open(file, encoding="utf-8", newline="") as lines:
        return Features({column: Value("string") for column in next(csv.reader(lines))})


def _missing(ability: Ability) -> list[str]:
    """Faults for what a task reads that is not there: its files, and nltk's data."""
    faults = []
    absent = [file for file in ability.files if not file.is_file()]
    if absent:
        more = f", nor are {len(absent) - 1} more" if len(absent) > 1 else ""
        faults.append(
            f"general.tasks: '{ability.name}' reads {absent[0]}, which is not there{more}; add it, or leave "
            "the task out"
        )
    if ability.name == "ifeval" and ability.files and not has_punkt():
        faults.append(
            "general.tasks: 'ifeval' needs nltk's punkt_tab, which is not there; run `python -m "
            "nltk.downloader punkt_tab`, or take ifeval_no_punkt"
        )
    return faults


def has_punkt() -> bool:
    """Whether nltk's sentence splitter is installed; IFEval's checks that count sentences need it."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block the harness does not warn of what is intended here, such as a model in memory, and
    shows no progress bars.
    """
    with (
        log_level("lm_eval", logging.ERROR),
        log_level("datasets", logging.CRITICAL),  # what it can't read becomes a Fault
        without_data_bars(),
    ):
        yield


@contextmanager
def _no_download(offline: bool) -> Iterator[None]:
    """Within this block nothing is downloaded, if `offline`. The harness downloads punkt_tab when IFEval is
    imported in the process with LOCAL_RANK 0, so this process sets another rank."""
    if not offline:
        yield
        return
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
