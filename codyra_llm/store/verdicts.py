"""The judges' verdicts on the answers to one file of prompts: `judged/<file>.jsonl` of a run folder, to which
each is appended as it arrives.
"""

from codyra_llm.core.files import append_jsonl, read_jsonl, write_jsonl
from codyra_llm.store.folder import RunFolder


class Verdicts:
    """Rows {"judge", "question" (a digest), "A", "B", "verdict", "said"}, by several judges if the recipe's
    has changed. Judges are distinguished by name only, since an endpoint may move while its verdicts stay
    valid. If a question was asked again, its last row counts."""

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.file = folder, folder.path / "judged" / f"{name}.jsonl"

    def of(self, judge: str | None) -> dict[str, str | None]:
        """The verdicts of one judge by the digest of the question; None where its reply contained none."""
        return {row["question"]: row["verdict"] for row in read_jsonl(self.file) if row["judge"] == judge}

    def begin(self) -> None:
        """Drop a last line that a crash cut short, so that more can be appended."""
        self.folder.may_write()
        write_jsonl(self.file, read_jsonl(self.file))

    def add(self, row: dict) -> None:
        self.folder.may_write()
        append_jsonl(self.file, row)
