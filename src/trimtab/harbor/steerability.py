"""How well Harbor can be steered: every method of `find` on four behaviours, and the window of strengths.

Layers and strengths are chosen on the validation split and scored on the test split. Strengths are tried in multiples
of a natural unit: the class gap for vectors read off activations, the trained norm for trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.behavior import Behavior, load_behavior
from trimtab.chat import Prompt
from trimtab.find import find
from trimtab.measure.coherence import coherence_for
from trimtab.measure.judges import judge_for
from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering

TOKENS = 48
ONE_WAY = ("topic",)  # "not about cats" is no behaviour of its own
READ_LAYERS = (1, 2, 3, 4, 5)
TRAIN_LAYER = 2
MULTIPLES = (0.8, 1.25, 2.0, 3.0, 4.5)
GRID = (0.4, 0.5, 0.63, 0.8, 1.0, 1.26, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3)
Entry = tuple[str, str, str, bool, dict[str, Any]]


@dataclass(frozen=True)
class Figures:
    """Both directions of one vector at one strength; away is None for a one-way behaviour."""

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
        return first if self.away is None or self.away_coherence is None else f"{first} | {self.away:.0%}/{self.away_coherence:.0%}"


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


def share(lm: LanguageModel, behavior: Behavior, vector: VectorSteering, sign: int) -> tuple[float, float]:
    """Return (share of answers on the wanted side, mean coherence) of a steered model, greedy."""
    prompts = scored_prompts(behavior, sign)
    with vector.on(lm):
        answers = lm.generate(prompts, max_new_tokens=TOKENS)
    hits = [v.toward if sign > 0 else v.away for v in judge_for(behavior)(prompts, answers)]
    coherent = coherence_for(behavior)(answers)
    return sum(hits) / len(hits), sum(coherent) / len(coherent)


def figures(lm: LanguageModel, behavior: Behavior, vector: VectorSteering, multiple: float) -> Figures:
    """Score a vector at `multiple` natural units in both directions."""
    m = multiple * natural_unit(vector)
    toward = share(lm, behavior, vector.at(m), +1)
    away = (None, None) if behavior.name in ONE_WAY else share(lm, behavior, vector.at(-m), -1)
    return Figures(multiple, m, vector.layers, *toward, *away)


def best_layer(lm: LanguageModel, behavior: Behavior, vector: VectorSteering, layers: Sequence[int]) -> Figures:
    """Return the best (layer, multiple) on the validation split."""
    validation = behavior.split().validation
    tried = [figures(lm, validation, vector.select(layers=[at]), k) for at in layers for k in MULTIPLES]
    return max(tried, key=lambda f: (round(f.least(), 2), -f.multiple))


def candidates(lm: LanguageModel, behavior: Behavior) -> dict[str, tuple[VectorSteering, tuple[int, ...]]]:
    """Return each method's vector with the layers that are worth trying."""
    judge = judge_for(behavior)
    found: dict[str, tuple[VectorSteering, tuple[int, ...]]] = {}
    for method in ("mean_difference", "pca", "probe"):
        vector = find(lm, behavior, method=method, position="post_instruction", scope="post_instruction")
        found[f"{method}, post_instruction"] = (vector, READ_LAYERS)
    side = "toward" if behavior.name in ONE_WAY else "both"
    for scope in ("post_instruction", "all"):
        trained = find(lm, behavior, method="next_token", scope=scope, layer=TRAIN_LAYER, side=side, judge=judge)
        found[f"next_token, {scope}"] = (trained, (TRAIN_LAYER,))
    return found


def longest_run(rows: Sequence[Figures], floor: float) -> tuple[float, float] | None:
    """Return the widest run of neighbouring strengths whose figures all reach `floor`, as (low, high) multiples."""
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
    """Return the two lines about refusal's window of strengths: read off, and trained for scope all."""
    behavior = load_behavior("refusal")
    test = behavior.split().test
    entries: list[Entry] = []
    for title, key in (
        ("steering window, refusal: mean difference at the post-instruction tokens", "mean_difference, post_instruction"),
        ("steering window, refusal: trained vector with scope all", "next_token, all"),
    ):
        vector, layers = candidates(lm, behavior)[key]
        chosen = best_layer(lm, behavior, vector, layers) if len(layers) > 1 else None
        at = vector.select(layers=chosen.layers if chosen else layers)
        rows = [figures(lm, test, at, k) for k in GRID]
        run = longest_run(rows, 0.95)
        wide = run[1] / run[0] if run else 0.0
        found = f"layer {at.layers[0]}: {run[0]:g} to {run[1]:g} units, factor {wide:.1f}" if run else "none"
        middle = (run[0] * run[1]) ** 0.5 if run else 1.0
        entries.append((title, "factor 1.5 at 95 %", found, wide >= 1.5, {"rows": [asdict(r) for r in rows]}))
        cliff = figures(lm, test, at, 4 * middle)
        worst = min(cliff.toward_coherence, cliff.away_coherence if cliff.away_coherence is not None else 1.0)
        both = f"{cliff.toward_coherence:.0%} toward, {cliff.away_coherence:.0%} away"
        entries.append((f"cliff at 4 times that strength ({key})", "coherence < 50 %", both, worst < 0.5, asdict(cliff)))
    return entries


def method_lines(lm: LanguageModel) -> list[Entry]:
    """Return one line a behaviour: the best method's figures, with those of every method in the detail."""
    entries: list[Entry] = []
    for name in ("refusal", "topic", "mood", "register"):
        behavior = load_behavior(name)
        test = behavior.split().test
        scored: dict[str, Figures] = {}
        for key, (vector, layers) in candidates(lm, behavior).items():
            chosen = best_layer(lm, behavior, vector, layers)
            scored[key] = figures(lm, test, vector.select(layers=chosen.layers), chosen.multiple)
        best = max(scored, key=lambda k: scored[k].least())
        found = "; ".join(f"{k}: {f.text()}" for k, f in scored.items())
        detail = {k: asdict(f) for k, f in scored.items()}
        entries.append((f"{name} by vector, best: {best}", "90 % / 90 %", found, scored[best].least() >= 0.9, detail))
    return entries
