"""Tasks of lm-evaluation-harness on files of a folder, within bounds: the folder's templates and patterns run
in a process with limits (core/foreign.py), and any other error in one of its examples becomes a sentence.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from codyra_llm.core import foreign
from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import shown

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

PATTERNS = ("regex_pattern", "regexes_to_ignore")
CORRECT = "correct its task file or its data, or leave it out"


@contextmanager
def bounded_templates(name: str) -> Iterator[None]:
    """Within this block `foreign.write_document` renders the harness's templates. Faults name the task."""
    from lm_eval import utils

    def write(template: str, doc: dict) -> str:
        try:
            return foreign.write_document(template, dict(doc))
        except foreign.Failed as error:
            start = " ".join(template.split())[:80]
            raise Fault(
                f"general.tasks: '{name}' has the template '{start}', which fails ({error.reason}); {CORRECT}"
            ) from None

    before, utils.apply_template = utils.apply_template, write
    try:
        yield
    finally:
        utils.apply_template = before


@contextmanager
def telling(name: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what the harness raises at an example or a key of a task, except `others`, into a Fault that names
    the task."""
    try:
        yield
    except (Fault, *others):
        raise
    except Exception as error:  # KeyError, TypeError, jinja2's, pyarrow's: each where the harness stumbles
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise Fault(
            f"general.tasks: '{name}' can't be asked or scored ({kind}: {reason}); {CORRECT}"
        ) from error


def bind(task: "ConfigurableTask", name: str) -> "ConfigurableTask":
    """The same task, changed: its patterns run within limits, and errors at its examples become Faults."""
    # The harness calls each of a pipeline's `filters` to make the filter, as it would a class.
    for pipeline, given in zip(task._filters, task.config.filter_list or (), strict=False):
        cast(Any, pipeline).filters = [
            partial(_Filter, name, function) if function.keys() & set(PATTERNS) else made
            for made, function in zip(pipeline.filters, given["filter"], strict=True)
        ]
    for metric, settings in task._metric_fn_kwargs.items():
        patterns = settings.pop("regexes_to_ignore", None)
        if patterns:
            task._metric_fn_list[metric] = partial(_ignoring, name, patterns, task._metric_fn_list[metric])
    task.build_all_requests = _within_telling(name, task.build_all_requests)
    task.process_results = _within_telling(name, task.process_results)
    return task


def _within_telling(name: str, step: Callable) -> Callable:
    """`step` within `telling`."""

    def taken(*args: Any, **settings: Any) -> Any:
        with telling(name):
            return step(*args, **settings)

    return taken


class _Filter:
    """A filter of the harness with a pattern that the folder brings."""

    def __init__(self, task: str, given: dict[str, Any]):
        self.task, self.name = task, given["function"]
        self.settings = {key: value for key, value in given.items() if key != "function"}

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list]:
        of_choices = self.name == "multi_choice_regex"  # which alone looks at the example
        items = [(list(resp), dict(doc) if of_choices else {}) for resp, doc in zip(resps, docs, strict=True)]
        with _patterns(self.task, self.settings):
            found = foreign.filtered(self.name, self.settings, items)
        return [json.loads(one) for one in found]


def _ignoring(
    task: str,
    patterns: Sequence[str],
    metric: Callable,
    references: Sequence[str],
    predictions: Sequence[str],
    **settings: Any,
) -> Any:
    """The metric of texts without what the patterns match."""
    with _patterns(task, patterns):
        left = foreign.without(patterns, [*references, *predictions])
    texts = [json.loads(one) for one in left]
    split = len(references)
    return metric(references=texts[:split], predictions=texts[split:], **settings)


@contextmanager
def _patterns(task: str, given: object) -> Iterator[None]:
    """Turn a pattern that fails, or takes too long, into a Fault that names the task."""
    try:
        yield
    except foreign.Failed as error:
        raise Fault(
            f"general.tasks: '{task}' has a pattern that fails ({error.reason}; {str(given)[:100]}); "
            f"{CORRECT}"
        ) from None


# What stands in for a model's response, by kind of task; the text is like an answer that does not end.
RESPONSES = {
    "loglikelihood": (-1.0, False),
    "loglikelihood_rolling": -1.0,
    "multiple_choice": (-1.0, False),
    "generate_until": f"The answer is (A), 4.5, since {'a' * 50} {'1' * 50} {' ' * 50}!",
}


def try_first(task: "ConfigurableTask", name: str, positions: int | None) -> None:
    """Ask and score the first example with a made-up response in place of a model's. Raises Fault if that
    fails, if its right answer is none of its choices, if no metric gives it a score, if the task samples, or
    if its longest answer takes all `positions` of the model."""
    with _random_state_kept(), telling(name):
        shots = task.config.num_fewshot or 0
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(0)
        doc = task.eval_docs[0]
        context = task.fewshot_context(doc, num_fewshot=shots)
        made: Any = task.construct_requests(doc=doc, ctx=context, metadata=(name, 0, 1))
        requests = made if isinstance(made, list) else [made]
        for request in requests:
            request.resps = [RESPONSES[str(task.OUTPUT_TYPE)]]
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
            refuse_label(name, task.doc_to_target(doc), task.doc_to_choice(doc))
        if task.OUTPUT_TYPE == "generate_until":
            _refuse_generation(name, cast(Any, requests[0]).args[1], positions)
        for pipeline in task._filters:
            pipeline.apply(requests)
        found = {}
        for filtered in requests[0].filtered_resps:
            results = [request.filtered_resps[filtered] for request in requests]
            found = task.process_results(doc, results)
            for metric, value in found.items():
                task.aggregation()[metric]([value])
        better = task.higher_is_better()
        if not any(is_score(value, better.get(metric)) for metric, value in found.items()):
            raise Fault(no_score(name, found))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """What is drawn within this block changes nothing afterwards, also if it raises."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def refuse_label(name: str, target: Any, choices: Sequence[str]) -> None:
    """Raises Fault where an example's right answer, a number from 0 or one of the choices themselves, is none
    of them: the harness counts each answer to it as wrong, without a word."""
    texts = [choice.strip() for choice in choices]
    for one in target if isinstance(target, list) else [target]:
        known = one.strip() in texts if isinstance(one, str) else 0 <= one < len(texts)
        if not known:
            expected = f"0 to {len(texts) - 1}, or one of {shown(texts)}"
            raise Fault(
                f"general.tasks: '{name}' has an example whose right answer is {shown(one)}, expected "
                f"{expected}; {CORRECT}"
            )


def is_score(value: Any, higher_is_better: bool | None) -> bool:
    """Whether a metric's value for one example is a score of it: a number from 0 to 1, or a list of such, of
    which more is better. Perplexity is not one. Nor are BLEU and F1 over all examples: their value for one
    example is a pair of texts or labels."""
    if isinstance(value, list):
        return all(is_score(one, higher_is_better) for one in value)
    return isinstance(value, Real) and 0 <= float(value) <= 1 and higher_is_better is not False


def no_score(name: str, metrics: Iterable[str]) -> str:
    """The fault of a task by whose metrics examples have no score."""
    return (
        f"general.tasks: '{name}' is measured by {', '.join(metrics)}, which gives an example no score of 0 "
        "to 1; add a metric that does, such as acc or exact_match, or leave it out"
    )


def _refuse_generation(name: str, given: dict[str, Any], positions: int | None) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, 256))
    if wanted["do_sample"]:
        raise Fault(
            f"general.tasks: '{name}' samples its answers, and only greedy tasks are measured; leave it out"
        )
    if positions and wanted["max_gen_toks"] >= positions:
        raise Fault(
            f"general.tasks: '{name}' answers with up to {wanted['max_gen_toks']} tokens, and the model "
            f"takes {positions} in all; leave it out"
        )
