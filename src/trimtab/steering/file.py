"""The steering file: one safetensors file, strict to read, deterministic to write."""

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
from trimtab.models.chat import SEPARATORS
from trimtab.results.files import written
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.scope import Scope
from trimtab.steering.vector import Steering, VectorSteering

FORMAT = "trimtab.steering.vector"
VERSION = 1
METADATA_KEY = "trimtab"  # exactly one: safetensors writes several in no fixed order

PerLayer = dict[str, float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Model(_Strict):
    name: str
    fingerprint: str
    n_layers: Annotated[int, Field(ge=1)]
    d_model: Annotated[int, Field(ge=1)]


class _VectorHeader(_Strict):
    kind: Literal["vector"]
    model: _Model
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


class _PromptHeader(_Strict):
    """A text; what is absent has its default, so that a plain system prompt stays three fields."""

    kind: Literal["prompt"]
    text: str
    strength: float
    slot: str = "system"
    separator: str | None = None
    provenance: dict[str, Any] = {}


class _SoftPromptHeader(_Strict):
    kind: Literal["soft_prompt"]
    strength: float
    slot: str
    separator: str
    fingerprint: str
    model_name: str
    provenance: dict[str, Any]


_Header = _VectorHeader | _PromptHeader | _SoftPromptHeader
_HEADER: TypeAdapter[_Header] = TypeAdapter(Annotated[_Header, Field(discriminator="kind")])


def save_steering(steering: Steering, path: str | os.PathLike[str]) -> Path:
    """Write one steering file beside `path` and rename it there; equal content gives equal bytes.

    Raises:
        TrimtabError: a steering this format has no form for, or a folder that cannot be written.
    """
    content = _to_bytes(steering)
    with written(path) as file:
        file.write_bytes(content)
    return Path(path)


def load_steering(path: str | os.PathLike[str]) -> VectorSteering | PromptSteering:
    """Read one steering file; anything missing, surplus, damaged or not finite is refused.

    Raises:
        TrimtabError: no such file, not a steering file, another version, or damaged.
    """
    metadata, tensors = _read(path)
    if set(metadata) != {METADATA_KEY}:
        raise _defect(
            path, "a safetensors file that is not a steering file", "give a steering file"
        )
    try:
        header = json.loads(metadata[METADATA_KEY])
        canonical = _canonical(header)  # refuses NaN and infinities, however they were written
    except (ValueError, RecursionError) as error:
        raise _defect(path, f"a header that is not plain JSON ({error})") from error
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise _defect(path, f"another format than {FORMAT}", "give a steering file")
    version = header.pop("version", None)
    if version != VERSION:
        raise _defect(
            path, f"format version {version!r}", f"this Trimtab reads version {VERSION} only"
        )
    if canonical != metadata[METADATA_KEY]:
        raise _defect(path, "a header that is not in canonical form")
    for name, tensor in tensors.items():
        if tensor.dtype != float32:
            raise _defect(path, f"the tensor {name} as {tensor.dtype} instead of float32")
    recorded = header.pop("sha256", None)
    if recorded != _digest(header, tensors):
        raise _defect(path, "a checksum that does not match: the file was changed or damaged")
    try:
        parsed = _HEADER.validate_python(header)
        if parsed.model_dump(exclude_defaults=True) != header:
            raise _defect(path, "a field that repeats a default")
        return _from_parts(parsed, tensors)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _defect(path, f"a header with a fault at {where}: {first['msg']}") from error
    except TrimtabError as error:
        raise _defect(path, f"{error.found} where {error.asked} was expected") from error


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a steering file holds as plain JSON-able values, without its tensors.

    Per-layer values have the layer number as a key; `alphas` are raw, at the strength stored.
    """
    steering = load_steering(path)
    if isinstance(steering, PromptSteering):
        soft = steering.vectors is not None
        return {
            "name": steering.label,
            "kind": "soft_prompt" if soft else "prompt",
            "text": steering.text,
            "slot": steering.slot,
            "separator": steering.separator,
            "tokens": len(steering.vectors) if steering.vectors is not None else None,
            "strength": steering.strength,
            "provenance": steering.provenance,
        }
    return {
        "name": steering.label,
        "kind": "vector",
        "behavior": steering.provenance.get("behavior"),
        "method": steering.provenance.get("method"),
        "operation": steering.operation,
        "site": steering.site,
        "scope": str(steering.scope),
        "layers": list(steering.layers),
        "found_layers": list(steering.directions),
        "strength": steering.strength,
        "alphas": steering.alphas,
        "norms": steering.norms,
        "class_gaps": steering.class_gaps,
        "spreads": steering.spreads,
        "model": steering.model_name,
        "fingerprint": steering.fingerprint,
        "n_layers": steering.n_layers,
        "d_model": steering.d_model,
        "provenance": steering.provenance,
    }


def _to_bytes(steering: Steering) -> bytes:
    header, tensors = _to_parts(steering)
    body = header.model_dump(exclude_defaults=True)
    body |= {"sha256": _digest(body, tensors), "format": FORMAT, "version": VERSION}
    return to_safetensors(tensors, metadata={METADATA_KEY: _canonical(body)})


def _to_parts(steering: Steering) -> tuple[_Header, dict[str, Tensor]]:
    if isinstance(steering, PromptSteering):
        return _prompt_parts(steering)
    if not isinstance(steering, VectorSteering):
        raise TrimtabError(
            asked=f"to save a {type(steering).__name__}",
            found="a steering the file format has no form for",
            advice="save a VectorSteering or a PromptSteering",
        )
    header = _VectorHeader(
        kind="vector",
        model=_Model(
            name=steering.model_name,
            fingerprint=steering.fingerprint,
            n_layers=steering.n_layers,
            d_model=steering.d_model,
        ),
        site=steering.site,
        operation=steering.operation,
        scope=str(steering.scope),
        strength=steering.strength,
        layers=list(steering.layers),
        scales=_text_keys(steering.scales),
        targets=_text_keys(steering.targets),
        norms=_text_keys(steering.norms),
        class_gaps=_text_keys(steering.class_gaps),
        spreads=_text_keys(steering.spreads),
        provenance=steering.provenance,
    )
    return header, {f"direction.{layer}": c for layer, c in steering.directions.items()}


def _prompt_parts(prompt: PromptSteering) -> tuple[_Header, dict[str, Tensor]]:
    assert prompt.separator is not None  # it is set when the value is made
    if prompt.vectors is None:
        separator = None if prompt.separator == SEPARATORS[prompt.slot] else prompt.separator
        header = _PromptHeader(
            kind="prompt",
            text=prompt.text,
            strength=prompt.strength,
            slot=prompt.slot,
            separator=separator,
            provenance=prompt.provenance,
        )
        return header, {}
    soft = _SoftPromptHeader(
        kind="soft_prompt",
        strength=prompt.strength,
        slot=prompt.slot,
        separator=prompt.separator,
        fingerprint=prompt.fingerprint,
        model_name=prompt.model_name,
        provenance=prompt.provenance,
    )
    return soft, {"vectors": prompt.vectors}


def _from_parts(header: _Header, tensors: dict[str, Tensor]) -> VectorSteering | PromptSteering:
    if isinstance(header, _PromptHeader):
        _expect(not tensors, "a prompt without tensors", f"the tensors {sorted(tensors)}")
        return PromptSteering(
            header.text,
            header.strength,
            slot=header.slot,
            separator=header.separator,
            provenance=header.provenance,
        )
    if isinstance(header, _SoftPromptHeader):
        _expect(
            list(tensors) == ["vectors"], "one tensor, vectors", f"the tensors {sorted(tensors)}"
        )
        return PromptSteering(
            "",
            header.strength,
            slot=header.slot,
            separator=header.separator,
            vectors=tensors["vectors"],
            provenance=header.provenance,
            fingerprint=header.fingerprint,
            model_name=header.model_name,
        )
    return VectorSteering(
        directions={_layer(name.removeprefix("direction.")): c for name, c in tensors.items()},
        layers=tuple(header.layers),
        scales=_int_keys(header.scales),
        strength=header.strength,
        site=header.site,
        operation=header.operation,
        scope=Scope.parse(header.scope),
        targets=_int_keys(header.targets),
        norms=_int_keys(header.norms),
        class_gaps=_int_keys(header.class_gaps),
        spreads=_int_keys(header.spreads),
        provenance=header.provenance,
        fingerprint=header.model.fingerprint,
        model_name=header.model.name,
        n_layers=header.model.n_layers,
        d_model=header.model.d_model,
    )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise _defect(path, "no such file", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _defect(path, f"no readable safetensors file ({error})") from error


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


def _text_keys(values: dict[int, float]) -> PerLayer:
    return {str(layer): value for layer, value in values.items()}


def _int_keys(values: PerLayer) -> dict[int, float]:
    return {_layer(layer): value for layer, value in values.items()}


def _layer(text: str) -> int:
    plain = len(text) < 7 and text.isascii() and text.isdigit() and str(int(text)) == text
    _expect(plain, "a layer number", repr(text))
    return int(text)


def _expect(fine: bool, asked: str, found: str) -> None:
    if not fine:
        raise TrimtabError(asked=asked, found=found, advice="write the file again")


def _defect(
    path: str | os.PathLike[str],
    found: str,
    advice: str = "fetch or make the file again",
) -> TrimtabError:
    return TrimtabError(asked=f"the steering file {os.fspath(path)}", found=found, advice=advice)
