"""The judges' verdicts on the answers to one file of prompts: `judged/<file>.jsonl` of a run folder, to which
each is appended as it arrives.
"""

import hashlib
import json
from collections.abc import Iterable

from codyra_llm.core.files import append_jsonl, read_jsonl, write_jsonl
from codyra_llm.store.folder import RunFolder

OUTCOMES = ("win", "tie", "lose")
Key = tuple[str, str]  # the digests of a pair and of a question about it
ORDERS = (("base", "final"), ("final", "base"))  # whose answers A and B are


def pair_digest(pair: dict) -> str:
    """What tells a pair {"prompt", "base", "final"} from others."""
    texts = [pair["prompt"], pair["base"], pair["final"]]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


class Verdicts:
    """Rows {"judge", "question" and "pair" (digests), "A", "B", "verdict", "said"}, by several judges if the
    recipe's has changed. Judges are distinguished by name only, since an endpoint may move while its verdicts
    stay valid. If a pair was judged again in the same order, its last row counts."""

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.file = folder, folder.path / "judged" / f"{name}.jsonl"

    def judged(self, judge: str | None) -> set[Key]:
        """Which questions about which pairs one judge has given a verdict on."""
        rows = self._rows(judge)
        return {(row["pair"], row["question"]) for row in rows if row["verdict"] is not None}

    def outcomes(self, judge: str | None, pairs: Iterable[dict]) -> list[str | None]:
        """Per pair "win", "tie" or "lose" of the final model by one judge, or None where an order was not
        judged or could not be read."""
        verdicts = {(row["pair"], (row["A"], row["B"])): row["verdict"] for row in self._rows(judge)}
        return [_outcome(pair, verdicts) for pair in pairs]

    def _rows(self, judge: str | None) -> list[dict]:
        """One judge's rows that name the pair they are on."""
        return [row for row in read_jsonl(self.file) if row["judge"] == judge and "pair" in row]

    def begin(self, pairs: dict[str, str]) -> None:
        """Drop a last line that a crash cut short, so that more can be appended. Rows of earlier versions
        name no pair: they get it from `pairs`, by the digest of their question."""
        rows = []
        for row in read_jsonl(self.file):
            known = {"pair": pairs[row["question"]]} if row["question"] in pairs else {}
            rows.append(known | row)
        self.folder.may_write()
        write_jsonl(self.file, rows)

    def add(self, row: dict) -> None:
        self.folder.may_write()
        append_jsonl(self.file, row)


def _outcome(pair: dict, verdicts: dict[tuple[str, tuple[str, str]], str | None]) -> str | None:
    """Of one pair, by what each order's verdict says; equal answers, about which nothing is asked, are a
    tie."""
    if pair["base"] == pair["final"]:
        return "tie"
    digest = pair_digest(pair)
    in_one_order, in_the_other = (verdicts.get((digest, order)) for order in ORDERS)
    if in_one_order is None or in_the_other is None:
        return None
    agreed = in_one_order if in_one_order == in_the_other else "tie"
    return {"final": "win", "base": "lose"}.get(agreed, "tie")
