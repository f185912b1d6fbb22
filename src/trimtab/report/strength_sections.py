"""Sections of the strength page for one model and vector: what the laws said and what was seen."""

from __future__ import annotations

import math

from trimtab.prediction.calibration import Calibration
from trimtab.prediction.law_check import LawCheck
from trimtab.prediction.laws import LawsReport
from trimtab.prediction.predict import TARGET, StrengthPrediction
from trimtab.prediction.recovery import Recovery
from trimtab.report.figures import Band, Bars, Figure, Series, bar_figure, heat_figure, line_figure
from trimtab.report.page import Section
from trimtab.results.tables import number, percent
from trimtab.steering.units import convert
from trimtab.strength.tune import Tuned, TuneReport

_PREDICTED = (
    ("quadratic", "--prompt", "dot"),
    ("tilt", "--baked", "dash"),
    ("norm", "--coherence", "dashdot"),
    ("bend", "--spill", "dash"),
)
_DEPTH_COLORS = ("--vector", "--prompt", "--baked", "--coherence", "--damage", "--spill")


def laws_sections(found: LawsReport) -> list[Section]:
    """Return the sections of a report in the order they are read."""
    return [
        _prediction(found.prediction, found.check),
        _depth(found),
        _calibration(found.calibration),
        _recovery(found.recovery),
    ]


def tune_section(tuned: Tuned) -> Section:
    """Show the curve behind a tuned strength: score, coherence, damage, spill and the window."""
    report, units = tuned.report, convert(tuned)
    shares = [report.baseline, (report.score, report.low, report.high), report.null]
    test = bar_figure(
        ["unsteered", "tuned", "random control"],
        "share of test answers",
        [Bars("test split", shares)],
    )
    return Section(
        title=f"Tuned: {report.behavior}",
        paragraphs=(
            f"Layers {', '.join(map(str, report.layers))}, scope {report.scope}, {units.sentence}: "
            f"chosen on validation prompts within {report.budget:g} nats of damage (on-target KL, "
            "95th percentile), reported on test prompts.",
        ),
        figures=(*tune_figures(report), test),
        tables=(report.table(), units.table()),
        warnings=() if report.window else ("The target score is not reached within the budget.",),
    )


def tune_figures(report: TuneReport) -> tuple[Figure, Figure]:
    """Draw shares and nats against strength: the validation curve, and the test split upon it."""
    curve, chosen = report.curve, report.strength
    m, scores = [row.strength for row in curve], [row.score for row in curve]
    shares = line_figure(
        "strength m",
        "share",
        [
            Series("behavior", m, scores, "--vector"),
            Series("coherence", m, [row.coherence for row in curve], "--coherence", "dot"),
            Series(
                f"behavior, test, n = {report.n}",
                [0.0, chosen],
                [report.baseline, report.score],
                "--vector",
                "markers",
            ),
            Series("random control, test", [chosen], [report.null], "--null", "markers"),
        ],
        bands=[Band("behavior, 95 %", m, [row.low for row in curve], [row.high for row in curve])],
        window=report.window,
        caption=f"Lines: validation split, n = {curve[0].n} a strength. Points: test split, "
        "unsteered at 0. Vertical shade: the window.",
    )
    nats = line_figure(
        "strength m",
        "nats per token, 95th percentile",
        [
            Series("damage (on-target KL)", m, [row.damage_p95 for row in curve], "--damage"),
            Series("spill (off-target KL)", m, [row.spill_p95 for row in curve], "--spill", "dash"),
            Series("budget", m, [report.budget] * len(m), "--baseline", "dot"),
        ],
        window=report.window,
        caption=f"Validation split, n = {curve[0].n} a strength.",
        height=300,
    )
    return shares, nats


def _prediction(laws: StrengthPrediction, check: LawCheck) -> Section:
    """Show prediction and measurement on one plot, and the window of every prompt."""
    figures = [_kl(check, laws.trusted)]
    if check.curve and check.curve[0].probability is not None:
        figures.append(_probability(check))
    if laws.windows:
        figures.append(_windows(laws))
    off = [b for b in check.budgets if b.prediction == "tilt" and not 0.75 <= b.ratio <= 1.33]
    return Section(
        title="Prediction against measurement",
        paragraphs=(
            "Lines come from derivatives at m = 0; points are the model itself, median over "
            f"prompts with quartiles. The leading order is to be trusted up to m = "
            f"{number(laws.trusted)}, which the shaded area shows.",
            "'norm' moves the stream before the final norm on a line and is exact for a push "
            "at the last layer; 'bend' adds the curvature of the logits.",
        ),
        figures=tuple(figures),
        tables=(check.table(), laws.table()),
        warnings=tuple(
            f"At a budget of {b.nats:g} nats the tilt is off by a factor of {number(b.ratio)}: "
            "use a measured curve there."
            for b in off
        ),
    )


def _kl(check: LawCheck, trusted: float) -> Figure:
    m = [abs(point.strength) for point in check.curve]
    series = [Series("measured", m, [p.kl for p in check.curve], "--vector", "markers")]
    for name, color, dash in _PREDICTED:
        series.append(Series(name, m, [p.predicted[name] for p in check.curve], color, dash))
    return line_figure(
        "strength |m|",
        "KL(unsteered, steered), nats",
        series,
        log_x=True,
        log_y=True,
        bands=[
            Band("quartiles", m, [p.kl_low for p in check.curve], [p.kl_high for p in check.curve])
        ],
        window=(m[0], trusted) if m and trusted > m[0] else None,
        caption="At the first answer position.",
    )


def _probability(check: LawCheck) -> Figure:
    m = [abs(point.strength) for point in check.curve]
    return line_figure(
        "strength |m|",
        "probability of the readout words",
        [
            Series("measured", m, [p.probability for p in check.curve], "--vector", "markers"),
            Series("tilt", m, [p.probability_tilt for p in check.curve], "--baked", "dash"),
            Series("norm", m, [p.probability_norm for p in check.curve], "--coherence", "dashdot"),
        ],
        log_x=True,
    )


def _windows(laws: StrengthPrediction) -> Figure:
    order = sorted(laws.windows, key=lambda window: (window[0] is None, window[0] or 0.0))
    places = list(range(1, len(order) + 1))
    reached, spent = [low for low, _ in order], [high for _, high in order]
    return line_figure(
        "prompt, by rising need",
        "strength |m|",
        [
            Series(f"readout words reach {percent(TARGET)}", places, reached, "--vector"),
            Series(f"KL reaches {laws.budgets[-1].nats:g} nats", places, spent, "--damage", "dash"),
        ],
        caption="Predicted, one pair of points per prompt: the window differs between prompts, and is "
        "empty where the first lies above the second.",
    )


def _depth(found: LawsReport) -> Section:
    """Show by layer how far measured KL is from the law's."""
    checks = (*found.depth, found.check)
    budgets = sorted({b.nats for b in found.check.budgets})
    names = [", ".join(map(str, check.layers)) for check in checks]
    ratios = [[math.log2(check.budget("norm", nats).ratio) for nats in budgets] for check in checks]
    heat = heat_figure(
        [f"{nats:g} nats" for nats in budgets],
        names,
        ratios,
        x_label="budget",
        y_label="layers",
        value_label="log2 of measured / predicted",
        description="Measured over predicted KL by layer and budget, law through the final norm: "
        + "; ".join(
            f"layers {name}: " + ", ".join(number(2**r) for r in row)
            for name, row in zip(names, ratios, strict=True)
        ),
        caption="0 is right, 1 twice as much divergence as predicted.",
        diverging=True,
    )
    return Section(
        title="Where the laws hold",
        paragraphs=("Late pushes pass few nonlinear steps, so they are predicted further.",),
        figures=(heat,),
        tables=(found.table(),),
    )


def _calibration(calibration: Calibration) -> Section:
    """Show norms by depth and coherence and score by place and strength."""
    layers = sorted(calibration.norms)
    norms = [calibration.norms[layer] for layer in layers]
    profile = line_figure("layer", "mean norm of the stream", [Series("norm", layers, norms)])
    return Section(
        title="Norm-calibrated strength by depth",
        paragraphs=(
            "m = 1 adds the layer's mean norm divided by the square root of the width: a "
            "convention that makes m comparable, not a law.",
            "The cliff is the first |m| at which mean coherence falls under 50 %.",
        ),
        figures=(profile, _by_place(calibration, "coherence"), _by_place(calibration, "score")),
        tables=(calibration.table(),),
    )


def _by_place(calibration: Calibration, what: str) -> Figure:
    by_name: dict[str, dict[float, float]] = {}
    for place in calibration.places:
        cells = by_name.setdefault(f"{', '.join(map(str, place.layers))} ({place.scope})", {})
        cells |= {row.strength: getattr(row, what) for row in place.rows}
    columns = sorted({m for cells in by_name.values() for m in cells})
    least = min(value for cells in by_name.values() for value in cells.values())
    return heat_figure(
        [f"{m:+g}" for m in columns],
        list(by_name),
        [[cells.get(m) for m in columns] for cells in by_name.values()],
        x_label="strength m",
        y_label="layers (scope)",
        value_label=what,
        ends=(0.0, 1.0),
        description=f"{what} by layers, scope and strength; lowest {number(least)}",
    )


def _recovery(recovery: Recovery) -> Section:
    """Show the stream's distance and cosine to its unsteered course by depth."""
    figures = []
    for what in ("distance", "cosine"):
        series = []
        for row, color in zip(recovery.rows, _DEPTH_COLORS, strict=False):
            values = getattr(row, what)
            series.append(Series(f"m = {row.strength:+g}", range(len(values)), values, color))
        y_label = f"{what} to the unsteered stream"
        figures.append(line_figure("layer", y_label, series, log_y=what == "distance"))
    return Section(
        title="After a very large push",
        paragraphs=(
            "How far the stream at the last prompt token has returned to its unsteered course, by "
            "layer, and whether the answers have.",
        ),
        figures=tuple(figures),
        tables=(recovery.table(),),
    )
