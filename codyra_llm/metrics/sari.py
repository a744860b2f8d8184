"""SARI (Xu et al., 2016, ACL Anthology Q16-1029) in the variant of tensor2tensor, Hugging Face and so
TRACE.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one prediction, 0..100, against one or more references."""
    words = [_words(text) for text in (source, prediction, *references)]
    return 100.0 * sum(_of_length(n, words) for n in range(1, 5)) / 4


@cache
def _tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # slow to import, and of use to SARI alone

    return Tokenizer13a()


def _words(text: str) -> list[str]:
    return _tokenizer()(text.lower()).split(" ")  # an empty text is one empty word, as published


def _of_length(n: int, texts: list[list[str]]) -> float:
    """Of a source, a prediction and references, their n-grams' share in SARI."""
    grams = [_grams(words, n) for words in texts]
    distinct = [set(of_text) for of_text in grams]
    once_each = all(len(a) == len(b) for a, b in zip(grams, distinct, strict=True))
    if len(texts) == 3 and once_each:
        return _sari_sets(*distinct)
    return _sari_counts(*map(Counter, grams))


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    shifted = (words[i:] for i in range(n))
    return list(zip(*shifted, strict=False))


def _sari_sets(source: set, prediction: set, reference: set) -> float:
    """`_sari_counts` of n-grams that are there once each, as most long ones are."""
    kept, to_keep = source & prediction, source & reference
    rightly_kept = len(kept & reference)
    keep = _f1(_ratio(rightly_kept, len(kept)), _ratio(rightly_kept, len(to_keep)))
    deleted = source - prediction
    delete = _ratio(len(deleted - reference), len(deleted))
    return (keep + delete + _added(source, prediction, reference)) / 3


def _added(source: Collection, prediction: Collection, reference: Collection) -> float:
    """F1 of the n-grams that are not in the source."""
    added, to_add = set(prediction) - set(source), set(reference) - set(source)
    rightly_added = len(added & to_add)
    return _f1(_ratio(rightly_added, len(added)), _ratio(rightly_added, len(to_add)))


def _sari_counts(source: Counter, prediction: Counter, *references: Counter) -> float:
    """(F1 of kept + precision of deleted + F1 of added) / 3; counts are multiplied by the number of
    references.
    """
    reference = references[0] if len(references) == 1 else sum(references, Counter())
    times = len(references)
    kept = deleted = rightly_kept = to_keep = 0
    kept_shares = deleted_shares = 0.0
    elsewhere = prediction.keys() | reference.keys()
    for gram, count in source.items():
        if gram not in elsewhere:  # most are not
            deleted_shares += 1.0
            deleted += 1
            continue
        given, wanted = prediction.get(gram, 0), reference.get(gram, 0)
        to_keep += min(count * times, wanted)
        if given:
            all_kept = min(count, given) * times
            rightly_kept += min(all_kept, wanted)
            kept_shares += min(all_kept, wanted) / all_kept
            kept += 1
        if count > given:
            all_deleted = (count - given) * times
            deleted_shares += max(all_deleted - wanted, 0) / all_deleted
            deleted += 1
    keep = _f1(_ratio(kept_shares, kept), _ratio(rightly_kept, to_keep))
    delete = _ratio(deleted_shares, deleted)
    return (keep + delete + _added(source, prediction, reference)) / 3


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0  # 0/0 = 1: nothing to do, and nothing done wrongly


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
