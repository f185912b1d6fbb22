"""The measured strength curve: score, coherence, damage and spill against m, on both sides of 0."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluation, Evaluator, Sample, Unsteered
from trimtab.evaluation.spread import run_groups
from trimtab.evaluation.summary import KL_NOTE
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.results import Progress
from trimtab.results.journal import Journal
from trimtab.results.tables import Printable, Table
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import COLUMNS, SweepRow, sweep_row

# Strengths measured together: enough to fill a batch, few enough that progress moves.
GROUP = 8


@dataclass(frozen=True)
class Sweep(Printable):
    """A curve: rows by rising strength; at m = 0 first the away side, then the toward side."""

    behavior: str
    label: str
    layers: tuple[int, ...]
    rows: tuple[SweepRow, ...]

    def side(self, sign: int) -> tuple[SweepRow, ...]:
        """Return the rows of one side, its m = 0 row included, by rising strength."""
        return tuple(row for row in self.rows if row.sign == sign)

    def table(self) -> Table:
        return Table(
            f"{self.behavior}: {self.label} at the layers {', '.join(map(str, self.layers))}",
            COLUMNS,
            tuple(row.cells() for row in self.rows),
            (KL_NOTE,),
        )


@dataclass(frozen=True)
class Tried:
    """One cell of a search: where it was steered, what came out, and what was made of it.

    `stage` is `screened` (few prompts) or `confirmed` (all of them); `verdict` is `passed`, or what
    it failed by.
    """

    layers: tuple[int, ...]
    stage: str
    verdict: str
    row: SweepRow
    scope: str = ""


class NoStrengthPasses(TrimtabError):
    """No strength passed; carries the curve.

    Attributes:
        baseline: the unsteered row.
        tried: every cell.
    """

    def __init__(
        self, asked: str, found: str, advice: str, baseline: SweepRow, tried: tuple[Tried, ...]
    ) -> None:
        super().__init__(asked, found, advice)
        self.baseline, self.tried = baseline, tried

    def table(self) -> Table:
        rows = [("unsteered", "", "", *self.baseline.cells())]
        for t in self.tried:
            rows.append((", ".join(map(str, t.layers)), t.stage, t.verdict, *t.row.cells()))
        return Table(
            "layers and strengths tried",
            ("layers", "stage", "verdict", *COLUMNS),
            tuple(rows),
            (f"validation prompts; {KL_NOTE}",),
        )


def sweep(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    strengths: Sequence[float],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_prompts: int | None = MAX_PROMPTS,
    seed: int = 0,
    unsteered: Unsteered | None = None,
    progress: Progress | None = None,
    journal: str | os.PathLike[str] | None = None,
    batched: bool = True,
    engine: Engine | None = None,
) -> Sweep:
    """Measure a vector at every strength, each sign on the prompts it is meant to change.

    Args:
        lm: the unsteered model.
        behavior: the split to measure on, all its examples are used.
        vector: what is scaled; its own strength does not matter.
        strengths: multipliers m of any sign; 0 gives one unsteered row per side.
        max_new_tokens: length of answers.
        max_prompts: cap per side; None for all.
        seed: of the bootstrap.
        unsteered: answers to share with other measurements of this model at this length.
        progress: called with (rows measured, rows in all).
        journal: file that keeps every finished row; the same sweep, or one of the same lever with
            other strengths, continues from there.
        batched: measure the strengths of a side together, a few at a time; else one by one, which
            gives the same figures more slowly.
        engine: measures the groups of strengths; this process by default.

    Raises:
        TrimtabError: without strengths, with the journal of another sweep, or as `Evaluator` does.
    """
    if not strengths:
        raise TrimtabError(
            asked="a sweep", found="no strengths", advice="give some, e.g. -2, -1, 0, 1, 2"
        )
    evaluator = Evaluator(
        lm,
        behavior,
        max_new_tokens=max_new_tokens,
        max_prompts=max_prompts,
        unsteered=unsteered,
        engine=engine,
    )
    evaluator.engine.expect([vector])
    points = [
        (strength, sign)
        for strength in sorted({float(s) for s in strengths})
        for sign in ((-1, 1) if strength == 0 else (1,) if strength > 0 else (-1,))
    ]
    kept = None if journal is None else Journal(journal, _header(evaluator, vector, seed))
    rows = {} if kept is None else _written(kept, points)
    groups: list[tuple[list[float], int]] = []
    for side in (-1, 1):
        missing = [m for m, sign in points if sign == side and (m, sign) not in rows]
        size = GROUP if batched else 1
        groups += [(missing[i : i + size], side) for i in range(0, len(missing), size)]

    def done(number: int, results: list[Evaluation]) -> None:
        strengths, _ = groups[number]
        found = [
            sweep_row(vector.at(m), result, seed)
            for m, result in zip(strengths, results, strict=True)
        ]
        if kept is not None:
            # One entry, so that what was measured together is kept or lost together.
            kept.add({"rows": [asdict(row) for row in found]})
        for row in found:
            rows[row.strength, row.sign] = row
            if progress is not None:
                progress(len(rows), len(points))

    run_groups(evaluator, vector, groups, done)
    ordered = tuple(rows[point] for point in points)
    method = vector.provenance.get("method") or "vector"
    label = f"{method} ({vector.operation}, {vector.scope})"
    return Sweep(behavior.name, label, tuple(vector.layers), ordered)


def _header(evaluator: Evaluator, vector: VectorSteering, seed: int) -> dict[str, object]:
    """What decides about a row, but its strength."""
    lm = evaluator.lm
    return {
        "work": "sweep",
        "model": lm.fingerprint,
        "dtype": str(lm.model.dtype),
        "system": lm.system,
        "inserts": [asdict(insert) for insert in lm.inserts],
        "vector": _hash(vector),
        "behavior": evaluator.behavior.data_hash,
        "max_new_tokens": evaluator.max_new_tokens,
        "max_prompts": evaluator.max_prompts,
        "seed": seed,
    }


def _hash(vector: VectorSteering) -> str:
    """SHA-256 of the vector's steering file, whose bytes depend on its content alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = vector.at(1.0).save(os.path.join(folder, "vector.safetensors"))
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _written(
    journal: Journal, points: Sequence[tuple[float, int]]
) -> dict[tuple[float, int], SweepRow]:
    """The rows of a journal that belong to these points."""
    found: dict[tuple[float, int], SweepRow] = {}
    for entry in journal.entries:
        for fields in entry["rows"]:
            row = SweepRow(
                **{
                    **fields,
                    # JSON has only text for keys, and lists for tuples.
                    "alphas": {int(layer): alpha for layer, alpha in fields["alphas"].items()},
                    "scores": tuple(fields["scores"]),
                    "samples": tuple(Sample(**sample) for sample in fields["samples"]),
                }
            )
            if (row.strength, row.sign) in points:
                found[row.strength, row.sign] = row
    return found
