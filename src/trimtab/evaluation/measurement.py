"""What `measure` returns: rows that print as a table, convert to a dict and save as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.arguments import Side, sign_of
from trimtab.errors import TrimtabError
from trimtab.evaluation.summary import Summary, alpha_text, with_p95
from trimtab.results.intervals import paired_bootstrap
from trimtab.results.tables import Printable, Table, escape, number, with_interval


@dataclass(frozen=True, kw_only=True)
class Row(Summary):
    """One lever measured in one direction.

    Attributes:
        name: unique in the table (per direction).
        kind: `baseline`, `prompt`, `vector`, `lever`, `checkpoint` or `null`.
        strength: the multiplier m; None where there is none.
        alphas: layer -> raw alpha, for vectors that add.
        gain: score minus the baseline's on the same prompts, with its paired interval; None for
            the baseline itself.
        null_score: mean score of this lever's nulls; None where no random null exists.
        null_scores: on a null row, the score of each random direction.
    """

    name: str
    kind: str
    strength: float | None
    alphas: dict[int, float]
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    null_score: float | None = None
    null_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measurement(Printable):
    """Everything measured, and what it was measured with."""

    behavior: str
    data_hash: str
    split: str | None
    model: str
    fingerprint: str
    judge: str
    seed: int
    max_new_tokens: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def row(self, name: str, direction: Side | None = None) -> Row:
        """Return the row of that name, the first one or that of a direction.

        Raises:
            TrimtabError: when there is none, listing the names.
        """
        sign = None if direction is None else sign_of(direction)
        for row in self.rows:
            if row.name == name and sign in (None, row.sign):
                return row
        raise TrimtabError(
            asked=f"the row {name!r}",
            found=", ".join(repr(row.name) for row in self.rows),
            advice="use one of these names",
        )

    def difference(self, first: str, second: str) -> tuple[float, float, float]:
        """Return the mean score difference of two rows and its paired 95 % interval."""
        a, b = self.row(first), self.row(second)
        mean = a.score - b.score
        return mean, *paired_bootstrap(a.scores, b.scores, self.seed)

    def table(self) -> Table:
        """Return one line per row; intervals are 95 %, damage and spill are nats per token."""
        return Table(
            f"{self.behavior}: levers on the {self.split or 'whole'} split of {self.model}",
            (
                "lever",
                "side",
                "m",
                "alpha",
                "score",
                "n",
                "gain",
                "random",
                "coherence",
                "damage (p95)",
                "spill (p95)",
            ),
            tuple(self._cells(row) for row in self.rows),
            self.notes,
        )

    def samples_table(self, per_row: int = 1) -> Table:
        """Return the first answers of every row beside the unsteered ones."""
        cells = tuple(
            (row.name, _prompt_text(sample.prompt), sample.before, sample.after)
            for row in self.rows
            for sample in row.samples[:per_row]
        )
        return Table("answers", ("lever", "prompt", "unsteered", "steered"), cells)

    def _repr_html_(self) -> str:
        """Render the table and, folded, one pair of answers per row."""
        title = escape(f"answers on {self.behavior}")
        folded = f"<details><summary>{title}</summary>{self.samples_table().to_html()}</details>"
        return self.table().to_html() + folded

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        collapsed = bool(row.gain and row.gain > 0) and row.coherence < 0.5
        return (
            row.name,
            "toward" if row.sign > 0 else "away",
            "–" if row.strength is None else f"{row.strength:+g}",
            alpha_text(row.alphas),
            with_interval(row.score, row.low, row.high),
            str(row.n),
            with_interval(row.gain, row.gain_low, row.gain_high),
            number(row.null_score),
            number(row.coherence) + (" COLLAPSE" if collapsed else ""),
            with_p95(row.damage, row.damage_p95),
            with_p95(row.spill, row.spill_p95),
        )


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(
        f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt
    )
