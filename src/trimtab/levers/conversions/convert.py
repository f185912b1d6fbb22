"""The one door to every conversion: `convert(lm, behavior, lever, to=...)`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.levers.conversions.ablation import ablation_to_weights
from trimtab.levers.conversions.conversion import Conversion, Setting
from trimtab.levers.conversions.low_rank_to_vector import low_rank_to_vector
from trimtab.levers.conversions.prompt_to_vector import prompt_to_vector
from trimtab.levers.conversions.rank_one import vector_to_rank_one
from trimtab.levers.conversions.vector_to_prompt import vector_to_prompt
from trimtab.levers.conversions.vector_to_soft import vector_to_soft
from trimtab.levers.conversions.vector_to_weights import InWeights, vector_to_weights
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Steering, VectorSteering
from trimtab.steering.weights import WeightSteering

# From a kind of lever to another; the last two need no behavior, so they take the model alone.
FROM: dict[type, tuple[str, dict[str, Callable[..., Conversion]]]] = {
    PromptSteering: ("a prompt", {"vector": prompt_to_vector}),
    WeightSteering: ("a low-rank update", {"vector": low_rank_to_vector}),
    VectorSteering: (
        "a vector",
        {
            "prompt": vector_to_prompt,
            "soft": vector_to_soft,
            "rank-1": vector_to_rank_one,
            "bias": vector_to_weights,
            "ablation": ablation_to_weights,
        },
    ),
}


def convert(
    lm: LanguageModel,
    behavior: Behavior,
    lever: Steering,
    to: str,
    *,
    direction: Side | None = None,
    train_requests: int | None = None,
    max_prompts: int | None = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    **options: Any,
) -> Conversion:
    """Turn one lever into another, and say what is lost.

    The result's `lever` is the new lever: a steering to switch on, `save` or bake. Its `residual` and
    `recovered`, the share of the old lever's effect with its interval, come first when it is printed;
    `save` writes its figures as JSON.

    A prompt, hard or soft, becomes a `vector`: the mean change that it makes to the stream. So does a
    low-rank update: its mean output. A vector becomes a `prompt` of tokens, a `soft` prompt, a
    `rank-1` update of the matrix that writes there, a `bias` (or a null block) of a baked checkpoint,
    or an `ablation`: its direction taken out of every writer.

    Args:
        lm: the unsteered model.
        behavior: split here: fitted on train prompts, reported on test prompts.
        lever: at the strength to convert.
        to: see above.
        direction: `toward` or `away`, the side that the lever steers to; by the sign of its strength
            when absent.
        train_requests: most train prompts of each side; each conversion has its own default.
        max_prompts: most prompts of each side of the other splits; None for all.
        max_new_tokens: length of answers.
        seed: of everything random.
        options: of the conversion: `scope`, `layers` (prompt to vector), `k`, `slot`, `steps` (to
            prompt and soft), `ridge` (rank-1), `verify` (bias, ablation) and others.

    Raises:
        TrimtabError: no such conversion, with what is possible; what the conversion itself refuses.
    """
    nothing: tuple[str, dict[str, Callable[..., Conversion]]] = (f"a {type(lever).__name__}", {})
    known, ways = next((found for kind, found in FROM.items() if isinstance(lever, kind)), nothing)
    if to not in ways:
        possible = [f"{name} to {', '.join(found)}" for name, found in FROM.values()]
        raise TrimtabError(
            asked=f"{known} as {to!r}",
            found=f"no such conversion from {known}",
            advice=f"possible: {'; '.join(possible)}",
        )
    way = ways[to]
    unknown = sorted(options.keys() - set(list(signature(way).parameters)[2:]))
    if unknown:
        raise TrimtabError(
            asked=f"{known} as {to!r} with {', '.join(unknown)}",
            found="no such option",
            advice=f"its options: {', '.join(list(signature(way).parameters)[2:]) or 'none'}",
        )
    sign = sign_of(direction or ("away" if lever.strength < 0 else "toward"))
    if to in ("bias", "ablation"):
        found = way(lm, lever, **options)
    else:
        if not lever.strength:
            raise TrimtabError(f"{lever.label} as {to!r}", "strength 0", "give one that steers")
        setting = Setting(
            lm, behavior, sign=sign, train_requests=train_requests, max_prompts=max_prompts,
            max_new_tokens=max_new_tokens, seed=seed,
        )  # fmt: skip
        found = way(setting, lever, **options)
    if isinstance(found, InWeights) and not found.exact:
        first = found.routes[0]
        raise TrimtabError(f"{lever.label} as a bias", first.refused, first.advice)
    return found
