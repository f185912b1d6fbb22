"""What baking gives back: the routes, how equal the checkpoint is to the hook, and how it is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.results.tables import Printable, Table
from trimtab.weights.margin import Margin
from trimtab.weights.plan import Plan


@dataclass(frozen=True)
class BakeReport(Printable):
    """What was written and how equal it is to the hooked model after a real reload.

    The differences are None when verification was switched off.

    Attributes:
        route: how the steering was made weights.
        path: folder of the checkpoint.
        max_logit_difference: largest |hooked - reloaded| over all logits of the check prompts.
        equal_text: whether the greedy answers are the same; None where only a slice was loaded.
        unexpected_keys: keys of the checkpoint that the reload did not know; always empty.
        missing_keys: keys that the reload did not find; always empty.
        tolerance: what `max_logit_difference` was held against.
        steering_effect: largest |hooked - unsteered| over the same logits, for scale.
        rounding: largest ||stored - meant|| / ||meant|| over the constants and updates stored.
        dtype: of the checkpoint.
        verified: what was compared, or "not checked".
        float32_difference: of a half-precision checkpoint, the difference with float32 arithmetic.
        tensors_compared: tensors found bit by bit as meant.
        plan: routes and costs.
        base_fingerprint: of the base; as the vectors recorded it where the base was not loaded.
        margin: a behavior's readout margin before and after, where one was given.
    """

    route: str
    path: Path
    max_logit_difference: float | None
    equal_text: bool | None
    unexpected_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    tolerance: float | None = None
    steering_effect: float | None = None
    rounding: float = 0.0
    dtype: str = "float32"
    verified: str = "not checked"
    float32_difference: float | None = None
    tensors_compared: int = 0
    plan: Plan | None = None
    base_fingerprint: str = ""
    margin: Margin | None = None

    def table(self) -> Table:
        """Return one line per fact."""
        facts = [
            ("route", self.route),
            ("folder", str(self.path)),
            ("compared", self.verified),
            ("largest logit difference to the hook", _figure(self.max_logit_difference)),
            ("allowed", _figure(self.tolerance)),
            ("largest effect of the steering on a logit", _figure(self.steering_effect)),
            ("greedy text equal", {None: "not checked", True: "yes", False: "no"}[self.equal_text]),
            (f"rounding to {self.dtype}", _figure(self.rounding)),
        ]
        if self.float32_difference is not None:
            said = "the same difference with float32 arithmetic"
            facts.append((said, _figure(self.float32_difference)))
        if self.plan is not None:
            facts.append(("layers added", str(self.plan.extra_layers)))
            sizes = f"{self.plan.bytes_written:,}, {self.plan.bytes_shared:,}"
            facts.append(("bytes written, shared", sizes))
        if self.margin is not None:
            for row in self.margin.rows:
                moved = f"{row.before[0]:.2f} -> {row.after[0]:.2f} nats (a null: {row.null:+.2f})"
                facts.append((f"gap on {row.side} prompts of {self.margin.behavior}", moved))
        return Table("baked checkpoint", ("what", "found"), tuple(facts))


def _figure(value: float | None) -> str:
    return "not checked" if value is None else f"{value:.2g}"
