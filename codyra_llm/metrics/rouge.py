"""ROUGE-L as the `rouge` package computes it, to the last digit, in bounded time.

The package fills a table of |x|·|y| cells in Python for every pair of sentences, and walks it back
recursively. Here a row of the table is one integer (Hyyrö 2004, "Bit-parallel LCS-length computation
revisited"), and a pair of sentences that can add no word is not looked at.
"""

from collections.abc import Sequence

SMOOTHING = 1e-8  # the package's, in the denominator of F1


def rouge_l(evaluated: str, reference: str) -> float:
    """F1 in 0..1 over the words in the union of the longest common subsequences of all pairs of sentences.

    Sentences end at '.', words at white space and each counts once. Both texts need a sentence, that is a
    character other than '.'.
    """
    if evaluated == reference:
        return 2.0 * ((1.0 * 1.0) / (1.0 + 1.0 + SMOOTHING))
    ours, theirs = sentences(evaluated), sentences(reference)
    sentences_with = _index(ours)
    common: set[str] = set()
    for sentence in theirs:
        missing = (sentences_with.keys() & set(sentence)) - common
        # In the order of the text, and only while a pair can still add a word.
        for number in sorted({number for word in missing for number in sentences_with[word]}):
            if not missing.isdisjoint(ours[number]):
                common.update(common_subsequence(sentence, ours[number]))
                missing -= common
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + SMOOTHING))


def _index(found: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """By word, the numbers of the sentences that it is in."""
    sentences_with: dict[str, list[int]] = {}
    for number, sentence in enumerate(found):
        for word in set(sentence):
            sentences_with.setdefault(word, []).append(number)
    return sentences_with


def sentences(text: str) -> list[list[str]]:
    """The different sentences of a text as lists of words. One of white space alone is one empty word."""
    parts = [" ".join(part.split()) for part in text.split(".") if part]
    return [part.split(" ") for part in dict.fromkeys(parts)]


def common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """A longest common subsequence of x and y. Of several it is the package's, whose walk back through the
    table goes left, along y, where both ways are equally long."""
    if x == y:  # the walk keeps to the diagonal
        return list(x)
    rows = _rows(x, y)
    i, j, length = len(x), len(y), _length(rows[-1], len(y))
    found: list[str] = []
    while i and j:
        above, left = _length(rows[i - 1], j), length - _step(rows[i], j)
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j, length = i - 1, j - 1, length - 1
        elif above > left:
            i, length = i - 1, above
        else:
            j, length = j - 1, left
    return found[::-1]


def _rows(x: Sequence[str], y: Sequence[str]) -> list[int]:
    """The rows i = 0 .. len(x) of the table, one integer each: bit j - 1 of row i is 0 where
    L(i, j) = L(i, j - 1) + 1. L(i, j) is the length of the longest common subsequence of x[:i] and y[:j]."""
    places: dict[str, int] = {}
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    full = (1 << len(y)) - 1
    rows = [full]
    for word in x:
        row = rows[-1]
        matches = row & places.get(word, 0)
        rows.append(((row + matches) | (row - matches)) & full)
    return rows


def _step(row: int, j: int) -> int:
    """L(i, j) - L(i, j - 1)."""
    return 1 - (row >> (j - 1) & 1)


def _length(row: int, j: int) -> int:
    """L(i, j): the zeros among the first j bits."""
    return j - (row & ((1 << j) - 1)).bit_count()
