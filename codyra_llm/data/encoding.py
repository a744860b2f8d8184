"""From texts to token ids, the same for training and for generation."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from codyra_llm.core.errors import Fault
from codyra_llm.core.foreign import Failed
from codyra_llm.core.parsing import shown
from codyra_llm.models.ends import end_of_turn, without_end
from codyra_llm.models.tokenizer import (
    adds_bos,
    around_text,
    render_chats,
    template_fault,
    without_embedding,
)

if TYPE_CHECKING:
    from codyra_llm.config.sections import DataSection

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One example in token ids: BOS (where the tokenizer adds one) and the prompt, then the answer and,
    unless it was cut, its end token. The answer and its end are labelled, and in the prompt the `turns`, the
    assistant's earlier turns of a chat. Labels go by position, so pad may equal EOS."""

    prompt: list[int]
    answer: list[int]
    cut: bool  # the prompt or the answer was truncated
    turns: tuple[Span, ...] = ()  # [start, stop) in the prompt, in order

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def labelled(self) -> list[int]:
        """The positions of the tokens to predict; the first token of all can't be predicted."""
        spans = (*self.turns, (max(len(self.prompt), 1), len(self)))
        return [place for start, stop in spans for place in range(start, stop)]

    @property
    def targets(self) -> int:
        """The number of tokens to learn: how many are `labelled`."""
        answer = len(self) - max(len(self.prompt), 1)
        return max(answer, 0) + sum(stop - start for start, stop in self.turns)


class Encoder:
    """Text to token ids, the same for training and for generation.

    The prompt is tokenised alone, as in generation; the answer as its continuation, without the word-start
    mark that SentencePiece gives to a separate text. The answer ends with EOS, or if a chat template wrote
    the prompt, with the token with which the template ends turns. A cut answer has no end. A cut prompt still
    begins with BOS. If a chat template wrote it, it also keeps what the template writes before and after a
    user's text: only the text in between is cut."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: "DataSection",
        ends: frozenset[int] | None = None,
        rows: int | None = None,
    ):
        """`ends`: the tokens that end an answer of the model (models/ends.py); by default EOS alone. `rows`:
        the number of its embeddings; by default every token has one."""
        self.tokenizer, self.data, self.rows = tokenizer, data, rows
        self.unembedded = without_embedding(tokenizer, rows)  # tokens of which the model has no embedding
        eos = tokenizer.eos_token_id
        assert isinstance(eos, int), "load_tokenizer refuses a tokenizer without EOS"
        self.eos = eos
        self.ends = frozenset([eos]) if ends is None else ends
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.newline = self._ids("\n")

    def of_chats(self) -> "Encoder":
        """The same encoder, by which every prompt is a user's message in the chat template."""
        data = self.data.model_copy(update={"chat_template": True})
        return Encoder(self.tokenizer, data, self.ends, self.rows)

    def _ids(self, text: str) -> list[int]:
        return self._all_ids([text])[0]

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. All in one call, since a call costs more than a short text."""
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if self.unembedded:
            self._refuse_strangers(texts, found)
        return found

    def _refuse_strangers(self, texts: list[str], found: list[list[int]]) -> None:
        """Raises Fault for a text with a token that the model has no embedding of."""
        for text, ids in zip(texts, found, strict=True):
            # Tokens without an embedding have the highest ids, so a text's highest id decides.
            token = self.unembedded.get(max(ids, default=0))
            if token:
                raise Fault(
                    f"the text {shown(text)} holds the token {token}, of which the model has no embedding; "
                    "take it out of the text"
                )

    def _written(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as the model gets them. Raises Fault where the chat template doesn't write one."""
        if not self.data.chat_template:
            return list(prompts)
        try:
            return render_chats(self.tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])
        except Failed as error:
            raise Fault(template_fault(self.tokenizer.name_or_path, error, prompts[error.number])) from None

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """Ids of a prompt, at most `max_prompt_tokens` with BOS, and whether it was cut."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """`prompt` of each text, in less time than one after the other."""
        written = self._written(texts)
        return [self._prompt(*one) for one in zip(written, self._all_ids(written), strict=True)]

    def answer(self, text: str) -> tuple[list[int], bool]:
        """Ids of an answer and its end, at most `max_answer_tokens`, and whether any were left out."""
        return self._answer(text, self._ids("\n" + text), self._end())

    def encode(self, records: Sequence[dict]) -> list[Encoded]:
        """The examples {"prompt", "answer"} as token ids, in order; those of chats have `learnt` in addition,
        spans of characters of the prompt that are labelled too."""
        written = self._written([record["prompt"] for record in records])
        prompts = self._all_ids(written)
        continued = self._all_ids(["\n" + record["answer"] for record in records])
        found = []
        for record, text, prompt_ids, continued_ids in zip(records, written, prompts, continued, strict=True):
            prompt, prompt_cut = self._prompt(text, prompt_ids)
            end = self._end(chat="learnt" in record)
            answer, answer_cut = self._answer(record["answer"], continued_ids, end)
            turns = self._turns(record["prompt"], record["learnt"], prompt_ids) if "learnt" in record else ()
            found.append(Encoded(prompt, answer, prompt_cut or answer_cut, turns))
        return found

    def _prompt(self, written: str, ids: list[int]) -> tuple[list[int], bool]:
        """The ids of a prompt that are kept, with BOS, and whether any were left out."""
        kept = self._kept(written, ids)
        return self.bos + [token for part in kept for token in ids[part]], len(kept) > 1

    def _kept(self, written: str, ids: list[int]) -> list[slice]:
        """The ids of a prompt that are kept after BOS, as slices: all, or a head (possibly empty) and a
        tail."""
        first = len(self.bos) if self.bos and ids[:1] == self.bos else 0  # Py150's texts begin with "<s>"
        room = self.data.max_prompt_tokens - len(self.bos)
        if len(ids) - first <= room:
            return [slice(first, len(ids))]
        before, after = self._around(written)
        before = max(before - first, 0)
        if before + after >= room:  # no room for the text would be left
            before = after = 0
        head = before
        if self.data.truncation == "middle":
            head += (room - before - after) // 2
        tail = room - head
        return [slice(first, first + head), slice(len(ids) - tail, len(ids))]

    @cached_property
    def _chat_end(self) -> int:
        """The token that ends the chat template's turns, or EOS."""
        found = end_of_turn(self.tokenizer)
        return self.eos if found is None else found

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the tokenizer's chat template writes before and after a user's text."""
        return around_text(self.tokenizer)

    def chat_frame(self) -> tuple[list[int], list[int]] | None:
        """The ids before a user's text, including BOS, and those between it and the answer; None without a
        chat template."""
        before, after = self._frame
        if not after:
            return None
        ids = self._ids(before)
        start = 1 if self.bos and ids[:1] == self.bos else 0  # a template may write BOS itself
        return [*self.bos, *ids[start:]], self._ids(after)

    def _around(self, written: str) -> tuple[int, int]:
        """How many ids belong to what the chat template writes before a user's text, and how many to what it
        writes after it. Both are 0 where the template did not write the prompt, or the chat began with a
        system text of its own. A token with some of the user's text in it is counted too, so that the
        template's part stays complete."""
        before, after = self._frame
        if not (before or after) or not written.startswith(before) or not written.endswith(after):
            return 0, 0
        begins, ends = self._places(written)
        return bisect_left(begins, len(before)), len(ends) - bisect_right(ends, len(written) - len(after))

    def _places(self, written: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each token of a prompt, the character at which it begins, and the one before which it ends."""
        offsets = self.tokenizer(
            written, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        begins, ends = zip(*offsets, strict=True)
        return begins, ends

    def _turns(self, prompt: str, spans: Sequence[Span], ids: list[int]) -> tuple[Span, ...]:
        """Spans of a prompt's characters, as spans of its kept ids. A turn that is not kept completely, or
        has nothing before it, is not learnt."""
        if not spans:
            return ()
        begins, ends = self._places(prompt)
        kept = self._kept(prompt, ids)
        bare = len(kept) > 1 or not self.bos  # whether nothing of the prompt precedes a part's first token
        found = []
        place = len(self.bos)  # where the part begins among the kept ids
        for part in kept:
            earliest = part.start + 1 if bare else part.start
            shift = place - part.start
            for start, stop in spans:
                first, end = bisect_right(ends, start), bisect_left(begins, stop)  # the turn's ids
                if earliest <= first and end <= part.stop:
                    found.append((first + shift, end + shift))
            place += part.stop - part.start
        return tuple(found)

    def _end(self, chat: bool = False) -> int:
        """The token that ends an answer; `chat`: of a task whose prompts are chats."""
        return self._chat_end if chat or self.data.chat_template else self.eos

    def _answer(self, text: str, continued: list[int], end: int) -> tuple[list[int], bool]:
        """`continued`: the ids of the answer after a newline. A cut answer has no end token, since it must
        not teach the model to stop in the middle of a text."""
        ids = [*self._continuation(text, continued), end]
        room = self.data.max_answer_tokens
        return ids[:room], len(ids) > room

    def _continuation(self, text: str, continued: list[int]) -> list[int]:
        """Ids of a text that continues another one, without the mark of a word's start. `continued`: the ids
        of the text after a newline, which serve where the newline can be taken off them."""
        n = len(self.newline)
        return continued[n:] if continued[:n] == self.newline else self._ids(text)

    def perfect(self, text: str) -> str:
        """The answer of a model that has learnt `text` perfectly: its tokens up to the first that ends an
        answer, decoded like answers. This differs from `text` if it contains special tokens, or if decoding
        drops a leading space (SentencePiece)."""
        ids = self._continuation(text, self._ids("\n" + text))
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return self.texts([ids[:end]])[0]

    def texts(self, answers: Sequence[list[int]]) -> list[str]:
        """The texts of generated answers, without their end token and special tokens. Spaces before
        punctuation stay, as in TRACE's code, whatever the tokenizer's config says about cleaning up."""
        own = [without_end(ids, self.ends) for ids in answers]
        return self.tokenizer.batch_decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
