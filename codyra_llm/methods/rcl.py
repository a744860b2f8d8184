"""RCL: sequential LoRA on answers that give their reasoning, so that the model keeps its way of reasoning."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..errors import Fault
from ..examples import read_split
from .seqlora import SeqLora, SeqLoraConfig

VARIANT = "LLM-CL-Benchmark_Reasoning"
HINT = " Give your reasoning first, and then the answer."
LABELS = {"FOMC": "Stance:", "MeetingBank": "Summary:", "ScienceQA": "Answer:", "NumGLUE-cm": "Answer:",
          "NumGLUE-ds": "Answer:", "20Minuten": "Simplification:"}
CODE = "Complete the next line of the following codes. Give your answer first, and then the reasoning.\n"
MARKERS = {"C-STANCE": "\n回答：", "MeetingBank": "summary of the meeting transcripts is:"}


class RclConfig(SeqLoraConfig):
    name: Literal["rcl"] = "rcl"
    folder: str | None = Field(None, description=f"TRACE's variant with reasoning; default: {VARIANT} beside data.root")


class Rcl(SeqLora):
    """seqlora trained on "reasoning \\nAnswer:X" in place of "X"; what is scored is X.

    Source: TRACE (2310.06762), reasoning-augmented continual learning, on 376 to 513 examples per task of the variant
    LLM-CL-Benchmark_Reasoning. Its markers: "\\n回答：" (C-STANCE), "… summary of the meeting transcripts is:"
    (MeetingBank), "\\nAnswer:" elsewhere, and Py150 has the answer first, then "\\nReasoning:". Test prompts are those
    of data.root, put into the words of the training prompts (checked on the prompts that both variants hold). An output
    without the marker has given no answer and is read as an empty one; eval rows count these.
    Tasks that are not TRACE's: their prompts must be the same in both folders, and the marker is "\\nAnswer:".
    Cost: longer answers, in training and evaluation; leave room for them in data.max_answer_tokens and
    eval.max_new_tokens. Validation losses (optim.validate_every) are of the answers in data.root, without reasoning.
    """

    name, summary, Config = "rcl", "seqlora on answers with reasoning", RclConfig
    config: RclConfig

    def train_data(self, stream, index: int):
        own, task = self.config.folder, stream.tasks[index]
        folder = Path(os.path.expandvars(own)).expanduser() if own else stream.root.absolute().parent / VARIANT
        if not (folder / task / "train.json").is_file():
            raise Fault(f"method.folder: {folder} has no {task}/train.json; give the folder of TRACE's variant with "
                        f"reasoning ({VARIANT}), or leave the task out")
        records = read_split(folder, task, "train")[: stream.data.max_train_examples]
        return records, [range(len(records))] * stream.epochs[index]

    def present(self, stream, encoder, task: int, prompts: list[str]) -> list[str]:
        return [_reasoned(stream.tasks[task], prompt) for prompt in prompts]

    def read(self, task: str, prediction: str) -> str:
        if task == "Py150":
            return prediction.split("\nReasoning:")[0].strip()
        parts = f"\n{prediction}".split(MARKERS.get(task, "\nAnswer:"))
        return parts[1].strip() if len(parts) > 1 else ""


def _reasoned(task: str, prompt: str) -> str:
    """A prompt of the plain variants in the form of the variant with reasoning."""
    if task == "Py150":
        return CODE + prompt
    first, _, rest = prompt.partition("\n")
    if task == "C-STANCE":
        return f"{first}先给出推理，然后给出答案。\n{rest.removesuffix('态度：')}推理："
    if task not in LABELS:
        return prompt
    first = first.replace(" and give your reasons.", ".")
    return f"{first}{HINT}\n{rest.lstrip(chr(10)).removesuffix(LABELS[task])}Reasoning:"
