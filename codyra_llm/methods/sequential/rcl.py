"""RCL: sequential LoRA on answers that give their reasoning, so that the model keeps its way of reasoning."""

from pathlib import Path

from codyra_llm.config.methods.sequential import REASONING_VARIANT, RclConfig
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.core.parsing import expanded
from codyra_llm.data.reasoning import read_answer, reasoned_prompt
from codyra_llm.data.records import read_split
from codyra_llm.methods.sequential.seqlora import SeqLora


class Rcl(SeqLora):
    """seqlora trained on "reasoning \\nAnswer:X" in place of "X"; what is scored is X.

    Source: TRACE (2310.06762), reasoning-augmented continual learning, on 376 to 513 examples per task of the
    variant LLM-CL-Benchmark_Reasoning, whose wording is in codyra_llm/data/reasoning.py. Test prompts are
    those of data.root, put into the words of the training prompts (checked on the prompts that both variants
    hold). An output without the marker counts as an empty answer; eval rows count these. Tasks that are not
    TRACE's: their prompts must be the same in both folders, and the marker is "\\nAnswer:". Cost: longer
    answers, in training and evaluation; leave room for them in data.max_answer_tokens and
    eval.max_new_tokens. Validation losses (optim.validate_every) are of the answers in data.root, without
    reasoning."""

    name, summary, Config = "rcl", "seqlora on answers with reasoning", RclConfig
    config: RclConfig

    def train_data(self, stream, index: int):
        """The task's records from TRACE's variant with reasoning. Raises Fault where it has none."""
        folder, task = self._folder(stream), stream.tasks[index]
        if not (folder / task / "train.json").is_file():
            raise Fault(
                f"method.folder: {folder} has no {task}/train.json; give the folder of TRACE's variant with "
                f"reasoning (default: {REASONING_VARIANT} in data.root or next to it), or leave the task out"
            )
        records = read_split(folder, task, "train")[: stream.data.max_train_examples]
        return records, [range(len(records))] * stream.epochs[index]

    def own_data(self, stream) -> dict[str, str]:
        """The hashes of the records with reasoning."""
        files = [f"{task}/train.json" for task in stream.tasks]
        return {f"{REASONING_VARIANT}/{file}": file_sha256(self._folder(stream) / file) for file in files}

    def prompts_at_test(self, stream, encoder, task: int, prompts: list[str]) -> list[str]:
        """Prompts that ask for the reasoning too."""
        return [reasoned_prompt(stream.tasks[task], prompt) for prompt in prompts]

    def parse_answer(self, task: str, prediction: str) -> str:
        """The answer without its reasoning."""
        return read_answer(task, prediction)

    def _folder(self, stream) -> Path:
        own = self.config.folder
        return Path(expanded(own)) if own else _variant(stream.root.absolute())


def _variant(root: Path) -> Path:
    """The default folder: inside `root`, as in mini-TRACE, or a sibling, as in TRACE."""
    inside = root / REASONING_VARIANT
    return inside if inside.is_dir() else root.parent / REASONING_VARIANT
