"""What every conversion gives back: the new lever, its residual, and figures as JSON."""

from __future__ import annotations

import dataclasses

from trimtab.prompts.soft.soft import Soft
from trimtab.results.tables import Printable, to_plain
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering

_LEVERS = (VectorSteering, PromptSteering, WeightSteering, Together)


class Conversion(Printable):
    """Mixin for frozen dataclasses that hold a converted lever beside its figures."""

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values, levers by their label; tensors have their own files."""
        assert dataclasses.is_dataclass(self)
        found: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _LEVERS):
                value = value.label
            elif isinstance(value, Soft):
                value = {"loss": value.loss, "start_loss": value.start_loss, "steps": value.steps}
            elif isinstance(value, tuple) and any(isinstance(item, _LEVERS) for item in value):
                value = [item.label for item in value]
            found[field.name] = to_plain(value)
        return found
