"""The levers of a table, each at its strength: what is measured, and what it took to get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Setting
from trimtab.levers.conversions.rank_one import fit_rank_one
from trimtab.levers.conversions.recovered import Lever
from trimtab.levers.conversions.vector_to_weights import vector_to_weights
from trimtab.levers.found import FoundLevers
from trimtab.levers.row import LeverEntry
from trimtab.levers.settle import Bench, reach, settle_ablation, settle_update, settle_vector
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.results import Progress
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.strength.place import Placed
from trimtab.weights.bake import bake
from trimtab.weights.disk.layout import layout_of

NAMES = (
    *("plain prompt", "prompt", "soft prompt", "vector (all)", "vector (last)"),
    *("bias", "rank-1", "LoRA", "ablation", "random"),
)
TRAIN = 32  # train prompts a side that a rank-1 update is fitted on
LARGEST_LORA = 4.0  # times the adapter as it was trained


@dataclass(frozen=True, kw_only=True, eq=False)
class Made(LeverEntry):
    """An entry with what is measured: several levers for nulls, whose figures are meaned."""

    levers: tuple[Lever, ...]


def entries_of(
    bench: Bench,
    found: FoundLevers,
    behavior: Behavior,
    nulls: int,
    folder: Path,
    progress: Progress,
) -> tuple[list[Made], dict[str, str]]:
    """Place every lever under the budget.

    Conversions split `behavior` themselves, so it is all of it; a checkpoint is written into `folder`.

    Returns:
        The entries, the unsteered model first, and the rows that are missing with the reason.
    """
    maker = _Maker(bench, found, behavior, nulls, folder)
    ways: tuple[Callable[[str], Made], ...] = (
        partial(maker.prompt, found.plain, "plain"),
        partial(maker.prompt, found.searched, "searched"),
        partial(maker.prompt, found.soft, "soft"),
        partial(maker.vector, "all"),
        partial(maker.vector, "last"),
        *(maker.bias, maker.rank_one, maker.lora, maker.ablation, maker.random),
    )
    for number, (name, way) in enumerate(zip(NAMES, ways, strict=True), 1):
        try:
            maker.made[name] = way(name)
        except TrimtabError as refusal:
            maker.missing[name] = refusal.found
        progress(number, len(NAMES))
    base = Made(name="unsteered", kind="baseline", lever="unsteered model", levers=(None,))
    return [base, *maker.made.values()], maker.missing


@dataclass(eq=False)
class _Maker:
    bench: Bench
    found: FoundLevers
    behavior: Behavior
    nulls: int
    folder: Path
    made: dict[str, Made] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def prompt(self, lever: PromptSteering | None, key: str, name: str) -> Made:
        """What is either there or not."""
        if lever is None:
            raise self._absent(key)
        baked, route = bakeable(self.bench.lm, lever)
        return Made(
            name=name, kind="prompt", lever=lever.label, calls=self.found.calls.get(key, 0),
            baked=baked, bakeable=route, levers=(lever,),
        )  # fmt: skip

    def vector(self, scope: str, name: str) -> Made:
        """The best candidate of one scope."""
        if scope not in self.found.vectors:
            raise self._absent(scope)
        with counting(self.bench.lm) as calls:
            vector, placed = settle_vector(self.bench, self.found.vectors[scope], scope)
        spent = self.found.calls.get(scope, 0) + calls.rows
        label = f"{vector.label}, layers {', '.join(map(str, vector.layers))}"
        return self._placed(name, "vector", vector, label, placed, spent)

    def bias(self, name: str) -> Made:
        """The vector of scope `all` as a checkpoint, reloaded."""
        vector, source = self._vector()
        lm = self.bench.lm
        report = bake(lm, vector, self.folder / "baked")
        effect, difference = report.steering_effect, report.max_logit_difference
        return replace(
            source,
            name=name,
            kind="weights",
            lever=f"{report.route} of {vector.label}",
            baked=True,
            bakeable=f"exact: {report.route}",
            residual=None if not effect or difference is None else difference / effect,
            levers=(load(str(self.folder / "baked"), dtype=lm.model.dtype),),
        )

    def rank_one(self, name: str) -> Made:
        """The vector of scope `all` as a rank-1 update of its writer."""
        vector, source = self._vector()
        bench = self.bench
        with counting(bench.lm) as calls:
            setting = Setting(
                bench.lm,
                self.behavior,
                train_requests=TRAIN,
                seed=bench.seed,
                known=bench.validation.known,
            )
            update, fits = fit_rank_one(setting, vector)
            update, placed = settle_update(bench, update, reach(vector))
        spent = source.calls + calls.rows
        made = self._placed(name, "weights", update, update.label, placed, spent)
        return replace(made, residual=max(fit.held_out for fit in fits))

    def lora(self, name: str) -> Made:
        """The trained adapter, scaled."""
        if self.found.lora is None:
            raise self._absent("lora")
        with counting(self.bench.lm) as calls:
            update, placed = settle_update(self.bench, self.found.lora, LARGEST_LORA)
        spent = self.found.calls.get("lora", 0) + calls.rows
        label = f"{update.label}, rank {update.rank}, {len(update.left)} matrices"
        return self._placed(name, "weights", update, label, placed, spent)

    def ablation(self, name: str) -> Made:
        """The vector's direction taken out of every writer, or more of it put in."""
        vector, source = self._vector()
        with counting(self.bench.lm) as calls:
            lever, placed = settle_ablation(self.bench, vector)
        return self._placed(name, "weights", lever, lever.label, placed, source.calls + calls.rows)

    def random(self, name: str) -> Made:
        """Random directions of the size of the vector of scope `all`."""
        vector, source = self._vector()
        return Made(
            name=name,
            kind="null",
            lever=f"{self.nulls} random directions of the size of vector (all)",
            strength=source.strength,
            limited_by="as the vector",
            levers=tuple(random_null(vector, s) for s in null_seeds(self.bench.seed, self.nulls)),
        )

    def _vector(self) -> tuple[VectorSteering, Made]:
        source = self.made.get("vector (all)")
        if source is None:
            reason = f"no vector (all): {self.missing['vector (all)']}"
            raise TrimtabError("what a vector becomes", reason, "find one")
        (vector,) = source.levers
        assert isinstance(vector, VectorSteering)
        return vector, source

    def _absent(self, key: str) -> TrimtabError:
        return TrimtabError(key, self.found.missing.get(key, "not looked for"), "find it")

    def _placed(
        self,
        name: str,
        kind: str,
        lever: VectorSteering | WeightSteering | Together,
        label: str,
        placed: Placed,
        calls: int,
    ) -> Made:
        if not placed.strength:
            raise TrimtabError(name, "no strength keeps the budget", "allow a larger budget")
        baked, route = bakeable(self.bench.lm, lever)
        return Made(
            name=name, kind=kind, lever=label, strength=placed.strength,
            limited_by=placed.limited_by, calls=calls, baked=baked, bakeable=route, levers=(lever,),
        )  # fmt: skip


def bakeable(
    lm: LanguageModel, lever: PromptSteering | VectorSteering | WeightSteering | Together
) -> tuple[bool, str]:
    """Return whether a lever has an exact place in the weights, and the route or the reason.

    Nothing is written but the planner's temporary copy; `vector_to_weights` verifies.
    """
    if isinstance(lever, WeightSteering):
        count = len(lever.left)
        return True, f"exact: merged into {count} matri{'x' if count == 1 else 'ces'}"
    if isinstance(lever, PromptSteering) and lever.vectors is None:
        return False, "no: words go into the prompt"
    try:
        if isinstance(lever, PromptSteering):
            layout_of(lm.model.config)
            return True, "exact: soft prompt to vocabulary"
        vectors = lever.vectors if isinstance(lever, Together) else (lever,)
        found = vector_to_weights(lm, vectors, routes=(), verify=False)
    except TrimtabError as refusal:  # such as an architecture without routes
        return False, f"no: {refusal.found}"
    return found.exact, found.told
