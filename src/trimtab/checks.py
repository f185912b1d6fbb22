"""Checks that steering values make when they are built: names, numbers, layers, directions."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, nearest

UNIT_TOLERANCE = 1e-4  # how far |c| may be from 1, e.g. after a trip through half precision


def layer_within(layer: object, n_layers: int) -> int:
    """Return `layer` as an int, or refuse what is no 0-based layer of a model `n_layers` deep."""
    try:
        index = -1 if isinstance(layer, bool) else operator.index(cast(SupportsIndex, layer))
    except TypeError:
        index = -1
    if not 0 <= index < n_layers:
        raise TrimtabError(
            asked=f"a steering of layer {layer!r}",
            found=f"a model with the layers 0 to {n_layers - 1}",
            advice="layers are whole numbers counted from 0; name only what the model has",
        )
    return index


def choice(what: str, given: object, choices: Sequence[str]) -> None:
    """Refuse a name that is not among `choices`."""
    if given not in choices:
        raise TrimtabError(
            asked=f"the {what} {given!r}",
            found=f"no such {what}",
            advice=nearest(str(given), choices),
        )


def finite(what: str, value: float) -> float:
    """Return `value` as a float, or refuse NaN, infinities and what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TrimtabError(
            asked=f"a steering with {what} = {value!r}",
            found="something that is not a finite number",
            advice="give a finite number",
        )
    return number


def as_vector(layer: int, given: Tensor | Sequence[float], d_model: int) -> Tensor:
    """Return a direction as a finite CPU tensor `[d_model]` of the dtype given."""
    try:
        vector = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrimtabError(
            asked=f"a direction for layer {layer}",
            found=f"a {type(given).__name__} that is no vector of numbers ({error})",
            advice="give a list, numpy array or tensor of shape [d_model]",
        ) from error
    if tuple(vector.shape) != (d_model,):
        raise TrimtabError(
            asked=f"a direction for layer {layer}, {d_model} wide",
            found=f"shape {list(vector.shape)}",
            advice="give one vector of the model's width per layer",
        )
    if not bool(torch.isfinite(vector).all()):
        raise TrimtabError(
            asked=f"a direction for layer {layer}",
            found="values that are not finite",
            advice="look where the NaN or infinity came from, often half precision",
        )
    return vector


def unit_direction(layer: int, given: Tensor, d_model: int) -> Tensor:
    """Return a float32 contiguous CPU copy of a unit vector `[d_model]`; refuse another length."""
    vector = as_vector(layer, given, d_model).to(torch.float32).contiguous()
    length = float(vector.double().norm())
    if abs(length - 1.0) > UNIT_TOLERANCE:
        raise TrimtabError(
            asked=f"a unit direction for layer {layer}",
            found=f"a vector of length {length:.6g}",
            advice="divide it by its length, or use VectorSteering.from_directions",
        )
    return vector


def jsonable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as JSON would give it back: plain, detached, finite."""
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TrimtabError(
            asked="a steering with this provenance",
            found=f"something JSON cannot hold ({error})",
            advice="keep text, finite numbers, lists and dicts with text keys in it",
        ) from error
