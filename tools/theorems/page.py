"""The theorems of steering strength as figures and as a section of a page."""

from __future__ import annotations

import torch

from tools.theorems.theorems import Theorems
from trimtab.report.figures import Bars, Figure, Series, bar_figure, described, line_figure
from trimtab.report.page import Section
from trimtab.results.tables import number

OTHERS = ("--prompt", "--baked", "--baseline", "--coherence", "--spill", "--damage")
EVERY = 12  # of the strengths, drawn as a brute-force point
NEAR = 1.0  # strengths within which the leading order of the cross-entropy is drawn


def theory_figures(theorems: Theorems) -> tuple[Figure, ...]:
    """Draw theorems (a) to (d): tokens, their peaks, concepts, cross-entropy, limits.

    Lines are predictions, points are softmax(W (h + alpha v)).
    """
    colors = _colors(theorems)
    return (
        _tokens(theorems, colors),
        _peaks(theorems, colors),
        _concepts(theorems, colors),
        _entropy(theorems),
        _limits(theorems),
    )


def theory_section(theorems: Theorems) -> Section:
    """Say what the theorems claim, with their figures and the errors of every prediction."""
    failed = [check.claim for check in theorems.checks if not check.holds]
    return Section(
        title="The theorems, on a model where they are exact",
        paragraphs=(
            f"A model with {len(theorems.tokens)} tokens in {len(theorems.concept_change)} "
            f"concepts, whose logits are linear in a free vector per context, steered toward "
            f"{theorems.target} by the difference of mean vectors. Curves are for a context about "
            f"{theorems.context}.",
            "(a) A token's probability has one bump; those of other concepts come before those of "
            "the target; only the tokens with extreme log-odds never turn. (b) A concept follows a "
            "hyperbolic tangent of nu(alpha). (c) Cross-entropy grows with the square of a small "
            "strength. (d) At large strength one token is left.",
            f"Largest difference between any prediction and brute force: {theorems.max_error:.1e}.",
        ),
        figures=theory_figures(theorems),
        tables=(theorems.table(),),
        warnings=tuple(f"Not confirmed: {claim}." for claim in failed),
    )


def _colors(theorems: Theorems) -> dict[str, str]:
    others = [name for name in theorems.concept_change if name != theorems.target]
    return {theorems.target: "--vector"} | {
        name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)
    }


def _tokens(theorems: Theorems, colors: dict[str, str]) -> Figure:
    alphas, some = theorems.alphas, slice(None, None, EVERY)
    probability = theorems.p0 + theorems.token_change
    measured = theorems.p0 + theorems.token_change_measured
    lines, points = [], []
    for z, concept in enumerate(theorems.concept_of):
        color = colors[concept]
        lines.append(Series(concept, alphas, probability[:, z], color))
        points.append(Series("brute force", alphas[some], measured[some, z], color, "markers"))
    ends = [
        f"{theorems.tokens[z]} ({theorems.concept_of[z]}) {'rises' if sign > 0 else 'falls'} at "
        "every strength"
        for sign, z in (
            (1, int(theorems.log_odds.argmax())),
            (-1, int(theorems.log_odds.argmin())),
        )
    ]
    bumps = int(theorems.peaks.isfinite().sum())
    return line_figure(
        "strength alpha",
        "probability of the token",
        lines + points,
        log_y=True,
        description=f"Probability of every token against strength. {bumps} of "
        f"{len(theorems.tokens)} tokens rise to one peak and fall; {'; '.join(ends)}.",
        caption="(a) One line per token, colored by its concept; on this axis each is concave.",
    )


def _peaks(theorems: Theorems, colors: dict[str, str]) -> Figure:
    order = theorems.log_odds.argsort()
    finite = order[theorems.peaks[order].isfinite()]
    series = [Series("predicted", theorems.log_odds[finite], theorems.peaks[finite], "--null")]
    for concept, color in colors.items():
        ids = [z for z in finite.tolist() if theorems.concept_of[z] == concept]
        series.append(
            Series(
                "brute force",
                theorems.log_odds[ids],
                theorems.peaks_measured[ids],
                color,
                "markers",
            )
        )
    on_target = torch.tensor([name == theorems.target for name in theorems.concept_of])
    first = theorems.peaks[on_target].min()
    last = theorems.peaks[~on_target].max()
    return line_figure(
        "mean log-odds M of the token, nats",
        "alpha of its peak",
        series,
        description=f"Strength at which each token peaks, against its log-odds: it rises with them. "
        f"The last peak off target is at {number(float(last))}, the first on target at "
        f"{number(float(first))}.",
        caption="(a) Peaks are ordered by M: tokens of other concepts peak before the target's.",
    )


def _concepts(theorems: Theorems, colors: dict[str, str]) -> Figure:
    alphas, some = theorems.alphas, slice(None, None, EVERY)
    lines, points = [], []
    for name, change in theorems.concept_change.items():
        lines.append(Series(name, alphas, change, colors[name]))
        brute = theorems.concept_change_measured[name][some]
        points.append(Series("brute force", alphas[some], brute, colors[name], "markers"))
    said = "; ".join(described(line.name, line.x, line.y) for line in lines)
    return line_figure(
        "strength alpha",
        "mean change of probability",
        lines + points,
        description=f"Mean change of probability over each concept's tokens. {said}.",
        caption="(b) Lines: the tanh formula with nu in closed form. A concept without an extreme "
        "token loses its mass on both sides.",
    )


def _entropy(theorems: Theorems) -> Figure:
    near = theorems.alphas.abs() <= NEAR
    alphas = theorems.alphas[near]
    exact, leading = theorems.entropy_change[near], theorems.entropy_quadratic[near]
    return line_figure(
        "strength alpha",
        "change of cross-entropy, nats",
        [
            Series("brute force", alphas, exact, "--damage"),
            Series("leading order", alphas, leading, "--baseline", "dash"),
        ],
        description="Change of cross-entropy near strength 0. "
        f"{described('Brute force', alphas, exact)}. {described('Leading order', alphas, leading)}.",
        caption="(c) The leading order holds near 0; far away the cross-entropy grows in a "
        "straight line.",
    )


def _limits(theorems: Theorems) -> Figure:
    ids = {
        name: [z for z, concept in enumerate(theorems.concept_of) if concept == name]
        for name in theorems.concept_change
    }
    columns = (
        ("alpha to minus infinity", theorems.limits[0], "--damage"),
        ("unsteered", theorems.p0, "--baseline"),
        ("alpha to infinity", theorems.limits[1], "--vector"),
    )
    mass = {name: [float(p[members].sum()) for members in ids.values()] for name, p, _ in columns}
    winners = [theorems.tokens[int(limit.argmax())] for limit in theorems.limits]
    return bar_figure(
        list(ids),
        "probability of the concept",
        [Bars(name, mass[name], color) for name, _, color in columns],
        caption=f"(d) In the limits all probability is on one token: {winners[0]} at minus "
        f"infinity, {winners[1]} at infinity.",
    )
