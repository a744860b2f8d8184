"""How long the rest of a run will take: the remaining work at the measured speed."""

from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a run. `kind`: learn, load (a model to evaluate), answer, general, close; `stage`: how many
    tasks are learnt at that point.
    """

    kind: str
    name: str
    stage: int


class Forecast:
    """`due`: the remaining pieces, each with its amount (tokens to learn, prompts to answer, 1 where there is
    nothing to count).
    """

    def __init__(self) -> None:
        self.due: dict[Piece, float] = {}
        # (amount, seconds) of the pieces done, by (kind, name) and by (kind, None).
        self.spent: dict[tuple[str, str | None], tuple[float, float]] = {}

    def done(self, piece: Piece, amount: float, seconds: float) -> None:
        """Take a piece off what is due, and learn from how long it took."""
        self.due.pop(piece, None)
        for key in ((piece.kind, piece.name), (piece.kind, None)):
            amounts, times = self.spent.get(key, (0.0, 0.0))
            self.spent[key] = amounts + amount, times + seconds

    def seconds(self, piece: Piece, amount: float) -> float | None:
        """Seconds for `amount` of a piece: at the speed of earlier pieces of the same name (a task's prompts
        are answered again after every task), else at the mean speed of its kind; None where nothing of the
        kind was measured yet."""
        for key in ((piece.kind, piece.name), (piece.kind, None)):
            done, spent = self.spent.get(key, (0.0, 0.0))
            if done:
                return amount * spent / done
        return None

    def left(self, learning: float | None = None) -> tuple[float, bool]:
        """Seconds for all that is due, and whether every piece could be estimated. `learning`: seconds per
        token of the steps of the current task, used while no task is finished; this leaves out what a task
        does before and after its steps, so the estimate is then a lower bound."""
        total, whole = 0.0, True
        for piece, amount in self.due.items():
            found = self.seconds(piece, amount)
            whole &= found is not None
            if found is None and piece.kind == "learn" and learning:
                found = amount * learning
            total += found or 0.0
        return total, whole


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 5 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
