"""SARI (Xu et al., 2016, ACL Anthology Q16-1029) in the variant of tensor2tensor, Hugging Face and so
TRACE.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one prediction, 0..100, against one or more references."""
    words = [_words(text) for text in (source, prediction, *references)]
    return 100.0 * sum(_sari_ngrams(*(_ngrams(w, n) for w in words)) for n in range(1, 5)) / 4


@cache
def _tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # slow to import, and of use to SARI alone

    return Tokenizer13a()


def _words(text: str) -> list[str]:
    return _tokenizer()(text.lower()).split(" ")  # an empty text is one empty word, as published


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _sari_ngrams(source: Counter, prediction: Counter, *references: Counter) -> float:
    """(F1 of kept + precision of deleted + F1 of added) / 3; counts are multiplied by the number of
    references.
    """
    reference = sum(references, Counter())
    source, prediction = (
        Counter({g: c * len(references) for g, c in x.items()}) for x in (source, prediction)
    )

    kept, to_keep = source & prediction, source & reference
    good = kept & reference
    keep = _f1(_ratio(sum(good[g] / kept[g] for g in good), len(kept)), _ratio(good.total(), to_keep.total()))

    deleted = source - prediction
    good = deleted - reference
    delete = _ratio(sum(good[g] / deleted[g] for g in good), len(deleted))

    added, to_add = prediction.keys() - source.keys(), reference.keys() - source.keys()
    add = _f1(_ratio(len(added & to_add), len(added)), _ratio(len(added & to_add), len(to_add)))
    return (keep + delete + add) / 3


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0  # 0/0 = 1: nothing to do, and nothing done wrongly


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
