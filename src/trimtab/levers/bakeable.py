"""Whether weights can hold a lever exactly, and by which route."""

from __future__ import annotations

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.vector_to_weights import vector_to_weights
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.weights.disk.layout import layout_of

WORDS = "no: words go into the prompt"


def bakeable(lm: LanguageModel, lever: object) -> tuple[bool, str]:
    """Return whether a lever has an exact place in the weights, and the route or the reason.

    Nothing is written but the planner's temporary copy; `vector_to_weights` verifies.
    """
    if isinstance(lever, PromptSteering):
        return (False, WORDS) if lever.vectors is None else _vocabulary(lm)
    if isinstance(lever, WeightSteering):
        count = len(lever.left)
        return True, f"exact: merged into {count} matri{'x' if count == 1 else 'ces'}"
    if isinstance(lever, VectorSteering | Together):
        vectors = lever.vectors if isinstance(lever, Together) else (lever,)
        try:
            found = vector_to_weights(lm, vectors, routes=(), verify=False)
        except TrimtabError as refusal:  # such as an architecture without routes
            return False, f"no: {refusal.found}"
        return found.exact, found.told
    return False, "no"


def _vocabulary(lm: LanguageModel) -> tuple[bool, str]:
    """A soft prompt becomes rows of the vocabulary, where the checkpoint's layout is known."""
    try:
        layout_of(lm.model.config)
    except TrimtabError as refusal:
        return False, f"no: {refusal.found}"
    return True, "exact: soft prompt to vocabulary"
