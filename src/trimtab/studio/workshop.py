"""What the users of one app share: the model, a lock around it, and the unsteered answers."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation import Measurement, judge_for, measure
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.mechanism import explain
from trimtab.methods import METHODS, find
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.report.explain_page import write_explain_page
from trimtab.results import Progress
from trimtab.results.files import written
from trimtab.steering.prompt import prompt as prompt_lever
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import Bounds, span
from trimtab.strength.sweep import NoStrengthPasses
from trimtab.strength.tune import tune
from trimtab.studio.coloring import Scale, projections, scale_of
from trimtab.studio.lever import Lever, measure_lever
from trimtab.studio.streaming import stream
from trimtab.weights import bake

# Answers to what users typed; those to a behavior's prompts are kept with its evaluator.
KEPT_ANSWERS = 256
SEED = 0


@dataclass(frozen=True)
class Limits:
    """How much is run, tokens of an answer and prompts a side: small figures keep a move short."""

    answer_tokens: int = 24
    gauge_prompts: int = 6
    tune_prompts: int = 8
    lever_prompts: int = 8
    explain_prompts: int = 4


@dataclass(frozen=True, eq=False)
class Workbench:
    """Everything that one user has on the table; a new behavior makes a new one.

    `note` says how the vector was come by, or why it could not be tuned.
    """

    behavior: Behavior
    lever: Lever
    scale: Scale
    note: str

    def at(self, strength: float) -> VectorSteering:
        """The vector at a strength; at 0, where it does nothing, as it was found or tuned."""
        return self.lever.vector.at(strength or self.lever.vector.strength)

    def prompts(self) -> list[str]:
        """Return the held-out prompts in words, to choose one from."""
        sides = self.lever.evaluator.prompts(self.lever.evaluator.scored(self.lever.side))
        return [p for p in sides if isinstance(p, str)] or [_words(p) for p in sides]


class Workshop:
    """One model for several users: steering hooks are global to it, so each use holds the lock."""

    def __init__(self, lm: LanguageModel, limits: Limits = Limits()) -> None:  # noqa: B008
        self.lm, self.limits = lm, limits
        self.lock: AbstractContextManager[object] = threading.Lock()
        self._answers: OrderedDict[str, str] = OrderedDict()

    def find(
        self,
        behavior: Behavior,
        method: str,
        side: int,
        bounds: Bounds,
        report: Callable[[str], Progress],
    ) -> Workbench:
        """Find a vector, tune it, and measure it over the slider's range.

        A vector that no strength passes for is kept as it was found, and the note says so.
        `report` makes the progress callback of a stage from its name.
        """
        judge = judge_for(behavior)
        options: dict[str, Any] = {}
        if "judge" in METHODS[method].options and behavior.judge is not None:
            options["judge"] = judge
        with self.lock:
            found = find(
                self.lm, behavior, method, seed=SEED, progress=report("finding"), **options
            )
            try:
                tuned = tune(
                    self.lm,
                    behavior,
                    found,
                    bounds.budget,
                    direction="toward" if side > 0 else "away",
                    coherence_floor=bounds.coherence,
                    target=bounds.target,
                    max_new_tokens=self.limits.answer_tokens,
                    max_prompts=self.limits.tune_prompts,
                    seed=SEED,
                    progress=report("tuning"),
                )
                window = tuned.report.window
                note = f"found by {method}, tuned to m = {tuned.strength:+.3g}" + (
                    f" (window while tuning {span(window)})" if window else ""
                )
            except NoStrengthPasses as refusal:
                tuned = found.at(side * abs(found.strength))
                note = f"found by {method}, but not tuned: {refusal.found}"
        return self.take(behavior, tuned, bounds, report("measuring the slider's range"), note)

    def take(
        self,
        behavior: Behavior,
        vector: VectorSteering,
        bounds: Bounds,
        progress: Progress | None = None,
        note: str = "from a file",
    ) -> Workbench:
        """Put a vector on the table: measure its curve, its windows and the scale of the colors."""
        vector.check(self.lm)
        # Spill is not among the gauges: without neutral prompts a move costs a third less.
        data = behavior.split(SEED).test
        kept = {name: range(len(getattr(data, name))) for name in ("toward", "away", "requests")}
        evaluator = Evaluator(
            self.lm,
            data.select(kept),
            max_new_tokens=self.limits.answer_tokens,
            max_prompts=self.limits.gauge_prompts,
            unsteered=Unsteered(self.lm, self.limits.answer_tokens),
        )
        lever = measure_lever(evaluator, vector, bounds, self.lock, progress)
        with self.lock:
            pairs = [
                pair
                for side in ("toward", "away")
                for pair in zip(evaluator.prompts(side), evaluator.unsteered(side), strict=True)
            ]
            scale = scale_of(self.lm, vector, pairs)
        return Workbench(behavior, lever, scale, note)

    def answers(self, bench: Workbench, prompt: str, strength: float) -> Iterator[tuple[str, str]]:
        """Answer a prompt unsteered and steered, as pairs that grow; the first may be complete.

        The unsteered answer is made once. A strength of 0 is the unsteered model itself.
        """
        if not prompt.strip():
            raise TrimtabError("an answer", "an empty prompt", "type something to answer")
        before, vector = self._answers.get(prompt), bench.lever.vector
        if before is not None and strength == 0:
            yield before, before
            return
        asked = ([] if before is not None else [0.0]) + ([strength] if strength else [])
        count = self.limits.answer_tokens
        pair = (before or "", "")
        for found in stream(self.lm, vector, prompt, asked, count, self.lock):
            pair = (before if before is not None else found[0], found[-1])
            yield pair
        self._answers[prompt] = pair[0]
        while len(self._answers) > KEPT_ANSWERS:
            self._answers.popitem(last=False)

    def tokens(self, bench: Workbench, prompt: str, answer: str) -> list[tuple[str, float]]:
        """Return an answer's tokens with their shade, from -1 (away) to 1 (toward)."""
        with self.lock:
            found = projections(self.lm, bench.lever.vector, prompt, answer)
        return [(text, bench.scale.shade(value)) for text, value in found]

    def compare(
        self, bench: Workbench, strength: float, words: str, progress: Progress | None = None
    ) -> Measurement:
        """Measure the vector beside a prompt lever, the plain prompt and a random control."""
        levers = [bench.at(strength), *([prompt_lever(words)] if words.strip() else [])]
        with self.lock:
            return measure(
                self.lm,
                bench.behavior,
                levers,
                nulls=1,
                max_new_tokens=self.limits.answer_tokens,
                max_prompts=self.limits.lever_prompts,
                seed=SEED,
                progress=progress,
            )

    def explain(
        self, bench: Workbench, strength: float, folder: Path, progress: Progress | None = None
    ) -> Path:
        """Write the page that says why the vector works, and return its path."""
        with self.lock:
            found = explain(
                self.lm,
                bench.behavior,
                bench.lever.vector,
                strength=strength or None,
                max_prompts=self.limits.explain_prompts,
                max_new_tokens=self.limits.answer_tokens,
                seed=SEED,
                progress=progress,
            )
        return write_explain_page(folder, found)

    def save(self, bench: Workbench, strength: float, folder: Path) -> Path:
        """Write the steering file at this strength."""
        folder.mkdir(parents=True, exist_ok=True)
        return bench.lever.vector.at(strength).save(folder / "steering.safetensors")

    def bake(
        self, bench: Workbench, strength: float, folder: Path, progress: Progress | None = None
    ) -> Path:
        """Bake the vector at this strength into a checkpoint, verified, and zip it."""
        if strength == 0:
            raise TrimtabError(
                "to bake at strength 0", "the unsteered model", "move the slider off 0 first"
            )
        checkpoint = folder / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with self.lock:
                bake(self.lm, bench.lever.vector.at(strength), checkpoint, progress=progress)
            return zipped(checkpoint, folder / "checkpoint.zip")
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)


def zipped(folder: Path, target: Path) -> Path:
    """Pack a folder; weights do not compress, so nothing is compressed."""
    with written(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return target


def written_behavior(
    name: str, toward: str, away: str, shows: str, opposite: str, neutral: str = ""
) -> Behavior:
    """Make a behavior from a form: one prompt a line, phrases that answers are judged by."""
    judge = {"toward": _lines(shows), "away": _lines(opposite)}
    if not any(judge.values()):
        raise TrimtabError(
            f"the behavior {name!r}",
            "no phrases to judge answers by",
            "write some phrases that occur in answers that show it, one a line",
        )
    return Behavior(
        name=name.strip() or "mine",
        toward=_lines(toward),
        away=_lines(away),
        neutral=_lines(neutral),
        judge={"kind": "phrases", **{key: words for key, words in judge.items() if words}},
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _words(prompt: Prompt) -> str:
    """The last message of a conversation, or its JSON where it has no text."""
    last: Any = prompt[-1]
    return last["content"] if isinstance(last, dict) else json.dumps(prompt)
