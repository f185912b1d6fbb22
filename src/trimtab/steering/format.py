"""The format of a steering file: a header and tensors in one safetensors file, strict and deterministic.

What the tensors mean is known to the levers: each has its header here, and turns itself into one and
back (`parts`, `from_parts`).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, float32

from trimtab.errors import TrimtabError
from trimtab.results.files import written

FORMAT = "trimtab.steering"
VERSION = 1
METADATA_KEY = "trimtab"  # exactly one: safetensors writes several in no fixed order

PerLayer = dict[str, float]
PER_LAYER = ("scales", "targets", "norms", "class_gaps", "spreads")  # of a `VectorHeader`


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Model(_Strict):
    """The model that a steering was made for."""

    name: str
    fingerprint: str
    n_layers: Annotated[int, Field(ge=1)]
    d_model: Annotated[int, Field(ge=1)]


class VectorHeader(_Strict):
    """Directions; their tensors are `direction.LAYER`."""

    kind: Literal["vector"]
    model: Model
    site: str
    operation: str
    scope: Annotated[str, Field(max_length=64)]
    strength: float
    layers: list[int]
    scales: PerLayer
    targets: PerLayer
    norms: PerLayer
    class_gaps: PerLayer
    spreads: PerLayer
    provenance: dict[str, Any]


class PromptHeader(_Strict):
    """A text; what is absent has its default, so that a plain system prompt stays three fields."""

    kind: Literal["prompt"]
    text: str
    strength: float
    slot: str = "system"
    separator: str | None = None
    provenance: dict[str, Any] = {}


class SoftPromptHeader(_Strict):
    """Vectors in a slot of the prompt; their tensor is `vectors`."""

    kind: Literal["soft_prompt"]
    strength: float
    slot: str
    separator: str
    fingerprint: str
    model_name: str
    provenance: dict[str, Any]


class WeightsHeader(_Strict):
    """A low-rank update; its tensors are `left.KIND.LAYER` and `right.KIND.LAYER`."""

    kind: Literal["weights"]
    name: str
    strength: float
    fingerprint: str
    model_name: str
    provenance: dict[str, Any]


Header = VectorHeader | PromptHeader | SoftPromptHeader | WeightsHeader
_HEADER: TypeAdapter[Header] = TypeAdapter(Annotated[Header, Field(discriminator="kind")])


def write(path: str | os.PathLike[str], header: Header, tensors: dict[str, Tensor]) -> Path:
    """Write one steering file beside `path` and rename it there; equal content gives equal bytes.

    Raises:
        TrimtabError: a folder that cannot be written.
    """
    body = header.model_dump(exclude_defaults=True)
    body |= {"sha256": _digest(body, tensors), "format": FORMAT, "version": VERSION}
    content = to_safetensors(tensors, metadata={METADATA_KEY: _canonical(body)})
    with written(path) as file:
        file.write_bytes(content)
    return Path(path)


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """Read one steering file; anything missing, surplus, damaged or not finite is refused.

    Raises:
        TrimtabError: no such file, not a steering file, another version, or damaged.
    """
    metadata, tensors = _read(path)
    if set(metadata) != {METADATA_KEY}:
        raise defect(path, "a safetensors file that is not a steering file", "give a steering file")
    try:
        header = json.loads(metadata[METADATA_KEY])
        canonical = _canonical(header)  # refuses NaN and infinities, however they were written
    except (ValueError, RecursionError) as error:
        raise defect(path, f"a header that is not plain JSON ({error})") from error
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise defect(path, f"another format than {FORMAT}", "give a steering file")
    version = header.pop("version", None)
    if version != VERSION:
        raise defect(
            path, f"format version {version!r}", f"this Trimtab reads version {VERSION} only"
        )
    if canonical != metadata[METADATA_KEY]:
        raise defect(path, "a header that is not in canonical form")
    for name, tensor in tensors.items():
        if tensor.dtype != float32:
            raise defect(path, f"the tensor {name} as {tensor.dtype} instead of float32")
    recorded = header.pop("sha256", None)
    if recorded != _digest(header, tensors):
        raise defect(path, "a checksum that does not match: the file was changed or damaged")
    try:
        parsed = _HEADER.validate_python(header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise defect(path, f"a header with a fault at {where}: {first['msg']}") from error
    if parsed.model_dump(exclude_defaults=True) != header:
        raise defect(path, "a field that repeats a default")
    return parsed, tensors


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise defect(path, "no such file", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise defect(path, f"no readable safetensors file ({error})") from error


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash the header without format, version and hash, then name, shape and bytes per tensor."""
    sha = hashlib.sha256(_canonical(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(_canonical([name, list(tensor.shape)]).encode())
        sha.update(tensor.numpy().astype("<f4").tobytes())
    return sha.hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_keys(values: dict[int, float]) -> PerLayer:
    """Layers as JSON has them."""
    return {str(layer): value for layer, value in values.items()}


def int_keys(values: PerLayer) -> dict[int, float]:
    """Layers as numbers."""
    return {layer_number(layer): value for layer, value in values.items()}


def layer_number(text: str) -> int:
    """Read a layer; only its canonical form is one."""
    plain = len(text) < 7 and text.isascii() and text.isdigit() and str(int(text)) == text
    expect(plain, "a layer number", repr(text))
    return int(text)


def expect(fine: bool, asked: str, found: str) -> None:
    """Refuse what the format does not allow."""
    if not fine:
        raise TrimtabError(asked=asked, found=found, advice="write the file again")


def defect(
    path: str | os.PathLike[str],
    found: str,
    advice: str = "fetch or make the file again",
) -> TrimtabError:
    """Return the error for a file."""
    return TrimtabError(asked=f"the steering file {os.fspath(path)}", found=found, advice=advice)
