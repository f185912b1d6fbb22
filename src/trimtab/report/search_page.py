"""The page of a prompt search: stages with every restart, baselines, answers, states by layer."""

from __future__ import annotations

from trimtab.prompts.pipeline.attempt import STAGES, TITLES
from trimtab.prompts.pipeline.report import NOT_COMPARED, SearchReport
from trimtab.prompts.soft.states import StateSweep
from trimtab.report.figures import Bars, Figure, Series, bar_figure, line_figure
from trimtab.report.page import Section
from trimtab.results.tables import Table, number, percent

SAMPLED = ("chosen", "soft", "reference", "random", "no prompt")


def search_sections(report: SearchReport, states: StateSweep | None = None) -> list[Section]:
    """Return the sections of one search in the order they are read."""
    parts = (_found_section, _stages_section, _baselines_section, _answers_section)
    extra = [] if states is None else [states_section(states)]
    return [*(part(report) for part in parts), *extra]


def _found_section(report: SearchReport) -> Section:
    chosen, check = report.scores["chosen"], report.check
    share = report.attempt(report.chosen)
    paragraphs = [
        f'Reference {report.slot}: "{report.reference_text}"',
        f'Found: "{report.chosen_text}" ({TITLES[share.arm]}, restart {share.restart}), chosen by '
        f"{report.requests['validation']} validation requests. All figures below are those of "
        f"{report.requests['test']} test requests, which were read once.",
        f"Scored again from its text: {number(check.text_loss, 4)} nats per token, in the search "
        f"{number(check.search_loss, 4)}.",
    ]
    if report.banned_words:
        words = ", ".join(report.banned_words)
        paragraphs.append(f"Not to be used, in any inflection: {words}.")
    warnings = [] if check.same_ids else ["The text does not give back the tokens that were found."]
    if chosen.judged is not None and chosen.judged.coherence < 0.9:
        warnings.append(f"Only {percent(chosen.judged.coherence)} coherent: read the answers.")
    tables = tuple(report.scores[name].table() for name in ("chosen", "reference", "no prompt"))
    title = f"{report.reference}: what was found"
    return Section(title, tuple(paragraphs), (), tables, tuple(warnings))


def _stages_section(report: SearchReport) -> Section:
    rows = []
    for name in STAGES:
        arm = report.arm(name)
        figures = (arm.mean, arm.sd, arm.least, arm.most, arm.excess, arm.gap_closed)
        rows.append((TITLES[name], str(arm.n), *(number(x, 3) for x in figures)))
    columns = ("stage", "restarts", "mean", "sd", "min", "max", "mean excess", "gap closed")
    notes = ("cross-entropy of the reference's answers to test requests, nats per token",)
    table = Table("Stages", columns, tuple(rows), notes)
    stuck = [a for a in report.attempts if a.violated_start and a.arm in STAGES]
    paragraphs = (
        "Each line is a restart: vectors, their projection to allowed tokens, and the repair of "
        "those tokens one by one. Excess is what is left above the reference's own cross-entropy, "
        "which is not zero because greedy answers are not certain.",
    )
    warnings = tuple(
        f"{TITLES[a.arm]}, restart {a.restart}, started outside the constraints: "
        + ", ".join(f"{kind} {count}" for kind, count in a.violated_start.items())
        for a in stuck
    )
    title, tables = f"{report.reference}: stage by stage", (table, report.restarts_table())
    return Section(title, paragraphs, (_stages_figure(report),), tables, warnings)


def _stages_figure(report: SearchReport) -> Figure:
    ends = [0.0, 1.0, 2.0]
    tests = {(attempt.arm, attempt.restart): attempt.test for attempt in report.attempts}
    series = [
        Series("a restart", ends, [tests[stage, restart] for stage in STAGES])
        for restart in range(report.arm("repaired").n)
    ]
    for arm, color in (("reference", "--coherence"), ("random", "--null")):
        level = report.arm(arm).mean
        series.append(Series(TITLES[arm], ends, [level] * 3, color, "dash"))
    return line_figure(
        "stage: 0 soft, 1 projected, 2 repaired",
        "test cross-entropy, nats per token",
        series,
    )


def _baselines_section(report: SearchReport) -> Section:
    tables = (report.table(), _score_table(report))
    if not report.compared:
        return Section(f"{report.reference}: not compared", (f"{NOT_COMPARED}.",), (), tables)
    arms = [arm for arm in report.arms if arm.arm not in ("reference", "random")]
    figure = bar_figure(
        [TITLES[arm.arm] for arm in arms],
        "gap closed, share",
        [
            Bars("mean of all restarts", [arm.gap_closed for arm in arms], "--vector"),
            Bars("chosen restart", [arm.chosen_gap_closed for arm in arms], "--prompt"),
        ],
        caption="(CE of random tokens - CE) / (CE of random tokens - CE of the reference)",
    )
    paragraph = (
        "Every arm searched on the same requests under the same constraints; pure HotFlip got at "
        "least as many tokens through the model as the pipeline, restart by restart. A prompt may "
        "close more than all of the gap: it can predict the reference's answers better than the "
        "reference does."
    )
    return Section(f"{report.reference}: against the baselines", (paragraph,), (figure,), tables)


def _score_table(report: SearchReport) -> Table:
    """One line per scored prompt."""
    first = next(iter(report.scores.values()))
    ks = list(first.likeness.exact_at)
    columns = (
        *("prompt", "text", "excess CE", "KL", "exact"),
        *(f"exact@{k}" for k in ks),
        *(f"overlap@{k}" for k in ks),
        *("judge, greedy", "judge, sampled", "coherence"),
    )
    rows = []
    for name, scores in report.scores.items():
        like, own, judged = scores.likelihood, scores.likeness, scores.judged
        shares = [own.exact, *(own.exact_at[k] for k in ks), *(own.overlap_at[k] for k in ks)]
        verdict = ("", "", "")
        if judged is not None:
            means = (judged.greedy.mean, judged.sampled.mean, judged.coherence)
            verdict = tuple(map(percent, means))
        kl = (number(like.excess.mean, 3), number(like.kl.mean, 3))
        exact = (percent(share.mean) for share in shares)
        rows.append((TITLES.get(name, name), scores.label, *kl, *exact, *verdict))
    return Table("Scores of each arm's chosen prompt", columns, tuple(rows))


def _answers_section(report: SearchReport) -> Section:
    names = [name for name in SAMPLED if name in report.scores]
    requests = [request for request, _ in report.scores[names[0]].answers]
    answers = {name: dict(report.scores[name].answers) for name in names}
    tables = tuple(
        Table(
            request,
            ("prompt", "greedy answer"),
            tuple((TITLES.get(name, name), answers[name].get(request, "")) for name in names),
        )
        for request in requests
    )
    return Section(f"{report.reference}: answers to test requests", (), (), tables)


def states_section(states: StateSweep) -> Section:
    """Return the section about prefixes that leave the reference's states at each layer."""
    matches = states.matches
    layers = [match.layer for match in matches]
    figures = (
        line_figure(
            "layer whose output is matched",
            "mean cosine with the reference's states",
            [
                Series("trained", layers, [m.cosine for m in matches]),
                Series("before training", layers, [m.cosine_start for m in matches], "--null"),
            ],
        ),
        line_figure(
            "layer whose output is matched",
            "cross-entropy, nats per token",
            [
                Series("vectors", layers, [m.loss for m in matches]),
                Series("nearest tokens", layers, [m.loss_projected for m in matches], "--prompt"),
            ],
        ),
        line_figure(
            "step",
            "state loss",
            [Series(f"layer {m.layer}", range(len(m.soft.curve)), m.soft.curve) for m in matches],
            log_y=True,
        ),
    )
    paragraph = (
        "For each layer, vectors in the slot were trained until the layer's output after the slot "
        "was that under the reference. Early layers project to near-copies of it, late layers to "
        "odd tokens."
    )
    return Section("States, layer by layer", (paragraph,), figures, (states.table(),))
