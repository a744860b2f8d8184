"""In-context learning: the frozen model, shown demonstrations from the training set before each test
prompt.
"""

import os
import re
from typing import TYPE_CHECKING

import torch

from codyra_llm.config.methods.baselines import IclConfig
from codyra_llm.core.tensors import generator
from codyra_llm.methods.baselines.none import NoMethod

if TYPE_CHECKING:
    from codyra_llm.data.encoding import Encoder


LEAD = "We will give you several examples and you should follow them to accomplish the task.\n Examples:\n"
CODE = "Continue writing the following code.\n"  # Py150's prompts have no instruction
NOT_SHOWN = "MeetingBank"  # one transcript alone is longer than a prompt may be
LETTER = ("C-STANCE", "FOMC")  # tasks whose answers are a letter

# By task, the text at which TRACE cuts what a model writes after its answer.
ENDS = {
    "NumGLUE-cm": "\n",
    "NumGLUE-ds": "\n",
    "MeetingBank": "Meeting transcripts",
    "ScienceQA": "Question:",
    "Py150": "<EOL>",
    "20Minuten": "Paragraph",
}


class Icl(NoMethod):
    """Prompt = instruction + "We will give you several examples …" + k demonstrations + the test prompt
    without its instruction; MeetingBank gets no demonstrations, as published. Model and weights are those of
    `none`.

    Source: TRACE (2310.06762), with 6 demonstrations and data.max_prompt_tokens 3584. Ours: demonstrations
    come from the training split, without prompts that are also in the test split (TRACE draws them from the
    test set itself). One draw by the seed is used for all prompts of a task. Its answers are as balanced as
    possible (two of each for three classes, all different where there are many); examples that fit into
    max_prompt_tokens / (2·shots) tokens come first, and longer ones lose their beginning. What a model writes
    after its answer, mostly another example, is cut where TRACE cuts it: for the tasks with letters after the
    first character that is not white space (TRACE: the first token), for tasks that are not TRACE's at the
    blank line between examples. Cost: prompts up to twice as long, in evaluation; their common beginning is
    encoded once per batch."""

    name, summary, Config = "icl", "the frozen model with demonstrations in the prompt", IclConfig
    old_data = True
    config: IclConfig

    def train_data(self, stream, index: int):
        """The records to show; nothing trains."""
        shown = self.config.shots and stream.tasks[index] != NOT_SHOWN
        return stream.records(index, "train") if shown else [], []

    def prompts_at_test(self, stream, encoder, task: int, prompts: list[str]) -> list[str]:
        """Demonstrations in front of each prompt, balanced over the answers."""
        asked = set(prompts)
        records = [r for r in self.train_data(stream, task)[0] if r["prompt"] not in asked]
        if not records:
            return prompts
        own = _instruction([r["prompt"] for r in records])
        code = "Code:\n" if stream.tasks[task] == "Py150" else ""
        texts = [r["prompt"].removeprefix(own) + r["answer"] for r in records]
        most = encoder.data.max_prompt_tokens // (2 * self.config.shots)  # tokens of a demonstration
        shown = [_end(encoder, text, most) for text in texts]
        order = torch.randperm(len(records), generator=generator("icl", self.seed, task)).tolist()
        order.sort(key=lambda i: shown[i] != texts[i])  # those that fit as they are come first
        chosen = _balanced(order, [r["answer"] for r in records])[: self.config.shots]
        front = (CODE if code else own) + LEAD + "".join(f"{code}{shown[i]}\n\n" for i in chosen)
        return [front + code + prompt.removeprefix(own) for prompt in prompts]

    def parse_answer(self, task: str, prediction: str) -> str:
        """The output up to where a demonstration would end."""
        if not self.config.shots:
            return prediction
        if task in LETTER:
            return prediction.lstrip()[:1]
        return prediction.split(ENDS.get(task, "\n\n"))[0]


def _instruction(prompts: list[str]) -> str:
    """The first line, with the blank lines after it, where it begins all prompts."""
    line = re.match(r"[^\n]*\n+", os.path.commonprefix(prompts))
    return line[0] if line and len(set(prompts)) > 1 else ""


def _end(encoder: "Encoder", text: str, tokens: int) -> str:
    """The last `tokens` tokens of a text, to whole characters."""
    spans = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    ).offset_mapping
    return text[spans[-tokens][0] :] if len(spans) > tokens else text


def _balanced(order: list[int], answers: list[str]) -> list[int]:
    """`order` with the first of every answer in front, then the second of every answer, and so on."""
    seen: dict[str, int] = {}
    rounds: dict[int, int] = {}  # by index, how many equal answers come before
    for i in order:
        rounds[i] = seen.get(answers[i], 0)
        seen[answers[i]] = rounds[i] + 1
    return sorted(order, key=lambda i: rounds[i])
