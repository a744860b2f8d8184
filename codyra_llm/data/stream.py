"""The tasks of a recipe in order, and their records by split."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from codyra_llm.config.benchmark import load_benchmark
from codyra_llm.config.sections import FILE
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.data import sources
from codyra_llm.data.records import SPLITS
from codyra_llm.data.rendering import Render, plain

if TYPE_CHECKING:
    from codyra_llm.config.sections import DataSection


ABSENT = "no file"


class Stream:
    """The tasks of a recipe and their records, read once."""

    def __init__(self, data: "DataSection", root: Path, render: Render = plain):
        """`render`: writes the chats of tasks that are chats."""
        assert isinstance(data.tasks, list), "resolved() names those of an order"
        self.data, self.root, self.tasks, self.render = data, root, data.tasks, render
        self.benchmark = load_benchmark(data.benchmark)
        self._records: dict[tuple[str, str], list[dict]] = {}

    @cached_property
    def epochs(self) -> list[int]:
        """By task, in the order of the stream."""
        given = self.data.epochs
        assert given is not None, "resolved() fills in the tasks' own"
        return [given if isinstance(given, int) else given[task] for task in self.tasks]

    def _read(self, task: str, split: str) -> list[dict]:
        if (task, split) not in self._records:
            spec = self.benchmark.task(task)
            self._records[task, split] = sources.read(self.root, task, spec, split, self.render)
        return self._records[task, split]

    def records(self, index: int, split: str) -> list[dict]:
        """Records of task `index`. The training split is limited to `max_train_examples`. The eval split is
        without the prompts that it shares with test, since settings are chosen on it; raises Fault where none
        is left."""
        name = self.tasks[index]
        rows = self._read(name, split)
        if split == "train":
            return rows[: self.data.max_train_examples]
        if split == "eval":
            of_test = {row["prompt"] for row in self._read(name, "test")}
            rows = [row for row in rows if row["prompt"] not in of_test]
            if not rows:
                raise self._nothing_but_test(name)
        return rows

    def _nothing_but_test(self, name: str) -> Fault:
        """The fault of a task whose eval split has only prompts of test."""
        spec = self.benchmark.task(name)
        own, test = (sources.place(self.root, name, spec, split) for split in ("eval", "test"))
        return Fault(
            f"{own} has no prompt that {Path(test).name} lacks, and settings are not chosen on test; "
            f"give an eval split of its own, or a {FILE} that names files for train and test alone"
        )

    def remarks(self) -> list[str]:
        """Remarks on files that are read otherwise than their names say."""
        return [
            remark
            for task in self.tasks
            for remark in sources.remarks(self.root, task, self.benchmark.task(task))
        ]

    def extra(self, name: str) -> list[dict]:
        """The training records of a set that is not one of the tasks, e.g. Lima."""
        return self._read(name, "train")

    def hashes(self) -> dict[str, str]:
        """sha256 of the tasks' data by split: of the file in TRACE's layout; of declared sources, which need
        not be files, of the examples that were read from them."""
        return dict(self.hash_of(task, split) for task in self.tasks for split in SPLITS)

    def hash_of(self, task: str, split: str) -> tuple[str, str]:
        """A name for a split of a task, or of another set, and its hash."""
        if not self.benchmark.task(task).declared:
            file = self.root / task / f"{split}.json"
            return f"{task}/{split}.json", file_sha256(file) if file.is_file() else ABSENT
        try:
            rows = self._read(task, split)
        except Fault:  # of a split that is not used: a fault in another one was raised before
            return f"{task}/{split}", ABSENT
        return f"{task}/{split}", hashlib.sha256(json.dumps(rows).encode()).hexdigest()
