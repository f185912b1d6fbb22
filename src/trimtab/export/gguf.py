"""Control vectors of llama.cpp: one GGUF file, a float32 tensor `direction.N` per layer.

llama.cpp adds `direction.N` to the output of 0-based block N, N >= 1, at every token; it never
steers block 0. The file has no strength of its own, so alpha_l c_l is stored;
`--control-vector FILE` applies it as it is and `--control-vector-scaled FILE S` S times.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.checks import layer_within
from trimtab.errors import TrimtabError
from trimtab.export.files import not_zero, refusal
from trimtab.models.model import LanguageModel
from trimtab.results.files import written
from trimtab.steering.vector import VectorSteering
from trimtab.weights.disk.base import public_name

ARCHITECTURE = "controlvector"
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_FORM = "a GGUF control vector"


def write_gguf(
    vector: VectorSteering, path: str | os.PathLike[str], model_hint: str | None = None
) -> Path:
    """Write a control vector that llama.cpp reads, at the vector's strength.

    Beside llama.cpp's own keys the file says which model it was made for, so that `read_gguf`
    needs no model.

    Args:
        vector: adds at `resid_post` of blocks from 1 on, scope `all`.
        path: file to write, by convention `*.gguf`.
        model_hint: llama.cpp's name of the model's architecture (`llama`, `qwen2`...), for readers.

    Raises:
        TrimtabError: block 0, another operation, site or scope, strength 0; the package gguf is
            missing; the file cannot be written.
    """
    tensors = _constants(vector)
    import gguf

    with written(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        if model_hint:
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(tensors))
        writer.add_uint32("trimtab.n_layers", vector.n_layers)
        writer.add_string("trimtab.model", public_name(vector.model_name))
        writer.add_string("trimtab.fingerprint", vector.fingerprint)
        writer.add_string("trimtab.label", vector.label)
        for layer, value in tensors.items():
            writer.add_tensor(f"direction.{layer}", value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def _constants(vector: VectorSteering) -> dict[int, Tensor]:
    """0-based block -> what is added to its output, alpha_l c_l, float32 `[d_model]`."""
    facts = (
        ("operation", vector.operation, "add"),
        ("site", vector.site, "resid_post"),
        ("scope", str(vector.scope), "all"),
    )
    for what, has, holds in facts:
        if has != holds:
            raise refusal(
                vector,
                _FORM,
                f"{what} {has}; {_FORM} holds only {what} {holds}",
                "steer with the hook, or measure the vector again with "
                f"vector.select({what}={holds!r})",
            )
    not_zero(vector, _FORM)
    if 0 in vector.layers:
        raise refusal(
            vector,
            _FORM,
            "layer 0, whose output llama.cpp cannot steer (direction.N is for N >= 1)",
            "leave layer 0 out with vector.select(layers=...), or bake a checkpoint",
        )
    return {
        layer: (vector.directions[layer].double() * alpha).float()
        for layer, alpha in vector.alphas.items()
    }


def read_gguf(path: str | os.PathLike[str], lm: LanguageModel | None = None) -> VectorSteering:
    """Read a control vector, whoever wrote it, as a steering that adds at `resid_post`.

    Args:
        path: the file.
        lm: the model it is for; needed where the file does not say how deep that is. Its width,
            depth and fingerprint are recorded in place of the file's.

    Returns:
        A steering at strength 1; the scales are the lengths of the vectors stored. Layers that
        hold zeros, which some writers fill gaps with, are left out.

    Raises:
        TrimtabError: no such file, another kind of GGUF file, other tensors than `direction.N`
            with N >= 1 in float32, values that are not finite, another model's width or depth.
    """
    fields, tensors = _read(path)
    depth = fields.get("trimtab.n_layers") if lm is None else lm.n_layers
    if depth is None:
        raise _defect(path, "a file that does not say how deep its model is", "give the model")
    for layer in tensors:
        layer_within(layer, int(depth))
    widths = sorted({len(value) for value in tensors.values()})
    if len(widths) != 1 or (lm is not None and widths != [lm.d_model]):
        expected = "one width" if lm is None else f"the model's {lm.d_model}"
        raise _defect(path, f"vectors {widths} wide instead of {expected}", "use its own model")
    lengths = {layer: float(value.double().norm()) for layer, value in tensors.items()}
    kept = tuple(sorted(layer for layer, length in lengths.items() if length > 0))
    if not kept:
        raise _defect(path, "nothing but zeros", "fetch or make the file again")
    made_for = fields.get("trimtab.fingerprint", ""), fields.get("trimtab.model", "")
    vector = VectorSteering(
        directions={k: (tensors[k].double() / lengths[k]).float() for k in kept},
        layers=kept,
        scales={k: lengths[k] for k in kept},
        provenance={"method": "control vector", "file": Path(path).name},
        fingerprint=str(made_for[0]),
        model_name=str(made_for[1]),
        n_layers=int(depth),
        d_model=widths[0],
    )
    if lm is not None:
        vector.check(lm)
    return vector


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Metadata, and 0-based block -> what is added to its output."""
    import gguf

    if not Path(path).is_file():
        raise _defect(path, "no such file", "check the path")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = [(t.name, t.tensor_type.name, np.array(t.data)) for t in reader.tensors]
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise _defect(path, f"no readable GGUF file ({error})") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise _defect(path, f"architecture {architecture!r} instead of {ARCHITECTURE}")
    tensors: dict[int, Tensor] = {}
    for name, dtype, data in stored:
        match = _TENSOR.fullmatch(name)
        if match is None or int(match[1]) < 1:
            raise _defect(path, f"the tensor {name!r} instead of direction.N with N >= 1")
        if dtype != "F32" or data.ndim != 1:
            raise _defect(path, f"{name} as {dtype} {list(data.shape)} instead of one F32 vector")
        if not np.isfinite(data).all():
            raise _defect(path, f"values in {name} that are not finite")
        tensors[int(match[1])] = torch.from_numpy(data.astype(np.float32))
    if not tensors:
        raise _defect(path, "no direction.N in it")
    return fields, tensors


def _defect(
    path: str | os.PathLike[str], found: str, advice: str = "give a control vector for llama.cpp"
) -> TrimtabError:
    return TrimtabError(asked=f"the control vector {os.fspath(path)}", found=found, advice=advice)
