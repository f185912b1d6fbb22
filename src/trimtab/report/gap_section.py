"""The page's part about a gap search: what each token was predicted to do, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from trimtab.prompts.gap.gap_search import GapSearch
from trimtab.report.figures import Series, line_figure
from trimtab.report.page import Section
from trimtab.results.tables import number, percent

_COLORS = ("--vector", "--prompt", "--baked", "--coherence")


def gap_section(searches: Sequence[GapSearch]) -> Section:
    """Draw predicted against true gain per token of the searches for one behavior."""
    behavior = searches[0].behavior
    values = [x for s in searches for t in s.found.steps for x in (t.predicted, t.true)]
    low, high = min([0.0, *values]), max([0.0, *values])
    points = [
        Series(
            search.found.method + f" {search.sign:+d}",
            [step.predicted for step in search.found.steps],
            [step.true for step in search.found.steps],
            color,
            "markers",
        )
        for search, color in zip(searches, cycle(_COLORS), strict=False)
    ]
    figure = line_figure(
        "predicted gain of a token",
        "true gain behind the others",
        [Series("as predicted", [low, high], [low, high], "--null", "dash"), *points],
        description="Points on the dashed line did what was predicted.",
    )
    return Section(
        f"Closing the gap: {behavior}",
        paragraphs=tuple(_told(search) for search in searches),
        figures=(figure,),
        tables=tuple(table for s in searches for table in (s.table(), s.found.table())),
        warnings=tuple(w for s in searches for w in _warned(s)),
    )


def _told(search: GapSearch) -> str:
    """One search in a sentence."""
    held = search.held_out
    words = (
        f"{search.found.method} search, sign {search.sign:+d}: {_count(len(search.found.slot))}, "
        f"{search.found.sequences} prompts fed."
    )
    if held is not None:
        words += (
            f" Held-out prompts with the gap closed: {percent(held.closed_before)} before, "
            f"{percent(held.closed.value)} after"
        )
        words += "." if search.null is None else f", {percent(search.null[0])} by random tokens."
    if search.found.additivity is not None:
        words += f" Of the gain predicted, {percent(search.found.additivity)} came true."
    return words


def _count(tokens: int) -> str:
    return f"{tokens} token" + "s" * (tokens != 1)


def _warned(search: GapSearch) -> list[str]:
    """Say so where the gap is closed and the behavior is not there."""
    held = search.held_out
    if held is None or held.judged is None or held.closed.value - held.judged < 0.25:
        return []
    return [
        f"The gap is closed on {percent(held.closed.value)} of held-out prompts, yet the judge gives "
        f"only {percent(held.judged)} of the answers to that side (mean gap "
        f"{number(held.gap_after.value)}): the first token moved, not the behavior."
    ]
