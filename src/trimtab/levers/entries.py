"""The levers of a table, each at its strength: what is measured, and what it took to get there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.levers.bakeable import bakeable
from trimtab.levers.conversions.conversion import Setting
from trimtab.levers.conversions.rank_one import fit_rank_one
from trimtab.levers.found import SCOPES, FoundLevers
from trimtab.levers.settle import Bench, reach, settle_ablation, settle_update, settle_vector
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.results import Progress
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.vector import Switch, VectorSteering
from trimtab.strength.place import Placed
from trimtab.weights.bake import bake

Lever: TypeAlias = "Switch | LanguageModel | None"
NAMES = (
    *("plain prompt", "prompt", "soft prompt", "vector (all)", "vector (last)"),
    *("bias", "rank-1", "LoRA", "ablation", "random"),
)
NO_STRENGTH = "no strength keeps the budget"
TRAIN = 32  # train prompts a side that a rank-1 update is fitted on
LARGEST_LORA = 4.0  # times the adapter as it was trained


@dataclass(frozen=True, eq=False)
class Entry:
    """One lever at its strength.

    Attributes:
        name: of its row.
        kind: `baseline`, `prompt`, `vector`, `weights` or `null`.
        levers: what is measured; several for nulls, whose figures are meaned.
        label: what it is, in short.
        strength: m; None for what is either there or not.
        limited_by: `budget`, `range` or `as found`.
        calls: rows put through the model to find and place it.
        baked: whether weights can hold it exactly.
        bakeable: by which route, or why not.
        residual: what its conversion lost.
    """

    name: str
    kind: str
    levers: tuple[Lever, ...]
    label: str
    strength: float | None = None
    limited_by: str = "as found"
    calls: int = 0
    baked: bool = False
    bakeable: str = ""
    residual: float | None = None


def entries_of(
    bench: Bench,
    found: FoundLevers,
    behavior: Behavior,
    nulls: int,
    folder: Path,
    progress: Progress,
) -> tuple[list[Entry], dict[str, str]]:
    """Place every lever under the budget.

    Args:
        bench: the validation split and the budget.
        found: levers of the train split.
        behavior: all of it, for conversions that split it themselves.
        nulls: random directions.
        folder: where a checkpoint may be written.
        progress: called with (levers placed, levers in all).

    Returns:
        The entries in the table's order, and the rows that are missing with the reason.
    """
    made = _Maker(bench, found, behavior, nulls, folder)
    steps: list[Callable[[], None]] = [
        made.prompts,
        *(lambda s=scope: made.vector(s) for scope in SCOPES),
        made.bias,
        made.rank_one,
        made.lora,
        made.ablation,
        made.random,
    ]
    for number, step in enumerate(steps, 1):
        step()
        progress(number, len(steps))
    base = Entry("unsteered", "baseline", (None,), "unsteered model")
    order = {name: place for place, name in enumerate(NAMES)}
    return [base, *sorted(made.entries, key=lambda e: order[e.name])], made.missing


@dataclass(eq=False)
class _Maker:
    bench: Bench
    found: FoundLevers
    behavior: Behavior
    nulls: int
    folder: Path
    entries: list[Entry] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    placed: dict[str, tuple[VectorSteering, Placed, int]] = field(default_factory=dict)

    @contextmanager
    def _making(self, name: str) -> Iterator[None]:
        """Note the reason where a lever cannot be made."""
        try:
            yield
        except TrimtabError as error:
            self.missing[name] = error.found

    def prompts(self) -> None:
        """What is either there or not."""
        lm, found = self.bench.lm, self.found
        named = (
            ("plain prompt", found.plain, "plain"),
            ("prompt", found.searched, "searched"),
            ("soft prompt", found.soft, "soft"),
        )
        for name, lever, key in named:
            if lever is None:
                self.missing[name] = found.missing.get(key, "not looked for")
                continue
            baked, route = bakeable(lm, lever)
            self.entries.append(
                Entry(
                    name,
                    "prompt",
                    (lever,),
                    lever.label,
                    calls=found.calls.get(key, 0),
                    baked=baked,
                    bakeable=route,
                )
            )

    def vector(self, scope: str) -> None:
        """The best candidate of one scope."""
        name, lm = f"vector ({scope})", self.bench.lm
        if scope not in self.found.vectors:
            self.missing[name] = self.found.missing.get(scope, "not looked for")
            return
        with self._making(name), counting(lm) as calls:
            vector, placed = settle_vector(self.bench, self.found.vectors[scope], scope)
            if not placed.strength:
                raise TrimtabError(name, NO_STRENGTH, "allow a larger budget")
            spent = self.found.calls.get(scope, 0) + calls.rows
            self.placed[scope] = (vector, placed, spent)
            label = f"{vector.label}, layers {', '.join(map(str, vector.layers))}"
            self._add(name, "vector", vector, label, placed, spent)

    def bias(self) -> None:
        """The vector of scope `all` as a checkpoint, reloaded."""
        with self._making("bias"):
            vector, placed, spent = self._vector("all")
            lm = self.bench.lm
            report = bake(lm, vector, self.folder / "baked")
            other = load(str(self.folder / "baked"), dtype=lm.model.dtype)
            effect, difference = report.steering_effect, report.max_logit_difference
            self.entries.append(
                Entry(
                    "bias",
                    "weights",
                    (other,),
                    f"{report.route} of {vector.label}",
                    placed.strength,
                    placed.limited_by,
                    spent,
                    True,
                    f"exact: {report.route}",
                    None if not effect or difference is None else difference / effect,
                )
            )

    def rank_one(self) -> None:
        """The vector of scope `all` as a rank-1 update of its writer."""
        with self._making("rank-1"):
            vector, _, spent = self._vector("all")
            with counting(self.bench.lm) as calls:
                tokens = self.bench.validation.max_new_tokens
                setting = Setting(
                    self.bench.lm, self.behavior, train_requests=TRAIN, max_new_tokens=tokens,
                    seed=self.bench.seed, known=self.bench.known,
                )  # fmt: skip
                update, fits = fit_rank_one(setting, vector)
                update, placed = settle_update(self.bench, update, reach(vector))
            residual = max(fit.held_out for fit in fits)
            self._add(
                "rank-1", "weights", update, update.label, placed, spent + calls.rows, residual
            )

    def lora(self) -> None:
        """The trained adapter, scaled."""
        found = self.found
        if found.lora is None:
            self.missing["LoRA"] = found.missing.get("lora", "not looked for")
            return
        with self._making("LoRA"), counting(self.bench.lm) as calls:
            update, placed = settle_update(self.bench, found.lora, LARGEST_LORA)
            spent = found.calls.get("lora", 0) + calls.rows
            label = f"{update.label}, rank {update.rank}, {len(update.left)} matrices"
            self._add("LoRA", "weights", update, label, placed, spent)

    def ablation(self) -> None:
        """The vector's direction taken out of every writer, or more of it put in."""
        with self._making("ablation"):
            vector, _, spent = self._vector("all")
            with counting(self.bench.lm) as calls:
                lever, placed = settle_ablation(self.bench, vector)
            self._add("ablation", "weights", lever, lever.label, placed, spent + calls.rows)

    def random(self) -> None:
        """Random directions of the size of the vector of scope `all`."""
        with self._making("random"):
            vector, placed, _ = self._vector("all")
            levers = [random_null(vector, s) for s in null_seeds(self.bench.seed, self.nulls)]
            label = f"{self.nulls} random directions of the size of vector (all)"
            self.entries.append(
                Entry("random", "null", tuple(levers), label, placed.strength, "as the vector")
            )

    def _vector(self, scope: str) -> tuple[VectorSteering, Placed, int]:
        if scope not in self.placed:
            reason = self.missing.get(f"vector ({scope})", "not placed")
            raise TrimtabError(
                "what a vector becomes", f"no vector ({scope}): {reason}", "find one"
            )
        return self.placed[scope]

    def _add(
        self,
        name: str,
        kind: str,
        lever: Switch,
        label: str,
        placed: Placed,
        calls: int,
        residual: float | None = None,
    ) -> None:
        if not placed.strength:
            raise TrimtabError(name, NO_STRENGTH, "allow a larger budget")
        baked, route = bakeable(self.bench.lm, lever)
        self.entries.append(
            Entry(
                name,
                kind,
                (lever,),
                label,
                placed.strength,
                placed.limited_by,
                calls,
                baked,
                route,
                residual,
            )
        )
