"""The page's part about a gap search: what each token was predicted to do, and what it did."""

from __future__ import annotations

from trimtab.prompts.gap.gap_search import GapSearch
from trimtab.report.figures import Series, line_figure
from trimtab.report.page import Section
from trimtab.results.tables import number, percent


def gap_section(search: GapSearch) -> Section:
    """Draw predicted against true gain per token of a search, with its tables."""
    found = search.found
    predicted, true = [s.predicted for s in found.steps], [s.true for s in found.steps]
    ends = [min([0.0, *predicted, *true]), max([0.0, *predicted, *true])]
    figure = line_figure(
        "predicted gain of a token",
        "true gain after the others",
        [
            Series("as predicted", ends, ends, "--null", "dash"),
            Series(f"{found.method} {search.sign:+d}", predicted, true, dash="markers"),
        ],
        description="Points on the dashed line did what was predicted.",
    )
    return Section(
        f"Closing the gap: {search.behavior}",
        paragraphs=(_told(search),),
        figures=(figure,),
        tables=(search.table(), found.table()),
        warnings=tuple(_warned(search)),
    )


def _told(search: GapSearch) -> str:
    """One search in a sentence."""
    held = search.held_out
    tokens = len(search.found.slot)
    words = (
        f"{search.found.method} search, sign {search.sign:+d}: {tokens} token{'s' * (tokens != 1)}, "
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
