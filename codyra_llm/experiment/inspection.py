"""Faults that show only when base and data are seen together, found by reading prompts and answers as the run
will."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from codyra_llm.config.recipe import Recipe, by_task
from codyra_llm.config.sections import SHIPPED as SHIPPED_BENCHMARKS
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.data.stream import Stream
from codyra_llm.methods.base import Method
from codyra_llm.metrics.own import SHIPPED
from codyra_llm.models import families
from codyra_llm.models.weights import leftovers

SHOWN = 60  # characters of an answer
TRIED = 20  # examples of a task on which a metric from outside the package is tried
Split = tuple[int, str, list[dict]]


def splits(recipe: Recipe, stream: Stream, trains: bool) -> Iterator[Split]:
    """(task's number, split, records) of what a run reads; what can't be read is reported elsewhere."""
    wanted = ["train", recipe.eval.split] if trains else [recipe.eval.split]
    for index in range(len(recipe.tasks)):
        for split in wanted:
            try:
                yield index, split, stream.records(index, split)
            except Fault:
                continue


def unanswered(recipe: Recipe, index: int, rows: list[dict]) -> list[str]:
    """Fault: a task that can't be scored since it has no answers, such as TRACE's Lima."""
    if not rows or any(row["answer"].strip() for row in rows):
        return []
    name = recipe.tasks[index]
    return [
        f"data.tasks: none of the {len(rows)} {recipe.eval.split} records of {name} has an answer, so it "
        f"can't be scored; leave it out (method replay takes such a set by method.general={name})"
    ]


def as_presented(method: Method, stream: Stream, encoder: Encoder, read: Sequence[Split]) -> list[Split]:
    """The same splits, test prompts as the method presents them: in-context learning makes them longer."""
    found = []
    for index, split, records in read:
        if split != "train":
            prompts = method.prompts_at_test(stream, encoder, index, _texts(records))
            pairs = zip(records, prompts, strict=True)
            records = [{**record, "prompt": prompt} for record, prompt in pairs]
        found.append((index, split, records))
    return found


def prompt_faults(
    recipe: Recipe, read: Sequence[Split], encoder: Encoder, config: PreTrainedConfig, front: int = 0
) -> list[str]:
    """Faults for prompts that the model can't answer: those without a token, those with a token of which the
    model has no embedding, and those that leave no free position. `front`: how many positions the method's
    own prompts take."""
    strange = _without_embedding(recipe, read, encoder)
    if strange:  # the other checks read all texts, and can't read these
        return strange
    return _empty(recipe, read, encoder) + _too_long(recipe, read, encoder, config, front)


def try_metrics(recipe: Recipe, read: Sequence[Split]) -> None:
    """Score some right answers and empty ones by metrics from outside the package, which would otherwise fail
    after hours of training. Raises Fault if one fails."""
    for index, split, records in read:
        name = recipe.tasks[index]
        if split == "train" or all(metric in SHIPPED for metric in recipe.benchmark.task(name).metrics):
            continue
        prompts = [record["prompt"] for record in records[:TRIED]]
        answers = [record["answer"] for record in records[:TRIED]]
        for predictions in (answers, [""] * len(answers)):
            recipe.benchmark.score(name, prompts, predictions, answers)


def _without_embedding(recipe: Recipe, read: Sequence[Split], encoder: Encoder) -> list[str]:
    """The first record of every split that holds one of the tokens that the model has no embedding of."""
    faults = []
    for index, split, records in read:
        for token in encoder.unembedded.values():
            holding = [i for i, one in enumerate(records) if token in one["prompt"] or token in one["answer"]]
            if holding:
                faults.append(
                    f"{recipe.tasks[index]}/{split}: record {holding[0]} holds the token {token}, of which "
                    "the model has no embedding; take it out of the text"
                )
    return faults


def _empty(recipe: Recipe, read: Sequence[Split], encoder: Encoder) -> list[str]:
    """Faults: prompts without a token, where the tokenizer adds no BOS either."""
    if encoder.bos:
        return []
    faults = []
    for index, split, records in read:
        blank = [i for i, record in enumerate(records) if not record["prompt"].strip()]
        bare = [i for i in blank if not encoder.prompt(records[i]["prompt"])[0]]
        if bare:
            faults.append(
                f"{recipe.tasks[index]}/{split}: record {bare[0]} has an empty prompt ({len(bare)} of "
                f"{len(records)} records), and the tokenizer puts no token in front of a text, so there is "
                "nothing to go on from; give it a prompt, or remove it"
            )
    return faults


def _too_long(
    recipe: Recipe, read: Sequence[Split], encoder: Encoder, config: PreTrainedConfig, front: int
) -> list[str]:
    """Faults: examples that do not fit into the model's positions."""
    positions, data = getattr(config, "max_position_embeddings", None), recipe.data
    if not positions or front + data.max_prompt_tokens + data.max_answer_tokens <= positions:
        return []
    longest: dict[str, int] = {}
    for index, split, records in read:
        where = f"{recipe.tasks[index]}/{split}"
        for record, (prompt, _) in zip(records, encoder.prompts(_texts(records)), strict=True):
            # A test prompt needs room for at least one token of an answer.
            room = len(encoder.answer(record["answer"])[0]) if split == "train" else 1
            longest[where] = max(len(prompt) + room, longest.get(where, 0))
    return [
        f"data.max_prompt_tokens: {where} has a prompt of {tokens} tokens with its answer, and the "
        f"model has {_positions(positions, front)}; lower it, so that prompts are cut (now "
        f"{data.max_prompt_tokens}, answers up to {data.max_answer_tokens})"
        for where, tokens in longest.items()
        if front + tokens > positions
    ]


def _positions(positions: int, front: int) -> str:
    taken = f", of which the method's own prompts take {front}" if front else ""
    return f"{positions} positions{taken}"


def _texts(records: Sequence[dict]) -> list[str]:
    return [record["prompt"] for record in records]


def hints(
    recipe: Recipe,
    read: Sequence[Split],
    encoder: Encoder,
    config: PreTrainedConfig,
    base: Path,
    front: int = 0,
) -> list[str]:
    """Warnings of `plan`: weights in the base's folder that are not read, a BOS that the family needs and the
    tokenizer does not add, training prompts that end in a space, answers that the tokenizer can't reproduce,
    and answers that may go past the model's last position. `front`: as in `prompt_faults`."""
    found = []
    left = leftovers(base)
    if left:
        more = ", ..." if len(left) > 3 else ""
        found.append(
            f"{base} holds weights that are not read, as transformers does not read them either: "
            f"{', '.join(left[:3])}{more}; remove them, or the ones that are "
            "read, whichever is out of date"
        )
    family = families.family_in(base)
    if family.needs_bos and not encoder.bos:
        found.append(
            f"the tokenizer in {base} puts no BOS in front of a text, and {family.title} was pretrained with "
            "one before every text and does badly without; use the tokenizer that the model came with"
        )
    for index, split, records in read:
        where = f"{recipe.tasks[index]}/{split}"
        if split != "train":
            found += _unreachable(where, records, encoder)
        elif _own_ends(recipe, recipe.tasks[index]):
            found += _ending_in_a_space(where, records)
    return found + _past_the_end(recipe, read, encoder, config, front)


def _own_ends(recipe: Recipe, name: str) -> bool:
    """Whether a user chose how a task's prompts end: no chat template does, nor a shipped benchmark."""
    task = recipe.benchmark.task(name)
    published = recipe.data.benchmark in SHIPPED_BENCHMARKS and task.templates
    return not (recipe.by_template(name) or published)


def _ending_in_a_space(where: str, records: Sequence[dict]) -> list[str]:
    """Training prompts that end in a space and whose answer begins with a letter: tokenizers join a space to
    the word after it, so the answer's first token is one that the base has hardly seen after a space. Digits
    are no problem, since many tokenizers keep them separate from a space."""
    spaced = [
        number
        for number, record in enumerate(records)
        if record["prompt"].endswith(" ") and record["answer"][:1].isalpha()
    ]
    if not spaced:
        return []
    return [
        f"{where}: {len(spaced)} of {len(records)} prompts end in a space, the first is record {spaced[0]}, "
        "and tokenizers join a space to the word after it, so that the first token of an answer is one that "
        "the base hardly expects there; end prompts in a line break, as in 'Answer:\\n'"
    ]


def _unreachable(where: str, records: Sequence[dict], encoder: Encoder) -> list[str]:
    """Answers that even a model that has memorised them can't reproduce, since decoding drops special tokens,
    everything after an end token, or a leading space."""
    changed = _changed([record["answer"] for record in records], encoder.perfect)
    if not changed:
        return []
    number, answer, given = changed[0]
    return [
        f"{where}: {len(changed)} of {len(records)} answers can't be given as they are, since the tokenizer "
        f"reads special tokens in them or drops white space: record {number} {answer[:SHOWN]!r} becomes "
        f"{given[:SHOWN]!r}, and never matches where a metric compares exactly; change the answers"
    ]


def _changed(answers: Sequence[str], perfect: Callable[[str], str]) -> list[tuple[int, str, str]]:
    """(number, answer, what `perfect` makes of it) of the answers that it changes."""
    found = [(number, answer, perfect(answer)) for number, answer in enumerate(answers)]
    return [row for row in found if row[1] != row[2]]


def _past_the_end(
    recipe: Recipe, read: Sequence[Split], encoder: Encoder, config: PreTrainedConfig, front: int
) -> list[str]:
    """Test prompts that leave fewer positions than `eval.max_new_tokens`."""
    positions = getattr(config, "max_position_embeddings", None)
    found = []
    for index, split, records in read:
        new = by_task(recipe.eval.max_new_tokens, recipe.tasks[index])
        if split == "train" or not positions or front + recipe.data.max_prompt_tokens + new <= positions:
            continue
        longest = max((len(ids) for ids, _ in encoder.prompts(_texts(records))), default=0)
        if front + longest + new > positions:
            found.append(
                f"{recipe.tasks[index]}/{split}: prompts of up to {longest} tokens and answers of up to "
                f"{new} go past the model's {_positions(positions, front)}; lower data.max_prompt_tokens or "
                "eval.max_new_tokens"
            )
    return found
