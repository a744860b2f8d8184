"""General ability: lm-evaluation-harness on a model in memory, its requests cut by tokens and dealt to the
ranks.

Tokenisation, prompts, filters and scores are the harness's; how the model is called is ours: the head runs
where a continuation is predicted and nowhere else, answers that are done leave their batch, and methods that
don't merge get their condition.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codyra_llm.core.errors import Fault
from codyra_llm.core.foreign import Failed
from codyra_llm.evaluate.bounded_tasks import is_score, no_score, refuse_label
from codyra_llm.evaluate.budget import PrefixGroup, Share, batches, budget, by_prefix
from codyra_llm.evaluate.generate import generated, prompt_logits
from codyra_llm.evaluate.statistics import blank, commonest
from codyra_llm.evaluate.suite import Ability, drawn, quiet
from codyra_llm.methods.base import Condition
from codyra_llm.models.ends import without_end
from codyra_llm.models.tokenizer import DATE, render_chats, template_fault
from codyra_llm.runtime import heartbeat
from codyra_llm.store.rows import GENERAL, ScoreRow, Stage

if TYPE_CHECKING:
    from codyra_llm.config.sections import GeneralSection


MOST_LOGITS = 2**26  # numbers that one forward pass may return
STOP_TOKENS = 16  # the last tokens of an answer in which a stop sequence is looked for
# By task the 'metric,filter' of its score; of other tasks the harness's first. TyDiQA's is TRACE's. GSM8K's
# first filter wants a character after the number, so that of "The answer is 36" it takes 3.
HEADLINES = {"tydiqa_goldp": "f1,none", "gsm8k_cot": "exact_match,flexible-extract"}
NORMAL = 1.96  # standard errors in half of a 95 % interval


Conditions = Callable[[list[list[int]]], Condition]


class InMemoryLM(HFLM):
    """A model in memory with the interface that the harness expects. Every rank gets all requests, answers
    its share, and returns all answers.

    tokens: the most tokens of one forward pass, prompts and answers together, or None for what fits. ends:
    the tokens that end an answer, by default only EOS. front: the positions that conditions' prefixes take.
    """

    def __init__(
        self,
        acc: Accelerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int | None = None,
        conditions: Conditions | None = None,
        ends: Collection[int] | None = None,
        front: int = 0,
    ):
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                chat_template_args={"date_string": DATE},
            )
        self._max_length = self.max_length - front
        self.reads = tokenizer
        self.acc, self.conditions, self.held = acc, conditions, budget(acc, model, tokens)
        self.ends = {tokenizer.eos_token_id} if ends is None else ends

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the model's template writes it in training; without the system's message where the
        template takes none. Raises Fault where it writes neither."""
        plain = [message for message in chat_history if message["role"] != "system"]
        tried = [chat_history, plain] if len(plain) < len(chat_history) else [plain]
        tokenizer, fault = self.reads, ""
        for chat in tried:
            try:
                return render_chats(
                    tokenizer, [chat], add_generation_prompt, go_on=not add_generation_prompt
                )[0]
            except Failed as error:
                fault = template_fault(tokenizer.name_or_path, error, chat[-1]["content"])
                if error.stopped:
                    break
        raise Fault(fault)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Per (_, context, continuation): Σ log p of the continuation's tokens, and whether each is the
        likeliest.

        Requests that are equal but for their last token, such as those of the letters A to D, share a forward
        pass: the last token is only predicted, not read.
        """
        sharing: dict[tuple[int, ...], list[int]] = {}  # by what is read, the numbers of the requests
        for i, (_, context, continuation) in enumerate(requests):
            read = (context + continuation)[:-1]
            sharing.setdefault(tuple(read[-self.max_length :]), []).append(i)
        rows = list(map(list, sharing))
        numbers = list(sharing.values())
        longest = max(len(continuation) for _, _, continuation in requests)
        most = max(1, MOST_LOGITS // (longest * self.model.config.vocab_size))  # rows of a forward pass
        found = []

        def answer(chosen: list[int]) -> Tensor:
            context = requests[numbers[chosen[0]][0]][1]
            condition = self.conditions and self.conditions([context])
            return prompt_logits(self.model, [rows[r] for r in chosen], longest, condition)

        share = self._share(rows, 1, 1 if self.conditions else most)
        for chosen, logits in share.answered(self.held, answer):
            for r, own in zip(chosen, logits, strict=True):
                logs = own.float().log_softmax(-1)
                for i in numbers[r]:
                    target = torch.tensor(requests[i][2], device=logs.device)
                    last = logs[-len(target) :]
                    log_likelihood = last.gather(1, target[:, None]).sum().item()
                    is_greedy = bool((last.argmax(-1) == target).all())
                    found.append((i, (log_likelihood, is_greedy)))
        return self._gathered(found, len(requests))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, each cut at its first stop sequence. Raises Fault for a task that samples."""
        eos = self.tokenizer.eos_token_id
        # By the most new tokens and the stop sequences, the numbers of the requests.
        kinds: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if wanted["do_sample"]:
                raise Fault(
                    f"general.tasks: '{request.task_name}' samples its answers, and only greedy tasks are "
                    f"measured; leave it out"
                )
            until = handle_stop_sequences(wanted["until"], self.tok_decode(eos, skip_special_tokens=False))
            kinds.setdefault((wanted["max_gen_toks"], tuple(until)), []).append(i)
        found = []
        for (new, until), members in kinds.items():
            if new >= self.max_length:
                raise Fault(
                    f"general.tasks: '{requests[members[0]].task_name}' answers with up to {new} tokens, and "
                    f"the model takes {self.max_length} in all; leave it out"
                )
            prompts = [
                self.tok_encode(requests[i].args[0], left_truncate_len=self.max_length - new) for i in members
            ]
            share, stop = self._share(prompts, new), self._stops(until)
            answers = generated(self.model, share, self.held, self.ends, self.conditions, stop)
            found += [(members[n], self._text(ids, until)) for n, ids in answers.items()]
        return self._gathered(found, len(requests))

    def _stops(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        """A function that says whether an answer, as token ids, has come to a stop sequence."""
        return lambda ids: any(
            text in self.tok_decode(ids[-STOP_TOKENS:], skip_special_tokens=False) for text in until
        )

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        """An answer up to its first stop sequence."""
        return postprocess_generated_text(self.tok_decode(without_end(ids, self.ends)), list(until), None)

    def _share(self, rows: list[list[int]], new: int, most: int | None = None) -> Share:
        """This rank's share of the rows, in batches of at most `most` (collective: all ranks cut the same
        batches)."""
        self.held.agree(self.acc)
        groups, parts = self._groups(rows, new), []
        for group in groups:
            for chosen in self._batches(group, rows, new):
                size = most or len(chosen)
                parts += [chosen[start : start + size] for start in range(0, len(chosen), size)]
        own = parts[self.acc.process_index :: self.acc.num_processes]
        numbers = {i: number for number, group in enumerate(groups) for i in group.rows}
        return Share("general ability", rows, own, new, len(rows), numbers)

    def _groups(self, rows: list[list[int]], new: int) -> list[PrefixGroup]:
        """The rows in groups that begin alike, where no condition differs."""
        if self.conditions:
            return [PrefixGroup(list(range(len(rows))), 0)]
        return by_prefix(rows, new, self.held.step)

    def _batches(self, group: PrefixGroup, rows: list[list[int]], new: int) -> Iterator[list[int]]:
        """Positions in `rows` of a group, in batches."""
        lengths = [len(rows[i]) for i in group.rows]
        for chosen in batches(lengths, new, self.held.tokens, self.held.step, group.shared):
            yield [group.rows[i] for i in chosen]

    def _gathered(self, found: list[tuple[int, Any]], count: int) -> list[Any]:
        """The results of all ranks, in the order of the requests."""
        with heartbeat.waiting():
            by_number = dict(gather_object(found))
        return [by_number[i] for i in range(count)]


@dataclass
class Measured:
    """One task: the fields of its row of scores.jsonl but for the stage, its predictions, the harness's
    results, and the chat template that wrote the prompts, if one did.
    """

    fields: dict[str, Any]
    predictions: list[dict]
    results: dict
    template: str | None = None

    def row(self, stage: Stage) -> ScoreRow:
        return ScoreRow(after=stage.after, step=stage.step, kind=GENERAL, **self.fields)


@quiet()
def measure(lm: InMemoryLM, ability: Ability, section: "GeneralSection", chat: bool) -> Measured:
    """Measure one task or group. Every rank has all answers and computes the same scores from them."""
    name, tasks = ability.name, ability.tasks
    samples = drawn(
        name, {part: len(task.eval_docs) for part, task in tasks.items()}, section.limit, section.seed
    )
    random.seed(section.seed)  # IFEval's checks draw at random what a prompt does not specify
    for task in tasks.values():
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(section.seed)
    # `evaluate` and not `simple_evaluate`, which would seed every random generator of the process at each
    # call.
    chosen = {"tasks": {part: tasks[part] for part in samples}, "groups": {}, "group_map": {}}
    with redirect_stderr(StringIO()), ability.bounded():  # else a progress bar for every part, on every rank
        results = evaluate(lm, chosen, samples=samples, apply_chat_template=chat)
    scores = _of_group(results) if ability.is_group else _of_task(results, name)
    if not scores:
        raise Fault(no_score(name, next(iter(tasks.values())).higher_is_better()))
    if ability.is_group:
        results["groups"] = {name: {"alias": name, **_harness_keys(scores)}}
        results["results"] |= results["groups"]
        results["group_subtasks"] = {name: list(samples)}
    wanted = HEADLINES.get(name)
    headline = wanted if wanted in scores else next(iter(scores))
    first, predictions = next(iter(samples)), _predictions(results, headline)
    most = commonest([row.get("response", row["prediction"]) for row in predictions])
    fields = {
        "task": name,
        "headline": headline,
        "score": scores[headline]["mean"],
        "metrics": scores,
        "empty": blank(row["response"] for row in predictions if "response" in row),
        "commonest": most and most[1],
        "source": section.data,
        "shots": results["n-shot"][first],
        "version": results["versions"][first],
    }
    return Measured(fields, predictions, results, lm.reads.get_chat_template() if chat else None)


def _of_task(results: dict, part: str) -> dict[str, dict]:
    """By 'metric,filter' the harness's mean and standard error, in points, of the metrics that score each
    example."""
    found, n = results["results"][part], results["n-samples"][part]["effective"]
    scoring, out = _scoring(results), {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if metric in scoring:
            error = found.get(f"{metric}_stderr,{filtered}")
            out[key] = _score(value, None if error in (None, "N/A") else error, n)
    return out


def _of_group(results: dict) -> dict[str, dict]:
    """By 'metric,filter' the mean over the examples of all parts and its standard error, sd / √n, in
    points.
    """
    scoring = _scoring(results)
    values: dict[str, list[float]] = {}
    for sample in chain.from_iterable(results["samples"].values()):
        for metric in sample["metrics"]:
            if metric in scoring and not isinstance(sample[metric], list):
                values.setdefault(f"{metric},{sample['filter']}", []).append(float(sample[metric]))
    return {
        key: _score(fmean(v), stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None, len(v))
        for key, v in values.items()
    }


def _scoring(results: dict) -> set[str]:
    """The metrics by which every example has a score of 0 to 1."""
    found, others = set(), set()
    for part, samples in results["samples"].items():
        better = results["higher_is_better"].get(part, {})
        for sample in samples:
            for metric in sample["metrics"]:
                scored = is_score(sample[metric], better.get(metric))
                if scored:
                    found.add(metric)
                else:
                    others.add(metric)
    return found - others


def _score(mean: float, error: float | None, n: int) -> dict:
    """A score in points, with the normal 95 % interval, cut to 0 to 100; `mean` and `error` are shares."""
    if error is None:
        return {"mean": 100 * mean, "stderr": None, "low": None, "high": None, "n": n}
    low = max(0.0, 100 * (mean - NORMAL * error))
    high = min(100.0, 100 * (mean + NORMAL * error))
    return {"mean": 100 * mean, "stderr": 100 * error, "low": low, "high": high, "n": n}


def _harness_keys(scores: dict[str, dict]) -> dict[str, float | str]:
    """Scores under the harness's keys and in its unit, 0 to 1."""
    out: dict[str, float | str] = {}
    for key, score in scores.items():
        metric, _, filtered = key.partition(",")
        out[key] = score["mean"] / 100
        out[f"{metric}_stderr,{filtered}"] = "N/A" if score["stderr"] is None else score["stderr"] / 100
    return out


def _predictions(results: dict, headline: str) -> list[dict]:
    """The rows of predictions, one per example. The prediction is the likeliest choice, or what the
    headline's filter takes out of the model's `response`."""
    metric, _, filtered = headline.partition(",")
    out = []
    for part, samples in results["samples"].items():
        for sample in (s for s in samples if s["filter"] == filtered):
            choices = [arguments[1] for arguments in sample["arguments"]]
            picked, target, response = sample["filtered_resps"][0], sample["target"], {}
            if isinstance(picked, tuple | list):  # (log-likelihood, is greedy) of each choice
                likelihoods = [of_choice[0] for of_choice in sample["filtered_resps"]]
                likeliest = max(range(len(choices)), key=likelihoods.__getitem__)
                picked = choices[likeliest].strip()
                refuse_label(part, target, choices)
                target = choices[target].strip() if isinstance(target, int) else target
            else:
                response = {"response": sample["resps"][0][0]}
            out.append(
                {
                    "part": part,
                    "number": sample["doc_id"],
                    "prompt": sample["arguments"][0][0],
                    **response,
                    "prediction": str(picked),
                    "answer": str(target),
                    headline: 100.0 * sample[metric],
                }
            )
    return out


@quiet()
def write(folder: Path, model: str, lm: InMemoryLM, section: "GeneralSection", measured: Measured) -> None:
    """The harness's own result files: <folder>/<model>/results_<date>.json and
    samples_<task>_<date>.jsonl.
    """
    whole = deepcopy(measured.results)
    samples = whole.pop("samples")
    whole["config"] = {
        "model": "hf",
        "model_args": f"pretrained={model}",
        "batch_size": "auto",
        "device": str(lm.device),
        "limit": section.limit,
        "fewshot_seed": section.seed,
        "random_seed": section.seed,
        **lm.get_model_info(),
    }
    whole |= {
        "date": time.time(),
        **{f"{name}_version": version(name) for name in ("lm_eval", "transformers")},
    }
    add_tokenizer_info(whole, lm)
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        "hf", f"pretrained={model}", None, measured.template, False
    )
    tracker.save_results_aggregated(results=whole, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
