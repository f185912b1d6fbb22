"""Layers and strength from a grid: screened on a few prompts, confirmed on all, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table
from trimtab.steering.vector import VectorSteering
from trimtab.strength.sweep import COLUMNS, SweepRow, sweep_row

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.model import LanguageModel


@dataclass(frozen=True)
class Tried:
    """One cell of the grid: where it was steered, what came out, and what was made of it.

    `stage` is `screened` (few prompts) or `confirmed` (all of them); `verdict` is `chosen`,
    `passed`, or what it failed by. `scope` is empty where all cells share the vector's own.
    """

    layers: tuple[int, ...]
    stage: str
    verdict: str
    row: SweepRow
    scope: str = ""


@dataclass(frozen=True)
class Choice(Printable):
    """The vector with the best layers and strength, and every cell that was tried.

    Its score was selected on these prompts, so it flatters: report the one on the test split.
    """

    vector: VectorSteering
    chosen: Tried
    baseline: SweepRow
    tried: tuple[Tried, ...]

    def table(self) -> Table:
        """Return one line per cell tried."""
        return _table(self.tried, self.baseline)

    def to_dict(self) -> dict[str, object]:
        """Return the curve as plain values; the vector's tensors have their own file."""
        return _Curve(self.vector.label, self.chosen, self.baseline, self.tried).to_dict()


@dataclass(frozen=True)
class _Curve(Printable):
    vector: str
    chosen: Tried
    baseline: SweepRow
    tried: tuple[Tried, ...]


class NoStrengthPasses(TrimtabError):
    """No cell of the grid passed; carries the curve.

    Attributes:
        baseline: the unsteered row.
        tried: every cell, as in `Choice`.
    """

    def __init__(
        self, asked: str, found: str, advice: str, baseline: SweepRow, tried: tuple[Tried, ...]
    ) -> None:
        """Keep the curve beside the three lines of the message."""
        super().__init__(asked, found, advice)
        self.baseline, self.tried = baseline, tried

    def table(self) -> Table:
        """Return one line per cell tried."""
        return _table(self.tried, self.baseline)


def choose(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    layers: Sequence[Sequence[int]],
    strengths: Sequence[float],
    sign: int = 1,
    coherence_floor: float = 0.9,
    damage_budget: float | None = None,
    screen: int = 8,
    confirm: int = 3,
    max_new_tokens: int = 40,
    seed: int = 0,
    unsteered: Unsteered | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose the layers and the strength of highest score whose text and damage stay sound.

    A cell passes when it scores above the unsteered model, keeps a mean coherence of at least
    `coherence_floor`, and a 95th percentile of damage of at most `damage_budget`. Every cell is
    screened on the first `screen` prompts of each side; then cells are confirmed on all prompts,
    `confirm` at a time from the best screened downwards, until a round has one that passes. Cells
    that could not reach the coherence floor even if all further answers were perfect are not
    confirmed. Ties go to the smaller damage, then to fewer layers, then to the weaker strength.

    Args:
        lm: the unsteered model.
        behavior: the validation split.
        vector: its directions are tried; scope, site and operation stay.
        layers: layer tuples to try, e.g. [(4,), (5,), (4, 5, 6)].
        strengths: magnitudes of m; the sign comes from `sign`.
        sign: +1 for toward, -1 for away.
        coherence_floor: least mean coherence.
        damage_budget: greatest p95 damage in nats per token; None for no bound.
        screen: prompts per side of the first look.
        confirm: cells confirmed per round.
        max_new_tokens: length of answers.
        seed: of the bootstrap.
        unsteered: answers to share with other measurements of this model at this length.
        progress: called with (cells measured, cells planned); further rounds raise the plan.

    Raises:
        NoStrengthPasses: when no cell passes; it carries the curve.
        TrimtabError: for an empty grid or an unusable behavior.
    """
    side = 1 if sign > 0 else -1
    magnitudes = sorted({abs(float(s)) for s in strengths} - {0.0})
    if not layers or not magnitudes or min(screen, confirm) < 1:
        raise TrimtabError(
            asked="to choose layers and strength",
            found=f"{len(layers)} layer sets, {len(magnitudes)} strengths other than 0, "
            f"screen {screen}, confirm {confirm}",
            advice="give at least one of each",
        )
    grid = [vector.select(layers=tuple(at), strength=side * m) for at in layers for m in magnitudes]
    shared = unsteered or Unsteered(lm, max_new_tokens)
    full = Evaluator(lm, behavior, max_new_tokens=max_new_tokens, unsteered=shared)
    few = Evaluator(
        lm, behavior, max_new_tokens=max_new_tokens, max_prompts=screen, unsteered=shared
    )
    scored = full.scored(side)
    n, n_few = len(full.prompts(scored)), len(few.prompts(scored))
    zero = vector.at(0.0)
    baseline = sweep_row(zero, full.run(None, side), seed)

    def failing(row: SweepRow) -> str:
        if row.coherence < coherence_floor:
            return "coherence"
        if damage_budget is not None and row.damage_p95 > damage_budget:
            return "damage"
        return "" if row.score > baseline.score else "no gain"

    screened: list[Tried] = []
    for steering in grid:
        row = sweep_row(steering, few.run(steering, side), seed)
        screened.append(Tried(steering.layers, "screened", failing(row) or "passed", row))
        if progress is not None:
            progress(len(screened), len(grid) + confirm)
    order = sorted(screened, key=lambda t: (t.verdict != "passed", *_rank(t)))
    hopeful = [
        t for t in order if t.row.coherence * n_few + (n - n_few) >= coherence_floor * n - 1e-9
    ]
    confirmed: list[Tried] = []
    for start in range(0, len(hopeful), confirm):
        for candidate in hopeful[start : start + confirm]:
            steering = vector.select(layers=candidate.layers, strength=candidate.row.strength)
            row = sweep_row(steering, full.run(steering, side), seed)
            confirmed.append(Tried(steering.layers, "confirmed", failing(row) or "passed", row))
            if progress is not None:
                planned = len(grid) + max(confirm, len(confirmed))
                progress(len(grid) + len(confirmed), planned)
        if any(tried.verdict == "passed" for tried in confirmed):
            break
    passing = sorted((t for t in confirmed if t.verdict == "passed"), key=_rank)
    if not passing:
        raise _refusal(
            behavior, side, coherence_floor, damage_budget, baseline, confirmed, screened
        )
    chosen = Tried(passing[0].layers, "confirmed", "chosen", passing[0].row)
    tried = tuple(chosen if t is passing[0] else t for t in confirmed) + tuple(screened)
    best = vector.select(layers=chosen.layers, strength=chosen.row.strength)
    return Choice(best, chosen, baseline, tried)


def _rank(tried: Tried) -> tuple[float, float, int, float]:
    row = tried.row
    return -row.score, row.damage_p95, len(tried.layers), abs(row.strength)


def _cell(tried: Tried) -> str:
    return f"layers {', '.join(map(str, tried.layers))} at m = {tried.row.strength:+g}"


def _refusal(
    behavior: Behavior,
    sign: int,
    coherence_floor: float,
    damage_budget: float | None,
    baseline: SweepRow,
    confirmed: Sequence[Tried],
    screened: Sequence[Tried],
) -> NoStrengthPasses:
    tried = (*confirmed, *screened)
    budget = "" if damage_budget is None else f" and p95 damage at most {damage_budget:g} nats"
    curve = "; ".join(
        f"{_cell(t)}: score {t.row.score:.2f}, coherence {t.row.coherence:.2f}, "
        f"p95 damage {t.row.damage_p95:.2f} ({t.stage}, {t.verdict})"
        for t in sorted(confirmed or screened, key=_rank)[:5]
    )
    return NoStrengthPasses(
        asked=f"a strength that moves {behavior.name!r} {'toward' if sign > 0 else 'away'} from a "
        f"score of {baseline.score:.2f} with coherence of at least {coherence_floor:g}{budget}",
        found=f"none of {len(screened)} cells passes; the best: {curve}",
        advice="look at the error's table(); try other layers, other strengths, scope or method, "
        "or relax a bound",
        baseline=baseline,
        tried=tried,
    )


def _table(tried: Sequence[Tried], baseline: SweepRow) -> Table:
    rows = [("unsteered", "", "", *baseline.cells())]
    rows += [(", ".join(map(str, t.layers)), t.stage, t.verdict, *t.row.cells()) for t in tried]
    notes = (
        "selected on these prompts, so the chosen score flatters: measure it on the test split",
        "intervals 95 %; damage and spill in nats per token",
    )
    return Table(
        "layers and strengths tried", ("layers", "stage", "verdict", *COLUMNS), tuple(rows), notes
    )
