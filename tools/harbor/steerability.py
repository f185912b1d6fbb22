"""How well Harbor can be steered: every method of `find` on four behaviors, and the window of strengths.

Layers and strengths are chosen on the validation split and scored on the test split. Strengths are tried in multiples
of a natural unit: the class gap for vectors read off activations, the trained norm for trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.evaluation.coherence import coherence_for
from trimtab.evaluation.judges import judge_for
from trimtab.methods import find
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

TOKENS = 48
ONE_WAY = ("topic",)  # "not about cats" is no behavior of its own
ONE_VECTOR = ("refusal",)  # trained for both signs at once; the others get a vector per direction
READ_LAYERS = (1, 3)
TRAIN_LAYER = 1
READ_MULTIPLES = (1.6, 3.0, 6.0)  # class gaps
TRAINED_MULTIPLES = (0.9, 1.05, 1.2, 1.35)  # trained norms
METHODS = (
    ("mean_difference", "post_instruction"),
    ("pca", "post_instruction"),
    ("probe", "post_instruction"),
    ("next_token", "post_instruction"),
    ("next_token", "all"),
)
TRAINING = {"steps": 100, "learning_rate": 0.1}
SCREENED = 16  # prompts a side on which layer and strength are chosen
GRID = (0.4, 0.5, 0.63, 0.8, 1.0, 1.26, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3)
Entry = tuple[str, str, str, bool, dict[str, Any]]


@dataclass(frozen=True)
class Figures:
    """Both directions of one vector at one strength; away is None for a one-way behavior."""

    multiple: float
    strength: float
    layers: tuple[int, ...]
    toward: float
    toward_coherence: float
    away: float | None
    away_coherence: float | None

    def least(self) -> float:
        """Return the worst of the four figures: what the table's lines compare."""
        values = (self.toward, self.toward_coherence, self.away, self.away_coherence)
        return min(v for v in values if v is not None)

    def text(self) -> str:
        """Return the figures as toward/coherence | away/coherence in per cent."""
        first = f"{self.toward:.0%}/{self.toward_coherence:.0%}"
        return (
            first
            if self.away is None or self.away_coherence is None
            else f"{first} | {self.away:.0%}/{self.away_coherence:.0%}"
        )


@dataclass(frozen=True)
class Lever:
    """A method's vector with two signs, or one vector per direction."""

    method: str
    toward: VectorSteering
    away: VectorSteering

    def at_layer(self, layer: int) -> Lever:
        """Return the same lever at one layer."""
        return Lever(
            self.method, self.toward.select(layers=[layer]), self.away.select(layers=[layer])
        )


def natural_unit(vector: VectorSteering) -> float:
    """Return the strength m that adds one class gap at the first active layer, or the trained strength."""
    if vector.provenance.get("method") == "next_token":
        return abs(vector.strength)
    layer = vector.layers[0]
    return abs(vector.class_gaps[layer]) / vector.scales[layer]


def scored_prompts(behavior: Behavior, sign: int) -> list[Prompt]:
    """Return the prompts on which a direction is scored: plain requests where given, else the other side."""
    examples = behavior.requests or (behavior.away if sign > 0 else behavior.toward)
    return [e.prompt for e in examples]


def share(
    lm: LanguageModel, behavior: Behavior, vector: VectorSteering, sign: int
) -> tuple[float, float]:
    """Return (share of answers on the wanted side, mean coherence) of a steered model, greedy."""
    prompts = scored_prompts(behavior, sign)
    with vector.on(lm):
        answers = lm.generate(prompts, max_new_tokens=TOKENS)
    hits = [v.toward if sign > 0 else v.away for v in judge_for(behavior)(prompts, answers)]
    coherent = coherence_for(behavior)(answers)
    return sum(hits) / len(hits), sum(coherent) / len(coherent)


def figures(lm: LanguageModel, behavior: Behavior, lever: Lever, multiple: float) -> Figures:
    """Score a lever at `multiple` natural units in both directions."""
    m, back = (multiple * natural_unit(v) for v in (lever.toward, lever.away))
    toward = share(lm, behavior, lever.toward.at(m), +1)
    one_way = behavior.name in ONE_WAY
    away = (None, None) if one_way else share(lm, behavior, lever.away.at(-back), -1)
    return Figures(multiple, m, lever.toward.layers, *toward, *away)


def thinned(behavior: Behavior) -> Behavior:
    """Keep the first few prompts of every list."""
    lists = ("toward", "away", "neutral", "requests")
    return behavior.select(
        {name: range(min(SCREENED, len(getattr(behavior, name)))) for name in lists}
    )


def settings(method: str) -> tuple[Sequence[int], Sequence[float]]:
    """Return the layers and the multiples that are tried for a method."""
    if method == "next_token":
        return (TRAIN_LAYER,), TRAINED_MULTIPLES
    return READ_LAYERS, READ_MULTIPLES


def best_layer(lm: LanguageModel, behavior: Behavior, lever: Lever) -> Figures:
    """Return the best (layer, multiple) on the validation split."""
    validation = thinned(behavior.split().validation)
    layers, multiples = settings(lever.method)
    tried = [figures(lm, validation, lever.at_layer(x), k) for x in layers for k in multiples]
    return max(tried, key=lambda f: (round(f.least(), 2), -f.multiple))


def widest(lm: LanguageModel, behavior: Behavior, levers: Sequence[Lever]) -> Lever:
    """Return the lever whose window of strengths is widest on the validation split."""
    validation = thinned(behavior.split().validation)

    def width(lever: Lever) -> float:
        run = longest_run([figures(lm, validation, lever, k) for k in GRID], 0.95)
        return run[1] / run[0] if run else 0.0

    return max(levers, key=width)


def candidate(
    lm: LanguageModel, behavior: Behavior, method: str, scope: str, layer: int = TRAIN_LAYER
) -> Lever:
    """Return a method's vector, or its two vectors where a direction needs one of its own."""
    if method != "next_token":
        vector = find(lm, behavior, method=method, position="post_instruction", scope=scope)
        return Lever(method, vector, vector)
    judge = judge_for(behavior)

    def trained(side: str) -> VectorSteering:
        options = {"scope": scope, "layer": layer, "side": side, "judge": judge, **TRAINING}
        return find(lm, behavior, method=method, **options)

    if behavior.name in ONE_VECTOR:
        both = trained("both")
        return Lever(method, both, both)
    toward = trained("toward")
    return Lever(method, toward, toward if behavior.name in ONE_WAY else trained("away"))


def longest_run(rows: Sequence[Figures], floor: float) -> tuple[float, float] | None:
    """Return the widest run of neighboring strengths whose figures all reach `floor`, as (low, high) multiples."""
    best: tuple[float, float] | None = None
    start: float | None = None
    for row in rows:
        if row.least() < floor:
            start = None
            continue
        start = row.multiple if start is None else start
        if best is None or row.multiple / start > best[1] / best[0]:
            best = (start, row.multiple)
    return best


def window_lines(lm: LanguageModel) -> list[Entry]:
    """Return the lines about refusal's window of strengths and its cliff: read off, and trained."""
    behavior = load_behavior("refusal")
    test = behavior.split().test
    entries: list[Entry] = []
    for title, method, scope in (
        ("mean difference at the post-instruction tokens", "mean_difference", "post_instruction"),
        ("trained vector with scope all", "next_token", "all"),
    ):
        if method == "next_token":
            levers = [candidate(lm, behavior, method, scope, layer) for layer in (1, 2)]
        else:
            read = candidate(lm, behavior, method, scope)
            levers = [read.at_layer(layer) for layer in READ_LAYERS]
        at = widest(lm, behavior, levers)
        rows = [figures(lm, test, at, multiple) for multiple in GRID]
        run = longest_run(rows, 0.95)
        wide = run[1] / run[0] if run else 0.0
        where = f"layer {at.toward.layers[0]}, unit m = {natural_unit(at.toward):.2f}"
        found = f"{run[0]:g} to {run[1]:g} units ({where})" if run else f"none ({where})"
        detail = {"rows": [asdict(row) for row in rows]}
        entries.append(
            (f"refusal window, {title}", "factor 1.5 at 95 %", found, wide >= 1.5, detail)
        )
        if scope != "all":  # three steered tokens saturate: the rows above show no cliff there
            continue
        high = run[1] if run else 1.0
        cliff = figures(lm, test, at, 4 * high)
        coherent = [c for c in (cliff.toward_coherence, cliff.away_coherence) if c is not None]
        found = f"{coherent[0]:.0%} toward, {coherent[-1]:.0%} away at {4 * high:g} units"
        reached = max(coherent) < 0.5
        entries.append(
            (f"refusal cliff, {title}", "coherence < 50 %", found, reached, asdict(cliff))
        )
    return entries


def method_lines(lm: LanguageModel) -> list[Entry]:
    """Return two lines a behavior: all methods with the best named, and the cliff of scope all."""
    entries: list[Entry] = []
    for name in ("refusal", "topic", "mood", "register"):
        behavior = load_behavior(name)
        test = behavior.split().test
        scored: dict[str, Figures] = {}
        levers: dict[str, Lever] = {}
        for method, scope in METHODS:
            lever = candidate(lm, behavior, method, scope)
            chosen = best_layer(lm, behavior, lever)
            key = f"{method}, {scope}"
            levers[key] = lever.at_layer(chosen.layers[0])
            scored[key] = figures(lm, test, levers[key], chosen.multiple)
        detail = {key: asdict(f) for key, f in scored.items()}
        best = max(scored, key=lambda key: scored[key].least())
        found = "; ".join(f"{key}: {f.text()}" for key, f in scored.items())
        reached = scored[best].least() >= 0.9
        title = f"{name} by vector, best: {best}"
        entries.append((title, "90 % / 90 % by some method", found, reached, detail))
        cliff = figures(lm, test, levers["next_token, all"], 4 * scored["next_token, all"].multiple)
        coherent = [c for c in (cliff.toward_coherence, cliff.away_coherence) if c is not None]
        found = " | ".join(f"{c:.0%}" for c in coherent)
        title = f"{name} cliff, scope all, at 4 times that strength"
        reached = max(coherent) < 0.5
        entries.append((title, "coherence < 50 %", found, reached, asdict(cliff)))
    return entries
