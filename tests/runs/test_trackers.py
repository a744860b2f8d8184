"""Trackers get what the run folder gets, change nothing, and a run that goes on goes on in them."""

import json

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from helpers import tiny_recipe

from codyra_llm.config.sections import GeneralSection
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import observers, run
from codyra_llm.experiment.plan import plan
from codyra_llm.models import loading
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder


@pytest.fixture(scope="module")
def straight(tiny_llama, toy_stream, tmp_path_factory):
    """A run without trackers, and the recipe for others like it."""
    asked = tiny_recipe(
        tiny_llama,
        toy_stream,
        tmp_path_factory.mktemp("runs") / "run",
        checkpoint=False,
        eval__zero_shot=True,
    )
    return asked, run.run(asked)


def like(asked, out, *names):
    return asked.model_copy(update={"output": str(out), "trackers": list(names)})


@pytest.fixture
def told(monkeypatch):
    """What Accelerate's tracker `notebook` was told, all runs of it together: (values, step), "begin" and
    "end".
    """
    made: list = []

    class Notebook(GeneralTracker):
        name, requires_logging_directory, tracker = "notebook", True, None

        def __init__(self, run_name, logging_dir, **options):
            super().__init__()
            made.append(("begin", run_name, logging_dir))

        def store_init_configuration(self, values):
            made.append(("settings", values))

        def log(self, values, step=None, **options):
            made.append((values, step))

        def finish(self):
            made.append(("end",))

    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", kinds := dict(LOGGER_TYPE_TO_CLASS))
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", kinds)
    monkeypatch.setattr(observers, "LOGGER_TYPE_TO_CLASS", kinds)
    register_tracker_class(Notebook)
    return made


def expected(folder) -> list[tuple[dict, int]]:
    """From the run folder alone: 6 steps per task; scores stand at the step after which they were
    measured.
    """
    rows = [
        (
            {
                "train/loss": r.loss,
                "train/grad_norm": r.grad_norm,
                "train/lr": r.lr,
                "train/kappa": r.kappa,
                "train/task": 1 + (r.task == "TWO"),
            },
            r.step + 6 * (r.task == "TWO"),
        )
        for r in folder.log_rows
    ]
    scores = [
        ({f"{'score' if r.task in ('ONE', 'TWO') else 'general'}/{r.task}": r.score}, 6 * r.step)
        for r in folder.scores
    ]
    return sorted(rows + scores, key=lambda pair: (pair[1], "train/loss" not in pair[0]))


def heard(made: list) -> list[tuple[dict, int]]:
    """Without speeds, which no two runs share."""
    return [
        ({k: v for k, v in entry[0].items() if k != "train/tokens_per_second"}, entry[1])
        for entry in made
        if isinstance(entry[0], dict)
    ]


def test_it_hears_all_and_changes_nothing(straight, told, tmp_path):
    asked, other = straight
    folder = run.run(like(asked, tmp_path / "run", "notebook"))
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()
    assert folder.archive().lineage == other.archive().lineage
    assert heard(told) == expected(other) == expected(folder)
    assert told[0] == ("begin", "codyra-llm", str(folder.path / "trackers")) and told[-1] == ("end",)
    assert told[1][1]["optim.lr"] == 1e-2 and told[1][1]["data.tasks"] == "['ONE', 'TWO']"
    speeds = {entry[1]: entry[0]["train/tokens_per_second"] for entry in told if "train/loss" in entry[0]}
    assert speeds == {r.step + 6 * (r.task == "TWO"): r.tokens / r.seconds for r in folder.log_rows}


@pytest.mark.parametrize(
    "how, then", [("asked to stop", 12), ("killed", 11)]
)  # all agree to stop after the next step
def test_a_run_that_goes_on(how, then, straight, told, tmp_path, monkeypatch):
    """Each step once, in order, though after a kill some are trained again; the settings at the first begin
    alone.
    """
    asked, other = straight
    log = RunFolder.log

    def ends(folder, row):
        log(folder, row)
        if (row.task, row.step) == ("TWO", 4):
            if how == "killed":
                raise KeyboardInterrupt
            signals.ask("a test")

    with monkeypatch.context() as patch, pytest.raises((signals.Stopped, KeyboardInterrupt)):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, "log", ends)
        run.run(like(asked, tmp_path / "run", "notebook"))
    began = len(told)
    folder = run.run(like(asked, tmp_path / "run", "notebook"))
    assert heard(told) == expected(other)
    assert heard(told[began:])[0][1] == then
    assert [entry[0] for entry in told if isinstance(entry[0], str)] == [
        "begin",
        "settings",
        "end",
        "begin",
        "end",
    ]
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()


def test_two_kills_tell_no_step_twice(straight, told, tmp_path, monkeypatch):
    """The second before it has come as far as the first: the log alone knows no more of that."""
    asked, other = straight
    log = RunFolder.log
    for last in (6, 3):

        def ends(folder, row, last=last):
            log(folder, row)
            if (row.task, row.step) == ("TWO", last):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(RunFolder, "log", ends)
            run.run(like(asked, tmp_path / "run", "notebook"))
    run.run(like(asked, tmp_path / "run", "notebook"))
    assert heard(told) == expected(other)


def test_a_tracker_that_cannot_begin_is_one_sentence(straight, told, tmp_path, monkeypatch):
    asked, _ = straight
    kinds = observers.LOGGER_TYPE_TO_CLASS

    class Shut(kinds["notebook"]):
        name = "shut"

        def __init__(self, *given, **options):
            raise RuntimeError("no login\nTraceback")

    register_tracker_class(Shut)
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("weights were loaded"))
    with pytest.raises(
        Fault, match=r"^trackers: shut can't begin \(no login\); correct that, or leave it out$"
    ):
        run.run(like(asked, tmp_path / "run", "notebook", "shut"))
    assert told[-1] == ("end",) and not (tmp_path / "run" / "lease.json").exists()


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(
    straight, told, tmp_path, monkeypatch, caplog
):
    asked, other = straight
    kinds = observers.LOGGER_TYPE_TO_CLASS
    calls: list = []

    class Shaky(kinds["notebook"]):
        name = "shaky"

        def log(self, values, step=None, **options):
            calls.append(step)
            if step == 3:
                raise RuntimeError("[401] the server is away")

    register_tracker_class(Shaky)
    folder = run.run(like(asked, tmp_path / "run", "shaky", "notebook"))
    assert calls[-1] == 3 and heard(told) == expected(other)
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()
    assert caplog.text.count("shaky failed ([401] the server is away)") == 1


def test_what_is_not_there_is_refused_before_weights_load(straight, tmp_path, monkeypatch):
    asked, _ = straight
    monkeypatch.setattr(observers, "get_available_trackers", lambda: [])
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("weights were loaded"))
    for action in (run.run, lambda wanted: plan(wanted, None)):
        with pytest.raises(Fault) as found:
            action(like(asked, tmp_path / "run", "tensorbord", "comet_ml"))
        assert [m.partition(" Known")[0] for m in found.value.messages] == [
            "trackers: 'tensorbord' is not a tracker that Accelerate knows. Did you mean 'tensorboard'?",
            "trackers: 'comet_ml' is not installed; pip install comet-ml, or leave it out",
        ]
    assert not (tmp_path / "run").exists()


def test_tensorboard(straight, tmp_path, monkeypatch):
    """Read back by TensorBoard's own reader."""
    pytest.importorskip("tensorboard", reason="needs codyra-llm[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked, _ = straight
    asked = asked.model_copy(update={"general": GeneralSection(data="mini")})
    folder = run.run(like(asked, tmp_path / "run", "tensorboard"))
    files = EventAccumulator(str(folder.path / "trackers" / "codyra-llm"))
    files.Reload()
    found = {
        name: [(event.step, event.value) for event in files.Scalars(name)] for name in files.Tags()["scalars"]
    }
    wanted: dict = {}
    for values, step in expected(folder):
        for name, value in values.items():
            wanted.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    assert len(found.pop("train/tokens_per_second")) == 12 and found == wanted
    assert json.loads((folder.path / "recipe.json").read_text())["trackers"] == ["tensorboard"]
