"""Dream: sequential LoRA that distils the model before the task on sequences which that model generates."""

import logging
from dataclasses import replace

import torch
from accelerate import PartialState
from torch import Tensor

from codyra_llm.config.methods.regularised import DreamConfig
from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import Batch, collate
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import snapshot, stand_in, without_update
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.features import on_prompts
from codyra_llm.methods.parts.samples import (
    PROMPTS_TOGETHER,
    answered,
    continued,
    end_tokens,
    first_token,
    self_sampled,
)
from codyra_llm.methods.regularised.demonstrations import (
    Demonstrations,
    chosen,
    common_closing,
    common_prefix,
    diverse,
    new_inputs,
)
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.head_loss import distillation, head_loss

log = logging.getLogger(__name__)

DEMONSTRATIONS = 2  # kept of each task, as many as SSR shows at a time
INPUT_TOKENS = 256
INPUT_WEIGHT = 0.25  # LAMOL's λ
FEW = (
    "dream: the base wrote too few new inputs that came to their end (task, how many of those wanted: %s); "
    "sequences from BOS take the place of the others. A longer method.input_tokens, or a base that makes use "
    "of demonstrations, gives more"
)
CANDIDATES = 4  # inputs that the base writes for each dream, of which the selection takes one


class Dream(SeqLora):
    """CE + β · mean over the tokens of a dreamt batch of KL(p_{t-1} ‖ p_θ), one batch in every step. Before
    every task, including the first, the model dreams, that is generates, `samples` sequences: some start from
    BOS and a random token, the others from the common beginning of an earlier task's prompts, the same number
    for each task.

    Ours, from two ideas: distilling the model before the task (LwF, 1606.09282, there on new inputs), and
    replay of what a language model generates itself (LAMOL, 1909.03329; SSR, 2403.01244; pseudo-examples in
    EasyCL). `target` tokens is the second idea alone: cross entropy on the tokens as they were drawn, whose
    gradient on average over draws is that of the KL. By default nothing teaches the model to write inputs, so
    how much a dream resembles a task depends on how well the model continues the beginning of its prompts. No
    example is kept: the state is the tokens with which all uncut prompts of a task begin, and the tokens that
    end its texts.

    With `inputs` learnt every step adds λ (`input_weight`) times the cross entropy of the prompts' tokens of
    its examples, all but the first, so that the model learns to write inputs after their beginning, as in
    LAMOL (λ 0.25), whose dreams are learnt by `target` tokens. Ours: a mean over a prompt's tokens, weighted
    as its example is in the loss; the answer's tokens are not in this term, as they are there; tasks have no
    token of their own, whose place their common beginnings take; all that is dreamt after such a beginning
    has one weight, where LAMOL has λ for inputs there too. `sample_tokens` must hold an input and its answer.

    With `inputs` demonstrations dreams of earlier tasks are made as in SSR. A few training examples of each
    are then kept in the state, although `codyra-llm methods` lists dream, by its defaults, as a method that
    does without. The paper's: the base (the adapter as zero) writes inputs after the examples, the model
    before the task writes the answers, and k-means selects diverse inputs. Ours: the KL; answers at
    temperature 1, where its code takes the likeliest tokens; all kept examples are shown, in an order drawn
    for each input, where it keeps more and shows every ordered pair; features are means of the model's own
    last hidden states, where it has a sentence encoder; as many clusters as dreams, where it has 20. An input
    ends with the tokens that all uncut prompts end with, if no prompt holds them before its end. Otherwise
    the examples are shown without answers, and an input ends with the blank line after which the next would
    follow. Inputs without an end within `input_tokens`, empty ones, those written before and those of the
    examples are dropped; sequences from BOS make up for what is missing.

    Cost: `batch` sequences forward and backward per step, and a forward of the model before the task; per
    task `samples` sequences decoded with cached keys and values, the same on every rank; one more copy of the
    adapter. Training takes 2.4 to 2.7 times as long as seqlora's on the quickstart, also where inputs are
    learnt. With demonstrations, 4 inputs of `input_tokens` tokens are decoded in addition for each dream of
    an earlier task: 4.4 times with 48 tokens. Where inputs are learnt,
    the head runs on all tokens of the prompts, and a GPU's micro-batches are not recorded."""

    name, Config = "dream", DreamConfig
    summary = "seqlora that distils the model before the task on sequences it writes itself"
    config: DreamConfig
    max_zero_stage = 2  # the model before the task is a copy of whole parameters
    grows = True

    def check(self, config, attention: str | None) -> list[str]:
        """A model whose positions would have no room for demonstrations in front of an input."""
        c, positions = self.config, _positions(config)
        longest = c.prefix_tokens + self._input_tokens + c.sample_tokens
        if c.inputs != "demonstrations" or longest < positions:
            return []
        return [
            f"method.input_tokens: an input of {self._input_tokens} tokens, its beginning of up to "
            f"{c.prefix_tokens} and an answer of up to {c.sample_tokens} leave no room for demonstrations in "
            f"the model's {positions} positions; lower input_tokens, prefix_tokens or sample_tokens"
        ]

    @property
    def _input_tokens(self) -> int:
        return self.config.input_tokens or INPUT_TOKENS

    def begin_task(self, model, task: Task) -> None:
        """Copy the factors for the teacher, and have the model generate its sequences."""
        super().begin_task(model, task)
        self._index, self._step = task.index, 0
        self._before = snapshot(model)
        self._dreams = self._dreamt(model, task)

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the step, by which the dreamt batch is drawn."""
        self._step = step

    def penalty(self, model) -> dict[str, Tensor]:
        """β times the term of one dreamt batch."""
        if not (self._dreams and self.config.weight):
            return {}
        return {"dream": self.config.weight * self._term(model, self._drawn(model))}

    @property
    def has_usual_loss(self) -> bool:
        """Not where inputs are learnt."""
        return type(self).loss is Dream.loss and not self._input_weight

    @property
    def _input_weight(self) -> float:
        """λ of the prompts' tokens; 0 where inputs are not learnt."""
        c = self.config
        if c.inputs != "learnt":
            return 0.0
        return INPUT_WEIGHT if c.input_weight is None else c.input_weight

    def loss(self, model, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, and in training, where inputs are learnt, λ times that of the prompts' tokens."""
        weight = self._input_weight
        if not weight or not model.training:
            return super().loss(model, batch)
        asked = on_prompts(batch)
        both = replace(batch, predictors=torch.cat([batch.predictors, asked.predictors]))
        own, of_prompts = both.hidden(model).split([len(batch.predictors), len(asked.predictors)])
        return {
            "loss": batch.cross_entropy_of(model, own),
            "inputs": weight * asked.cross_entropy_of(model, of_prompts),
        }

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """What later dreams of this task need. `prefix`: the common beginning of its uncut prompts, or of all
        if every prompt is cut; dreams start from it. `ends`: the tokens that end a dream, which are those
        that end an answer and are in none of the prompts. The end of a user's turn, for instance, is in the
        prompts, and an answer still follows it."""
        examples = task.encode(task.records())
        prompts = [example.prompt for example in examples]
        whole = [example.prompt for example in examples if not example.cut]
        prefix = common_prefix(whole or prompts)[: self.config.prefix_tokens] or [first_token(model)]
        ends = end_tokens(model, task.ends).difference(*prompts)
        own = {
            f"prefix.{task.index}": torch.tensor(prefix),
            f"ends.{task.index}": torch.tensor(sorted(ends), dtype=torch.long),
        }
        if self.config.inputs == "demonstrations":
            own |= self._demonstrations(model, task, examples, ends).state(task.index)
        return {**task.state, **own}

    def _demonstrations(self, model, task: Task, examples: list[Encoded], ends: set[int]) -> Demonstrations:
        """What is kept of the task, so that the base can write inputs like its own. The context that they
        make leaves room for an input in the positions that the model has."""
        c = self.config
        whole = [example for example in examples if not example.cut] or examples
        prompts = [example.prompt for example in whole]
        opening = common_prefix(prompts)[: c.prefix_tokens]
        count = c.demonstrations or DEMONSTRATIONS
        separators = count * len(_blank_line(task))
        positions = _positions(families.pretrained(model).config)
        room = positions - separators - len(opening) - self._input_tokens
        kept = chosen(whole, count, room, self.seed, task.index)
        return Demonstrations(kept, opening, common_closing(prompts, opening), frozenset(ends))

    def _dreamt(self, model, task: Task) -> list[Encoded]:
        """The task's dreams: the same number for each earlier task, and the rest from BOS."""
        c = self.config
        each = int(c.samples * c.prompted / task.index) if task.index else 0
        found, few = [], []
        for k in range(task.index):
            if c.inputs == "demonstrations":
                own = self._after_demonstrations(model, task, k, each)
                found += own
                if len(own) < each:
                    few.append(f"{task.stream.tasks[k]} {len(own)} of {each}")
                continue
            prefix, ends = task.state[f"prefix.{k}"].tolist(), task.state[f"ends.{k}"].tolist()
            found += continued(model, prefix, each, c.sample_tokens, ends, self.seed, self._index, k)
        if few and PartialState().is_main_process:
            log.warning(FEW, ", ".join(few))
        seed = generator("dream", self.seed, self._index).initial_seed()
        free = self_sampled(model, c.samples - len(found), c.sample_tokens, seed)
        return found + [whole_answer(example) for example in free]

    def _after_demonstrations(self, model, task: Task, past: int, count: int) -> list[Encoded]:
        """Up to `count` dreams of an earlier task: the base writes the inputs, and the model as it is the
        answers."""
        kept, key = Demonstrations.load(task.state, past), (self.seed, self._index, past)
        length, separator = self._input_tokens, _blank_line(task)
        training = model.training
        model.eval()
        # `fresh` is false, so the adapter is all that the stream has changed.
        with stand_in(model, without_update(self._before)):
            written = new_inputs(model, kept, CANDIDATES * count, length, separator, *key)
        prompts = diverse(model, written, count, *key)
        found = []
        for start in range(0, len(prompts), PROMPTS_TOGETHER):
            group = prompts[start : start + PROMPTS_TOGETHER]
            draws = [generator("dreamt answer", *key, start + i) for i in range(len(group))]
            answers = answered(model, group, self.config.sample_tokens, task.ends, draws)
            found += [Encoded(p, a, cut=False) for p, a in zip(group, answers, strict=True)]
        model.train(training)
        return found

    def _drawn(self, model) -> Batch:
        """This process's share of the step's dreamt batch. Its weights sum to 1 over the batch, times the
        number of processes, over which the trainer takes the mean of a penalty."""
        draw = generator("dreamt batch", self.seed, self._index, self._step)
        order = torch.randperm(len(self._dreams), generator=draw)[: self.config.batch].tolist()
        process, total = PartialState(), sum(len(self._dreams[i].answer) for i in order)
        own = order[process.process_index :: process.num_processes]
        weight = process.num_processes / total if own else 0.0
        chosen = own or order[:1]
        packed = packed_attention.used(model)
        return collate(self._dreams, chosen, [weight] * len(chosen), 0, packed).to(model.device)

    def _term(self, model, batch: Batch) -> Tensor:
        """The KL divergence from the model before the task, or with `target` tokens the cross entropy."""
        head, hidden, cap = families.head(model), batch.hidden(model), families.softcap(model)
        if self.config.target == "tokens":
            return head_loss(head, hidden, batch.targets, batch.weights, cap)
        with torch.no_grad(), stand_in(model, self._before):
            taught = batch.hidden(model)
        return distillation(head, hidden, taught, batch.weights, 1.0, cap)


def _positions(config) -> int:
    """How many tokens a model of this config reads."""
    return getattr(config, "max_position_embeddings", None) or 4096


def _blank_line(task: Task) -> list[int]:
    """The tokens between two demonstrations."""
    return [*task.newline, *task.newline]


def whole_answer(example: Encoded) -> Encoded:
    """A sequence from BOS and a token at random, with all that the model drew as the answer."""
    tokens = example.prompt + example.answer
    return Encoded(tokens[:2], tokens[2:], cut=False)
