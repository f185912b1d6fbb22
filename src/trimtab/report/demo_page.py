"""A steered behavior as a section: what it did, beside a prompt and a random control, and what to doubt."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.evaluation.measurement import Measurement, Row
from trimtab.report.figures import Bars, Figure, bar_figure
from trimtab.report.page import Section
from trimtab.report.strength_sections import tune_figures
from trimtab.results.tables import Table, percent
from trimtab.steering.units import StrengthTable
from trimtab.strength.tune import TuneReport
from trimtab.weights.plan import BakeReport

COHERENCE_LOST = 0.9  # of the unsteered coherence; below, the text falls apart
SAMPLES = 3  # the first ones, not the best ones
LABELS = {
    "baseline": "unsteered",
    "prompt": "plain prompt",
    "vector": "vector",
    "checkpoint": "baked checkpoint",
    "null": "random control",
}
COLORS = {"checkpoint": "--baked"}


@dataclass(frozen=True)
class Steered:
    """One behavior from its contrast to a checkpoint; `baked` says why where there is none."""

    description: str
    tuned: TuneReport
    units: StrengthTable
    measured: Measurement
    baked: BakeReport | str

    @property
    def levers(self) -> dict[str, Row]:
        """The measured rows by kind, in the order they are shown."""
        rows = {row.kind: row for row in self.measured.rows}
        return {kind: rows[kind] for kind in LABELS if kind in rows}


def steered_section(found: Steered) -> Section:
    """Return the section of one behavior: the answer, doubts, figures and tables."""
    tables = [found.measured.table(), _samples(found), found.tuned.table(), found.units.table()]
    if not isinstance(found.baked, str):
        tables.append(found.baked.table())
    return Section(
        title=found.tuned.behavior,
        paragraphs=(found.description, answer(found)),
        figures=(_bars(found), *tune_figures(found.tuned)),
        tables=tuple(tables),
        warnings=tuple(warnings(found)),
    )


def answer(found: Steered) -> str:
    """Say in one sentence what the vector did to the behavior, beside a prompt and a random control."""
    levers, tuned = found.levers, found.tuned
    vector = levers["vector"]
    beside = [
        f"{said} {percent(levers[kind].score)}"
        for kind, said in (
            ("prompt", "a plain prompt reaches"),
            ("null", "the random control"),
            ("checkpoint", "the baked checkpoint"),
        )
        if kind in levers
    ]
    return (
        f"A vector at layer{'s' * (len(tuned.layers) > 1)} {', '.join(map(str, tuned.layers))}, "
        f"{found.units.sentence}, takes {tuned.behavior} from "
        f"{percent(levers['baseline'].score)} to {percent(vector.score)} of {vector.n} unseen prompts "
        f"(95 % interval {percent(vector.low)} to {percent(vector.high)}) with coherence "
        f"{percent(vector.coherence)}{'; ' * bool(beside)}{', '.join(beside)}."
    )


def warnings(found: Steered) -> list[str]:
    """List what should make a reader doubt: collapse, no better than chance, than a prompt."""
    levers = found.levers
    vector, null, prompt = (levers.get(kind) for kind in ("vector", "null", "prompt"))
    floor = COHERENCE_LOST * levers["baseline"].coherence
    said = []
    if vector and vector.coherence < floor:
        said.append(
            f"Collapse: coherence fell from {percent(levers['baseline'].coherence)} to "
            f"{percent(vector.coherence)}. The score counts text that has fallen apart."
        )
    if vector and null and vector.low <= null.score:
        said.append(
            f"No evidence: the random control, vectors of the same size, reaches {percent(null.score)}, inside or "
            "above the vector's interval."
        )
    if vector and prompt and prompt.score >= vector.score and prompt.coherence >= floor:
        said.append(f"A plain prompt does as well: {percent(prompt.score)}.")
    if found.tuned.window is None:
        said.append(f"No window: {percent(found.tuned.target)} is not reached within the budget.")
    if isinstance(found.baked, str):
        said.append(f"Not baked: {found.baked}.")
    elif found.baked.equal_text is False:
        said.append("The baked checkpoint does not write the same text as the hook.")
    return said


def _bars(found: Steered) -> Figure:
    """Draw a bar with its 95 % interval for each lever, in the lever's color."""
    levers = found.levers
    rows = list(levers.values())
    colors = [COLORS.get(kind, f"--{kind}") for kind in levers]
    split = (found.measured.split or "whole").capitalize()
    return bar_figure(
        [LABELS[kind] for kind in levers],
        f"share of answers: {found.tuned.behavior}",
        [Bars("share", [(row.score, row.low, row.high) for row in rows], colors)],
        caption=f"{split} split, n = {rows[0].n}, with 95 % intervals. Random control: vectors of "
        "the same layers, scope and size.",
    )


def _samples(found: Steered) -> Table:
    answers = found.measured.samples_table(SAMPLES)
    rows = [row[1:] for row in answers.rows if row[0] == found.levers["vector"].name]
    return Table("the first answers of the test split", ("prompt", "before", "after"), tuple(rows))
