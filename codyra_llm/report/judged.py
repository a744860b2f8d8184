"""The judge's verdicts on the open-ended answers, from the run folder alone; needs no model."""

from collections.abc import Iterable
from typing import Any

from codyra_llm.config.recipe import Recipe
from codyra_llm.evaluate.questions import criterion
from codyra_llm.report.grid import Cell, Grid, markdown, number, word
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.verdicts import OUTCOMES, Verdicts


def summarise(recipe: Recipe, folder: RunFolder) -> dict | None:
    """`{"judge", "files": {name: {"criterion", "answered", "judged", "win", "tie", "lose"}}}`, as
    `tally` counts; None where the recipe has no open-ended prompts."""
    asked = recipe.open_ended
    if asked.prompts is None:
        return None
    files, all_of = {}, {}
    for name in sorted(path.stem for path in (folder.path / "answers").glob("*.jsonl")):
        pairs, kind = folder.pairs(name), criterion(name)
        found = []
        if asked.judge.base_url:
            found = Verdicts(folder, name).outcomes(asked.judge.model, pairs)
        files[name] = {"criterion": kind, "answered": len(pairs), **tally(found)}
        all_of.setdefault(kind, []).append((len(pairs), found))
    for kind, parts in all_of.items():
        if len(parts) > 1:
            answered = sum(count for count, _ in parts)
            counted = tally(one for _, found in parts for one in found)
            files[f"all: {kind}"] = {"criterion": kind, "answered": answered, **counted}
    return {"judge": asked.judge.model if asked.judge.base_url else None, "files": files}


def tally(found: Iterable[str | None]) -> dict[str, Any]:
    """`{"judged": n, "win": {"share", "low", "high", "n"}, "tie": ..., "lose": ...}`: shares in percent with
    Wilson's 95 % score interval, (p̂ + z²/2n ± z·sqrt(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n). Outcomes of None
    are left out."""
    from scipy.stats import binomtest  # slow to import

    counted = [one for one in found if one is not None]
    out: dict[str, Any] = {"judged": len(counted)}
    for outcome in OUTCOMES if counted else ():
        n = counted.count(outcome)
        interval = binomtest(n, len(counted)).proportion_ci(0.95, "wilson")
        out[outcome] = {
            "share": 100 * n / len(counted),
            "low": 100 * interval.low,
            "high": 100 * interval.high,
            "n": n,
        }
    return out


def grid(found: dict | None) -> Grid | None:
    """The table of `summarise`; its note says so where nothing was judged."""
    if not found or not found["files"]:
        return None
    lines = []
    for name, row in found["files"].items():
        counts = [number(row["answered"], "d"), number(row["judged"], "d")]
        shares = [_share(row.get(outcome)) for outcome in OUTCOMES]
        lines.append((name, [word(row["criterion"]), *counts, *shares]))
    columns = ["judged by", "answered", "judged", *OUTCOMES]
    return Grid("open-ended answers", "prompts", columns, lines, _note(found)).filled()


def _share(row: dict | None) -> Cell | None:
    if row is None:
        return None
    return number(
        row["share"],
        low=row["low"],
        high=row["high"],
        small=f"{row['low']:.0f}–{row['high']:.0f}",
        hint=f"{row['n']} pairs",
    )


def _note(found: dict) -> str:
    stored = "Answers of base and final model lie side by side in answers/."
    if found["judge"] is None:
        return f"{stored} They were not judged: the recipe names no endpoint (open_ended.judge.base_url)."
    lacking = 0
    for name, row in found["files"].items():
        if not name.startswith("all: "):  # a sum over files
            lacking += row["answered"] - row["judged"]
    return (
        f"{stored} Share in % of the pairs that the final model wins, ties or loses against the base by the "
        f"verdict of {found['judge']}, with Wilson's 95 % interval over prompts. Each pair was judged in "
        "both orders; where these disagree it is a tie, as are equal answers."
        + (f" Not judged, or with no verdict in the reply: {lacking}." if lacking else "")
    )


def lines(found: dict | None) -> list[str]:
    """The same table as lines of Markdown; none where nothing was answered."""
    table = grid(found)
    return ["", markdown([table]).rstrip()] if table else []
