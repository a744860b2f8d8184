"""TRACE's metrics, from which any benchmark can choose: each is a mean over examples of a score in 0..100.

They compute with plain lists; `metrics.hf` turns one into an `evaluate.Metric`.

Two rules exist for the same outputs: names without a suffix follow the TRACE code, `_treelora` the more
lenient one of TreeLoRA. Where the published code crashes (an empty ScienceQA prediction; ROUGE of a text of
full stops only, or of a long sentence) the definition's value is returned; no score that it does compute is
changed. `VERSION` of a metric rises whenever any of its scores can change; results store `versioned(name)`.
"""

import difflib
import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from rapidfuzz.distance import Indel

from codyra_llm.metrics.rouge import rouge_l
from codyra_llm.metrics.sari import sari


class ExampleMean:
    """Mean of `example(prompt, prediction, answer)`, 0..100."""

    VERSION: ClassVar[int] = 1
    metric: ClassVar[str]
    takes_sources: ClassVar[bool] = False  # whether the score depends on the prompt
    bounds: ClassVar[tuple[float, float]] = (0.0, 100.0)  # of `example`
    higher_is_better: ClassVar[bool] = True

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """The score of one prediction, within `bounds`."""
        raise NotImplementedError

    @classmethod
    def score(cls, prompt: str, prediction: str, answer: str) -> float:
        """`example` on the scale of all reports, 0 (worst) to 100 (best). Raises ValueError for a value
        outside the bounds."""
        value = cls.example(prompt, prediction, answer)
        low, high = cls.bounds
        slack = 1e-9 * (high - low)  # a sum may be rounded past its bound
        if not low - slack <= value <= high + slack:
            raise ValueError(f"{cls.metric} gave {value}, expected a number from {low:g} to {high:g}")
        if cls.bounds == (0.0, 100.0) and cls.higher_is_better:
            return value
        share = (value - low) / (high - low)
        return 100.0 * (share if cls.higher_is_better else 1.0 - share)

    @classmethod
    def compute(
        cls,
        *,
        predictions: Sequence[str],
        references: Sequence[str],
        sources: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """`{metric: mean}` over n predictions, n answers and, where `takes_sources`, n prompts; NaN of none.

        Raises ValueError where the lists differ in length, or prompts that the metric looks at are missing.
        """
        if sources is None:
            if cls.takes_sources:
                raise ValueError(f"{cls.metric} compares with the prompts; give them as sources")
            sources = [""] * len(predictions)
        rows = zip(sources, predictions, references, strict=True)
        scores = [cls.score(*row) for row in rows]
        return {cls.metric: fmean(scores) if scores else math.nan}


class ExactMatch(ExampleMean):
    """Share of predictions equal to the answer, character for character: neither stripped nor case-folded.

    An empty prediction or answer counts 0, also against each other.
    """

    metric = "exact_match"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """100 or 0."""
        return 100.0 if answer and prediction == answer else 0.0


class ExactMatchTreelora(ExampleMean):
    """Share of predictions that, stripped and cut to the length of the stripped answer, equal it:
    'A. because' matches 'A'.

    Beware of numbers: '12' matches '1'. An empty prediction or answer counts 0. The published code strips the
    prediction alone, so that an answer with a space in front is never matched; of other answers the scores
    are the same.
    """

    VERSION = 2  # the answer is stripped too
    metric = "exact_match_treelora"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """100 or 0."""
        answer = answer.strip()
        return 100.0 if answer and prediction.strip().startswith(answer) else 0.0


class FirstChar(ExampleMean):
    """ScienceQA's accuracy: exact match of the first characters. An empty prediction or answer counts 0."""

    metric = "first_char"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """100 or 0."""
        return ExactMatch.example(prompt, prediction[:1], answer[:1])


class FirstCharTreelora(ExampleMean):
    """ScienceQA's accuracy with both texts stripped first, an empty one read as 'N/A', and the lenient
    match.
    """

    metric = "first_char_treelora"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """100 or 0."""
        return ExactMatchTreelora.example(
            prompt, prediction.strip()[:1] or "N/A", answer.strip()[:1] or "N/A"
        )


class RougeL(ExampleMean):
    """ROUGE-L F1 of the `rouge` package: sentences end at '.', words at white space, words counted once (as
    sets).

    The union of the longest common subsequences of all pairs of sentences. The package's F1 is not symmetric
    where a text has several sentences: the answer goes first, as in TRACE. Chinese text has no white space,
    so the score means nothing there. A text without any sentence (empty, or full stops only) counts 0."""

    metric = "rouge_l"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100."""
        return _rouge_l(prediction, answer)


class RougeLTreelora(ExampleMean):
    """ROUGE-L F1 with a newline added to a prediction that has none, as in TreeLoRA's metrics.py.

    The newline gives a prediction that ends in '.' one more, empty word, which an answer has only if white
    space follows its last full stop: the F1 of "the cat sat." against itself is 6/7. An empty text counts 0.
    """

    VERSION = 2  # the answer gets no newline, nor does a prediction that has one
    metric = "rouge_l_treelora"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100."""
        if not prediction:
            return 0.0
        return _rouge_l(prediction if "\n" in prediction else prediction + "\n", answer)


class ReasonRougeL(ExampleMean):
    """ROUGE-L F1 of ScienceQA's reasons: both texts from the third character on, after the letter and a
    newline.
    """

    metric = "reason_rouge_l"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100."""
        return _rouge_l(prediction[2:], answer[2:])


class EditSimilarity(ExampleMean):
    """Py150's similarity of code, rounded to an integer: 1 - (insertions + deletions) / (sum of both
    lengths).

    Literals are written out first (see `literals`). It is fuzzywuzzy's ratio where python-Levenshtein is
    installed. A text that is empty then counts 0.
    """

    metric = "edit_similarity"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100, a whole number."""
        a, b = literals(prediction), literals(answer)
        return float(round(100 * Indel.normalized_similarity(a, b))) if a and b else 0.0


class EditSimilarityDifflib(ExampleMean):
    """Py150's similarity as fuzzywuzzy computes it without python-Levenshtein: difflib's matching blocks,
    rounded.

    Apart from rounding it is never above `edit_similarity`, and often below. Which of the two a published
    number is depends on the environment it was computed in."""

    metric = "edit_similarity_difflib"

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100, a whole number."""
        a, b = literals(prediction), literals(answer)
        return float(round(100 * difflib.SequenceMatcher(None, a, b).ratio())) if a and b else 0.0


class Sari(ExampleMean):
    """SARI (Xu et al., 2016) of a simplification; the source is the full prompt with its instruction, one
    reference.

    Mean over n = 1..4 of (F1 of kept + precision of deleted + F1 of added n-grams) / 3, in lower case and the
    13a tokenisation, with 0/0 = 1: tensor2tensor's variant, the one of Hugging Face's metric and so of TRACE.
    Note that the reference itself scores just below 100 where the source repeats one of its words, and that
    an empty prediction scores far above 0, for all that it deletes."""

    metric = "sari"
    takes_sources = True

    @staticmethod
    def example(prompt: str, prediction: str, answer: str) -> float:
        """0 to 100."""
        return sari(prompt, prediction, [answer])


METRICS: dict[str, type[ExampleMean]] = {cls.metric: cls for cls in ExampleMean.__subclasses__()}


def versioned(metric: str) -> str:
    """Name with version, e.g. 'sari@1': scores under different versions are not comparable."""
    return f"{metric}@{METRICS[metric].VERSION}"


def literals(code: str) -> str:
    """Py150's code with literals written out: <NUM_LIT> is 0, <STR_LIT> and <CHAR_LIT> nothing, <STR_LIT:x>
    is x.
    """
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    # One literal after another in the whole text, as published: a single pass differs where literals are
    # nested.
    closed = code[: code.rfind(">") + 1]  # what is never closed would be searched to the end from every start
    for kind, value in re.findall(r"<(STR|NUM|CHAR)_LIT:(.*?)>", closed, re.DOTALL):
        code = code.replace(f"<{kind}_LIT:{value}>", value)
    return code


def _rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1, 0 to 100; 0 where one of the texts has no sentence."""
    if not prediction.strip(".") or not answer.strip("."):
        return 0.0
    return 100.0 * rouge_l(answer, prediction)
