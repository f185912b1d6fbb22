"""What `measure_tasks` returns: one row per task, metric and lever, paired with the unsteered model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.errors import TrimtabError
from trimtab.evaluation.summary import mean
from trimtab.results.intervals import bootstrap, paired_bootstrap
from trimtab.results.tables import ABSENT, Printable, Table, number, with_interval


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task under one lever, as the harness reports it.

    Attributes:
        value: the harness's figure.
        stderr: its standard error; None where the harness has none.
        n: documents.
        values: one per document, in their order; None where the figure is no mean over documents,
            such as a corpus BLEU or a perplexity.
        higher_is_better: None where the task does not say.
    """

    value: float
    stderr: float | None
    n: int
    values: tuple[float, ...] | None
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRow(TaskScore):
    """One task, one metric, one lever; on a null row the mean over the random directions.

    Attributes:
        lever: its name, as in the table of `measure`.
        kind: `baseline`, `vector`, `lever` or `null`.
        strength: the multiplier m; None where there is none.
        task: the harness's name of it.
        metric: the harness's name; another filter than `none` stands after a comma.
        difference: value minus the unsteered model's; None for that model itself.
        low: of the 95 % interval of the difference, documents resampled in pairs; None where the
            figure is no mean over documents.
        high: its other end.
        null: mean value of this lever's random directions; None where there are none.
        null_values: on a null row, the value of each direction.
    """

    lever: str
    kind: str
    strength: float | None
    task: str
    metric: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskMeasurement(Printable):
    """Levers on the tasks of a harness, and what they were measured with."""

    model: str
    fingerprint: str
    tasks: tuple[str, ...]
    harness: str
    limit: float | None
    fewshot: int | None
    chat_template: bool
    seed: int
    rows: tuple[TaskRow, ...]
    notes: tuple[str, ...]

    def row(self, lever: str, task: str, metric: str = "acc") -> TaskRow:
        """Return the row of a lever on a task.

        Raises:
            TrimtabError: there is none; it lists what there is.
        """
        for row in self.rows:
            if (row.lever, row.task, row.metric) == (lever, task, metric):
                return row
        raise TrimtabError(
            asked=f"the {metric} of {lever!r} on {task}",
            found="; ".join(f"{row.metric} of {row.lever!r} on {row.task}" for row in self.rows),
            advice="use one of these",
        )

    def table(self) -> Table:
        """Return one line per task, metric and lever; the stderr stands after the value."""
        columns = ("task", "metric", "lever", "m", "n", "value", "difference", "random control")
        rows = tuple(self._cells(row) for row in self.rows)
        return Table(f"tasks of {self.harness} on {self.model}", columns, rows, self.notes)

    @staticmethod
    def _cells(row: TaskRow) -> tuple[str, ...]:
        return (
            row.task,
            row.metric,
            row.lever,
            ABSENT if row.strength is None else f"{row.strength:+g}",
            str(row.n),
            number(row.value) + ("" if row.stderr is None else f" ± {number(row.stderr)}"),
            with_interval(row.difference, row.low, row.high),
            number(row.null),
        )


Scores = Mapping[tuple[str, str], TaskScore]


def rows_of(
    name: str,
    kind: str,
    strength: float | None,
    scores: Scores,
    baseline: Scores | None,
    nulls: Sequence[Scores],
    seed: int,
) -> list[TaskRow]:
    """Return a lever's row for every task and metric, each with that of its nulls after it."""
    rows: list[TaskRow] = []

    def add(lever: str, kind: str, key: tuple[str, str], score: TaskScore, **nulls: Any) -> None:
        difference, low, high = None, None, None
        if baseline is not None:
            difference = score.value - baseline[key].value
            low, high = paired_interval(score, baseline[key], seed)
        rows.append(
            TaskRow(
                **vars(score),
                lever=lever,
                kind=kind,
                strength=strength,
                task=key[0],
                metric=key[1],
                difference=difference,
                low=low,
                high=high,
                **nulls,
            )
        )

    for key, score in scores.items():
        drawn = [each[key] for each in nulls]
        null = pooled(drawn) if drawn else None
        add(name, kind, key, score, null=null and null.value)
        if null is not None:
            values = tuple(each.value for each in drawn)
            add(f"random control of {name}", "null", key, null, null_values=values)
    return rows


def pooled(scores: Sequence[TaskScore]) -> TaskScore:
    """Average the scores of several random directions, document by document."""
    first = scores[0]
    grid = [score.values for score in scores if score.values is not None]
    values = tuple(map(mean, zip(*grid, strict=True))) if len(grid) == len(scores) else None
    value = mean([score.value for score in scores])
    spread = None if values is None or len(values) < 2 else torch.tensor(values).std().item()
    stderr = first.stderr if len(scores) == 1 else spread and spread / math.sqrt(first.n)
    return TaskScore(value, stderr, first.n, values, first.higher_is_better)


def paired_interval(
    score: TaskScore, plain: TaskScore, seed: int
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean difference of two scores of the same documents.

    Documents are resampled, each with both of its scores. There is none for figures that are no
    mean over documents, nor for equal differences of a metric without bounds.
    """
    if score.values is None or plain.values is None:
        return None, None
    if all(0 <= value <= 1 for value in (*score.values, *plain.values)):
        return paired_bootstrap(score.values, plain.values, seed)
    differences = [a - b for a, b in zip(score.values, plain.values, strict=True)]
    if len(set(differences)) == 1:
        return None, None
    return bootstrap(differences, seed)


def read_scores(results: Mapping[str, Any], members: Mapping[str, Sequence[str]]) -> Scores:
    """Read the harness's results: (task, metric) -> its score, with one value per document.

    Args:
        results: with `results`, `samples`, `higher_is_better` and `n-samples`.
        members: task or group -> the tasks whose documents its figure is taken over.
    """
    scores: dict[tuple[str, str], TaskScore] = {}
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            per_document = [
                float(sample[metric]) if _is_number(sample[metric]) else math.nan
                for member in members[task]
                for sample in sorted(results["samples"][member], key=lambda each: each["doc_id"])
                if sample["filter"] == kind and metric in sample
            ]
            stderr = figures.get(f"{metric}_stderr,{kind}")
            scores[task, metric if kind == "none" else name] = TaskScore(
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                n=len(per_document),
                values=_if_mean(per_document, float(value)),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
            )
    return scores


def _if_mean(values: Sequence[float], figure: float) -> tuple[float, ...] | None:
    """The documents' values where the figure is their mean; corpus metrics are something else."""
    if not values or not math.isclose(mean(values), figure, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return tuple(values)


def _is_number(value: object) -> bool:
    # The harness writes "N/A" for what it cannot compute, and pairs for its corpus metrics.
    return isinstance(value, bool | int | float | np.number | np.bool_)
