"""Sections of the strength page for one model and vector: what the laws said and what was seen."""

from __future__ import annotations

import math

from trimtab.prediction.calibration import Calibration
from trimtab.prediction.law_check import LawCheck
from trimtab.prediction.laws import LawsReport
from trimtab.prediction.predict import TARGET, StrengthPrediction
from trimtab.prediction.recovery import Recovery
from trimtab.report.figures import (
    Band,
    Bars,
    Figure,
    Series,
    bar_figure,
    described,
    heat_figure,
    line_figure,
)
from trimtab.report.page import Section
from trimtab.results.tables import number, percent
from trimtab.strength.tune import TuneReport

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
        prediction_section(found.prediction, found.check),
        depth_section(found),
        calibration_section(found.calibration),
        recovery_section(found.recovery),
    ]


def prediction_section(laws: StrengthPrediction, check: LawCheck) -> Section:
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
            "'norm' moves the stream in front of the final norm on a line and is exact for a push "
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


def depth_section(found: LawsReport) -> Section:
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


def calibration_section(calibration: Calibration) -> Section:
    """Show norms by depth and coherence and score by place and strength."""
    layers = sorted(calibration.norms)
    norms = [calibration.norms[layer] for layer in layers]
    profile = line_figure(
        "layer",
        "mean norm of the stream",
        [Series("norm", [float(k) for k in layers], norms)],
        description=described("norm by layer", [float(k) for k in layers], norms),
    )
    figures: list[Figure] = [profile]
    for what, pick in (("coherence", lambda r: r.coherence), ("score", lambda r: r.score)):
        figures.append(_by_place(calibration, what, pick))
    return Section(
        title="Norm-calibrated strength by depth",
        paragraphs=(
            "m = 1 adds the layer's mean norm divided by the square root of the width: a "
            "convention that makes m comparable, not a law.",
            "The cliff is the first |m| at which mean coherence falls under 50 %.",
        ),
        figures=tuple(figures),
        tables=(calibration.table(),),
    )


def recovery_section(recovery: Recovery) -> Section:
    """Show the stream's distance and cosine to its unsteered course by depth."""
    figures = []
    for what, key in (("distance", "distance"), ("cosine", "cosine")):
        series = []
        for row, color in zip(recovery.rows, _DEPTH_COLORS, strict=False):
            values = getattr(row, key)
            depth = [float(k) for k in range(len(values))]
            series.append(Series(f"m = {row.strength:+g}", depth, values, color))
        figures.append(
            line_figure(
                "layer",
                f"{what} to the unsteered stream",
                series,
                log_y=what == "distance",
                description="; ".join(described(s.name, s.x, s.y) for s in series),
            )
        )
    return Section(
        title="After a very large push",
        paragraphs=(
            "How far the stream at the last prompt token has returned to its unsteered course, by "
            "layer, and whether the answers have.",
        ),
        figures=tuple(figures),
        tables=(recovery.table(),),
    )


def tune_figures(report: TuneReport) -> tuple[Figure, Figure]:
    """Draw shares and nats against strength: the validation curve, and the test split upon it."""
    m = [row.strength for row in report.curve]
    found = [Series(*one, "markers") for one in (
        (f"behavior, test, n = {report.n}", [0.0, report.strength], [report.baseline, report.score],
         "--vector"),
        ("random directions, test", [report.strength], [report.null], "--null"),
    )]  # fmt: skip
    shares = line_figure(
        "strength m",
        "share",
        [
            Series("behavior", m, [r.score for r in report.curve], "--vector"),
            Series("coherence", m, [r.coherence for r in report.curve], "--coherence", "dot"),
            *found,
        ],
        bands=[
            Band("behavior, 95 %", m, [r.low for r in report.curve], [r.high for r in report.curve])
        ],
        window=report.window,
        description=described("behavior", m, [r.score for r in report.curve])
        + f". On the test split at {number(report.strength)}: {percent(report.score)}, random "
        f"directions {percent(report.null)}, unsteered {percent(report.baseline)}.",
        caption=f"Lines: validation split, n = {report.curve[0].n} a strength. Points: test split, "
        "unsteered at 0. Vertical shade: the window.",
    )
    nats = line_figure(
        "strength m",
        "nats per token, 95th percentile",
        [
            Series("damage", m, [r.damage_p95 for r in report.curve], "--damage"),
            Series("spill", m, [r.spill_p95 for r in report.curve], "--spill", "dash"),
            Series("budget", m, [report.budget for _ in m], "--baseline", "dot"),
        ],
        window=report.window,
        description=described("damage", m, [r.damage_p95 for r in report.curve]),
        caption=f"Validation split, n = {report.curve[0].n} a strength.",
        height=300,
    )
    return shares, nats


def tune_section(report: TuneReport) -> Section:
    """Show the curve behind a tuned strength: score, coherence, damage, spill and the window."""
    test = bar_figure(
        ["unsteered", "tuned", "random directions"],
        "share of test answers",
        [
            Bars(
                "test split",
                [report.baseline, report.score, report.null],
                "--vector",
                low=[None, report.low, None],
                high=[None, report.high, None],
            )
        ],
        description=f"Test split: unsteered {percent(report.baseline)}, tuned "
        f"{percent(report.score)}, random directions of the same size {percent(report.null)}",
    )
    return Section(
        title=f"Tuned: {report.behavior}",
        paragraphs=(
            f"Layers {', '.join(map(str, report.layers))}, scope {report.scope}, m = "
            f"{report.strength:+.3g}: chosen on validation prompts within {report.budget:g} nats of "
            "damage (95th percentile), reported on test prompts.",
        ),
        figures=(*tune_figures(report), test),
        tables=(report.table(),),
        warnings=() if report.window else ("The target score is not reached within the budget.",),
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
        description=described("measured KL", m, [p.kl for p in check.curve]),
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
        description=described("measured probability", m, [p.probability for p in check.curve]),
    )


def _windows(laws: StrengthPrediction) -> Figure:
    order = sorted(laws.windows, key=lambda window: (window[0] is None, window[0] or 0.0))
    places = [float(i + 1) for i in range(len(order))]
    return line_figure(
        "prompt, by rising need",
        "strength |m|",
        [
            Series(
                f"readout words reach {percent(TARGET)}", places, [w[0] for w in order], "--vector"
            ),
            Series(
                f"KL reaches {laws.budgets[-1].nats:g} nats",
                places,
                [w[1] for w in order],
                "--damage",
                "dash",
            ),
        ],  # fmt: skip
        description="Predicted window of every prompt: "
        + described("strength needed", places, [w[0] for w in order]),
        caption="Predicted, one pair of points per prompt: the window differs between prompts, and is "
        "empty where the first lies above the second.",
    )


def _by_place(calibration: Calibration, what: str, pick) -> Figure:  # noqa: ANN001
    names, values, columns = [], [], []
    by_name: dict[str, dict[float, float]] = {}
    for place in calibration.places:
        key = f"{', '.join(map(str, place.layers))} ({place.scope})"
        cells = by_name.setdefault(key, {})
        cells |= {row.strength: pick(row) for row in place.rows}
    columns = sorted({m for cells in by_name.values() for m in cells})
    names = list(by_name)
    values = [[by_name[name].get(m) for m in columns] for name in names]
    return heat_figure(
        [f"{m:+g}" for m in columns],
        names,
        values,
        x_label="strength m",
        y_label="layers (scope)",
        value_label=what,
        low=0.0,
        high=1.0,
        description=f"{what} by layers, scope and strength; lowest "
        f"{number(min(v for row in values for v in row if v is not None))}",
    )
