"""A checkpoint folder as it lies on disk: its configuration and where each tensor's bytes are.

Nothing is loaded: the headers of the safetensors files say everything that planning needs.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from trimtab.errors import TrimtabError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The longest header that the format allows.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorFact:
    """Where a tensor's bytes are in a file; `dtype` is as the format writes it: F32, BF16..."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder with config.json and safetensors files, read without loading a tensor.

    `raw` is config.json as it was written, `config` the same as transformers understands it, defaults
    filled in; `metadata` is the index's.
    """

    folder: Path
    raw: dict[str, Any]
    config: PretrainedConfig
    tensors: dict[str, TensorFact]
    files: tuple[Path, ...]
    metadata: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(fact.nbytes for fact in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes have."""
        sizes: Counter[str] = Counter()
        for fact in self.tensors.values():
            sizes[fact.dtype] += fact.nbytes
        return DTYPES.get(sizes.most_common(1)[0][0], torch.float32)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration, the index and the headers of a checkpoint folder.

    Raises:
        TrimtabError: no config.json, no safetensors, a broken file, or an index that names tensors
            that are not there.
    """
    path = Path(os.path.expanduser(os.fspath(folder)))
    raw = _read_json(path, "config.json")
    metadata: dict[str, Any] = {}
    listed: dict[str, str] | None = None
    if (path / SINGLE).is_file():
        files = (path / SINGLE,)
    else:
        index = _read_json(path, INDEX)
        names: dict[str, str] = index.get("weight_map", {})
        listed, metadata = names, index.get("metadata") or {}
        files = tuple(path / name for name in dict.fromkeys(_safe(path, names)))
    tensors: dict[str, TensorFact] = {}
    for file in files:
        for name, fact in read_header(file).items():
            if listed is None or listed.get(name) == file.name:
                tensors[name] = fact
    lost = sorted(set(listed or ()) - set(tensors))
    if lost or not tensors:
        raise _broken(path, f"{len(lost)} tensors of the index are in no file: {lost[:3]}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"config.json: {error}") from error
    return Checkpoint(path, raw, config, tensors, files, metadata)


def read_header(file: Path) -> dict[str, TensorFact]:
    """Return the tensors of one safetensors file (the format: huggingface.co/docs/safetensors).

    Raises:
        TrimtabError: the file is missing, cut short, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise _broken(file, "no safetensors header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            fact = TensorFact(file, str(entry["dtype"]), shape, 8 + length + first, last - first)
            width = DTYPES[fact.dtype].itemsize if fact.dtype in DTYPES else None
            wrong = width is not None and fact.nbytes != math.prod(shape) * width
            if wrong or first < 0 or fact.start + fact.nbytes > size:
                raise _broken(file, f"the bytes of {name} do not fit its shape or the file")
            found[name] = fact
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, str(error) or type(error).__name__) from error
    return found


def _safe(folder: Path, listed: dict[str, str]) -> list[str]:
    """The index's file names; none may lead out of the folder."""
    names = sorted(listed.values())
    strange = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if strange or not names:
        raise _broken(folder, f"an index with the files {strange[:3]}")
    return names


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        said = f"neither {INDEX} nor {SINGLE}" if name == INDEX else f"no {name}"
        raise _broken(folder, said) from error
    except (OSError, ValueError) as error:
        raise _broken(folder / name, str(error)) from error
    if not isinstance(found, dict):
        raise _broken(folder / name, "no JSON object")
    return found


def _broken(path: Path, found: str) -> TrimtabError:
    return TrimtabError(
        asked=f"the checkpoint {path}",
        found=found,
        advice="give a folder with config.json and safetensors, as save_pretrained writes it",
    )
