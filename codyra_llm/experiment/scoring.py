"""The scores of one stage of a run, or of a checkpoint: on tasks, and of general ability."""

import time
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from codyra_llm.core.errors import Attempts, Fault
from codyra_llm.evaluate.statistics import blank, commonest, summarise_all
from codyra_llm.experiment.experiment import Experiment
from codyra_llm.experiment.setup import PROBE_TOKENS, Setup
from codyra_llm.runtime import signals
from codyra_llm.runtime.forecast import Piece
from codyra_llm.runtime.launch import is_first, of_first, say, wait
from codyra_llm.store import observer
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import GENERAL, TASK, FloorRow, ScoreRow, Stage


class Questions(NamedTuple):
    """A set of prompts that is answered here, without the harness."""

    name: str
    records: list[dict]
    new: int  # the most tokens of an answer
    number: int | None  # of the task in the stream; None: of general ability

    @property
    def prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records]

    @property
    def answers(self) -> list[str]:
        """The right ones."""
        return [record["answer"] for record in self.records]


def note_floor(setup: Setup, folder: RunFolder) -> None:
    """Add the missing floors to the folder: for each task the score of giving its most frequent training
    answer, without a model. A method that reads no training data has none, since the data may have no
    training split."""
    if not (setup.method.trains or setup.method.old_data):
        return
    known = {row.task for row in folder.floor}
    rows = []
    for index, task in enumerate(setup.recipe.tasks):
        if task not in known:
            rows.append(_floor(setup, index))
    if rows:
        folder.add_floor(rows)


def _floor(setup: Setup, index: int) -> FloorRow:
    """The scores of task `index` if every prompt gets the most frequent answer among the task's training
    examples, in a tie the first; so where all answers differ, the first one."""
    most = commonest([record["answer"] for record in setup.stream.records(index, "train")])
    assert most, "prepare() refuses a task without training examples"
    questions = Questions(setup.recipe.tasks[index], setup.test(index), setup.new_tokens(index), index)
    benchmark, given = setup.stream.benchmark, [most[0]] * len(questions.records)
    metrics = summarise_all(benchmark.score(questions.name, questions.prompts, given, questions.answers))
    headline = benchmark.headline(questions.name, setup.recipe.data.protocol)
    return FloorRow(questions.name, *most, headline, metrics[headline]["mean"], metrics)


def evaluate(experiment: Experiment, stage: Stage) -> None:
    """Score the model of `stage` on everything that the recipe asks for and that has no row yet."""
    measure(experiment, stage, *asked(experiment.setup, stage))


def asked(setup: Setup, stage: Stage) -> tuple[range, bool]:
    """The tasks to score at `stage`, and whether to measure general ability."""
    at_an_end = stage.step in (0, len(setup.recipe.tasks))
    return _tasks_asked(setup, stage), at_an_end or setup.recipe.general.when == "each"


def _tasks_asked(setup: Setup, stage: Stage) -> range:
    """The tasks to score at `stage`, by `eval.when`, `eval.tasks` and `eval.zero_shot`."""
    count, wanted = len(setup.recipe.tasks), setup.recipe.eval
    if stage.step == 0:
        return range(count) if wanted.zero_shot or not setup.method.trains else range(0)
    if wanted.when == "ends" and stage.step < count:
        return range(stage.index, stage.step)
    return range(count if wanted.tasks == "all" else stage.step)


def pieces(
    setup: Setup, stage: Stage, tasks: Iterable[int], general: bool, done: set[str]
) -> dict[Piece, float]:
    """Evaluations still to run at `stage`, without those in `done`, each with its number of prompts (1 for
    general ability by the harness)."""
    due: dict[Piece, float] = {}
    for questions in _due(setup, tasks, general):
        if questions.name not in done:
            due[Piece("answer", questions.name, stage.step)] = len(questions.records)
    abilities = setup.suite if general else {}
    suite = {Piece("general", name, stage.step): 1.0 for name in abilities if name not in done}
    # Loading the model takes its own time: once for the prompts answered here, and once for the harness.
    loads = {}
    if due:
        loads[Piece("load", "tasks", stage.step)] = 1.0
    if suite:
        loads[Piece("load", "suite", stage.step)] = 1.0
    return loads | due | suite


def measure(experiment: Experiment, stage: Stage, tasks: Iterable[int], general: bool) -> None:
    """Score the model of `stage` on these `tasks` and, with `general`, on general ability, where the folder
    has no row of that stage yet."""
    setup, tasks = experiment.setup, list(tasks)
    done = of_first(lambda: experiment.store.tasks_scored(stage))
    observer.expected(pieces(setup, stage, tasks, general, done))
    pending = [questions for questions in _due(setup, tasks, general) if questions.name not in done]
    if pending:
        _measure_tasks(experiment, stage, pending)
    names = [name for name in setup.suite if general and name not in done]
    if names:
        _measure_general(experiment, stage, names)
    wait()


def _due(setup: Setup, tasks: Iterable[int], general: bool) -> list[Questions]:
    """Everything that is answered here: the test prompts of `tasks`, and the probes of general ability."""
    names = setup.recipe.tasks
    due = [Questions(names[i], setup.test(i), setup.new_tokens(i), i) for i in tasks]
    if general:
        due += [Questions(name, records, PROBE_TOKENS, None) for name, records in setup.probes.items()]
    return due


def _measure_tasks(experiment: Experiment, stage: Stage, pending: list[Questions]) -> None:
    """Answer the prompts in all processes of the launch, and score the answers in the first."""
    setup, benchmark = experiment.setup, experiment.setup.stream.benchmark
    observer.stage_begins(stage, Piece("load", "tasks", stage.step))
    with experiment.answering(stage) as ask:
        for questions in pending:
            signals.check()
            observer.at(f"answers to {questions.name} after {stage.after}")
            observer.stage_begins(stage, Piece("answer", questions.name, stage.step))
            began = time.perf_counter()
            prompts, number = questions.prompts, questions.number
            if number is not None:
                prompts = setup.method.prompts_at_test(setup.stream, setup.encoder, number, prompts)
            given = ask(prompts, questions.new, number)
            predictions = [answer.text for answer in given]
            if number is not None:
                predictions = [setup.method.parse_answer(questions.name, text) for text in predictions]
            if is_first():
                scores = benchmark.score(questions.name, questions.prompts, predictions, questions.answers)
                headline = benchmark.headline(questions.name, setup.recipe.data.protocol)
                cut = [answer.cut for answer in given].count(True)
                row = _score_row(questions, stage, scores, headline, predictions, cut)
                experiment.store.add_scores(row, _with_scores(questions, predictions, scores))
                _say(row, time.perf_counter() - began)


def _measure_general(experiment: Experiment, stage: Stage, names: list[str]) -> None:
    """Measure these tasks of general ability by lm-evaluation-harness."""
    from codyra_llm.evaluate import harness  # lm_eval is an extra

    setup, recipe = experiment.setup, experiment.recipe
    observer.stage_begins(stage, Piece("load", "suite", stage.step))
    tried = Attempts()
    for name in names:  # their data, which may be missing, before the model
        tried(getattr, setup.suite[name], "tasks")
    if tried.faults:
        raise Fault(*tried.faults)
    model, conditions = setup.load_stage(experiment.models, stage, experiment.acc.device)
    condition = conditions and partial(conditions, task=None)
    front = setup.method.prompt_positions(stage.step) if stage.step else 0
    lm = harness.InMemoryLM(
        experiment.acc,
        model,
        setup.tokenizer,
        recipe.eval.batch_tokens,
        condition,
        setup.encoder.ends,
        front,
    )
    for name in names:
        signals.check()
        observer.at(f"general ability {name} after {stage.after}")
        observer.stage_begins(stage, Piece("general", name, stage.step))
        began = time.perf_counter()
        found = harness.measure(lm, setup.suite[name], recipe.general, recipe.data.chat_template)
        if is_first():
            folder = experiment.store.path / "lm_eval"
            harness.write(folder, stage.folder, lm, recipe.general, found)
            row = found.row(stage)
            experiment.store.add_scores(row, found.predictions)
            _say(row, time.perf_counter() - began)


def _score_row(
    questions: Questions,
    stage: Stage,
    scores: dict[str, list[float]],
    headline: str,
    predictions: list[str],
    cut: int,
) -> ScoreRow:
    """The row of these scores, which are by metric and in the order of the questions, as the `predictions`
    are; `cut`: how many of these were cut."""
    metrics, most = summarise_all(scores), commonest(predictions)
    return ScoreRow(
        after=stage.after,
        step=stage.step,
        task=questions.name,
        kind=GENERAL if questions.number is None else TASK,
        headline=headline,
        score=metrics[headline]["mean"],
        metrics=metrics,
        empty=blank(predictions),
        commonest=most and most[1],
        cut=cut,
    )


def _with_scores(questions: Questions, predictions: list[str], scores: dict[str, list[float]]) -> list[dict]:
    """A line for each question: prompt, prediction, answer, and its score by each metric."""
    rows = zip(questions.prompts, predictions, questions.answers, strict=True)
    lines = []
    for i, (prompt, prediction, answer) in enumerate(rows):
        own = {name: values[i] for name, values in scores.items()}
        lines.append({"prompt": prompt, "prediction": prediction, "answer": answer, **own})
    return lines


def _say(row: ScoreRow, seconds: float) -> None:
    score = "no example" if row.score is None else f"{row.score:.1f}"
    say(f"after {row.after}: {row.task} {score}  ({row.headline}, {seconds:.0f} s)")
