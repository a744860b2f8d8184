"""Peak memory of a stream of eight tasks, in bytes of tensors: as much in the last task as in the second."""

import json

import pytest
import yaml
from contract import raw

from codyra_llm.config.recipe import load_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.experiment import run as runs
from codyra_llm.runtime.memory import Meter, ProcessPeak

TASKS = [f"T{number}" for number in range(8)]

# The peak of the eighth task over that of the second, at most, where a method holds something of every task
# while it trains: adapters, prompts, directions, or stored examples, which change the batches.
HOLDS_OLD_TASKS = {
    "pp": 1.7,
    "sapt": 1.8,
    "duallora": 1.4,
    "gainlora": 2.0,
    "olora": 1.15,
    "treelora_repo": 1.15,
    "inflora": 1.15,
    "keeplora": 1.05,
    "ogd": 1.2,
    "hidelora": 1.02,
    "color": 1.05,
    "replay": 1.15,
    "ilora": 1.01,
    "ilora_mixed": 1.15,
}
ONE_RUN = {"mtl"}  # trains on all tasks at once


@pytest.fixture(scope="module")
def eight_tasks(tmp_path_factory):
    """A folder of eight tasks whose examples have the same lengths."""
    root = tmp_path_factory.mktemp("eight")
    for number, task in enumerate(TASKS):
        (root / task).mkdir()
        rows = [
            {"prompt": f"Say {'ABC'[(i + number) % 3]}:", "answer": "ABC"[(i + number) % 3]}
            for i in range(16)
        ]
        for split in ("train", "eval", "test"):
            (root / task / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


def peaks(name: str, model, stream, folder, patch) -> list[int]:
    """The peak of every task of a run of this method, in bytes of the tensors that the run made."""
    recipe = raw(model, stream, folder / "run", name)
    recipe["data"] |= {"tasks": TASKS, "epochs": 1}
    recipe["eval"] = {"max_new_tokens": 2, "max_examples": 2, "when": "ends"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with Meter() as meter:
        patch.setattr(ProcessPeak, "restart", lambda self: setattr(meter, "peak", meter.live))
        patch.setattr(ProcessPeak, "read", lambda self: meter.peak)
        runs.run(load_recipe(folder / "recipe.yaml"))
    lines = (folder / "run" / "costs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["peak_bytes"] for line in lines]


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.trains and name not in ONE_RUN]
)
def test_the_peak_stays_where_it_was_in_the_second_task(name, eight_tasks, tiny_llama, tmp_path, monkeypatch):
    """The first task may take more, as codyra_drift's own samples do, or less, where nothing is old yet."""
    found = peaks(name, tiny_llama, eight_tasks, tmp_path, monkeypatch)
    assert len(found) == len(TASKS) and found[1] > 0
    assert max(found[2:]) <= HOLDS_OLD_TASKS.get(name, 1) * found[1], found
