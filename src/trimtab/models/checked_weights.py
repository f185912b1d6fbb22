"""The weights of a checkpoint, refused where the model would not be the one that was saved.

transformers fills what a checkpoint lacks at random and drops what its config.json has no place
for, and says so in its log alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.errors import TrimtabError
from trimtab.models.baked import lost_steering
from trimtab.models.generation import quiet

logger = logging.getLogger(__name__)

_SHOWN = 3
_FAULTS = {
    "missing_keys": "that it lacks, which would be random",
    "mismatched_keys": "of another shape than config.json says",
}


def load_weights(
    source: str, name: str, *, revision: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal language model of which every weight is its checkpoint's.

    Tensors for which the model has no place, such as the vision tower of a multimodal checkpoint,
    are told in the log; what transformers itself ignores is not.

    Args:
        source: A folder or a hub id.
        name: What the user calls it.
        revision: Of a hub repository.
        options: Of transformers' `from_pretrained`.

    Raises:
        TrimtabError: Tensors are missing or of another shape, or a baked steering would be lost.
            What transformers raises is left to the caller.
    """
    model, faults = read_weights(source, revision=revision, **options)
    dropped = faults.pop("unexpected_keys", [])
    homeless = _said(dropped, f"that {type(model).__name__} has no place for")
    lost = lost_steering(source, revision, dropped)
    found = [_said(names, _FAULTS.get(kind, kind)) for kind, names in faults.items()]
    if lost is not None:
        why, names = lost
        said = _said(names, f"of a baked steering {why}")
        found.insert(0, f"{said}: the checkpoint would load unsteered")
    elif dropped and found:
        found.append(homeless)
    if found:
        raise TrimtabError(
            f"the model {name!r}",
            "; ".join(found),
            "restore config.json and the weights as they were saved"
            + (", or bake again" if lost else "; `trimtab inspect` compares them"),
        )
    if dropped:
        logger.warning("the model %r: left out %s", name, homeless)
    return model


def read_weights(
    source: str | os.PathLike[str], **options: Any
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Load a causal language model from safetensors, whatever is wrong with them.

    Returns:
        The model, and the names of transformers' report by kind: `missing_keys`, `mismatched_keys`
        with both shapes, `unexpected_keys`; a kind without names is left out.
    """
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or it raises, and the names are in its log alone
            **options,
        )
    model, report = loaded
    return model, {kind: sorted(map(_named, keys)) for kind, keys in report.items() if keys}


def _named(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    if isinstance(key, str):
        return key
    name, found, wanted = key
    return f"{name} {list(found)} instead of {list(wanted)}"


def _said(names: list[str], what: str) -> str:
    """How many tensors of a kind there are, and the first of them."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    count = f"{len(names)} tensor{'s' if len(names) != 1 else ''}"
    return f"{count} {what} ({', '.join(names[:_SHOWN])}{more})"
