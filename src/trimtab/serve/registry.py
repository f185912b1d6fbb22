"""The steering files of a folder: which fit the served model, and why the others are refused."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.serve.tokens import SCOPES
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering

SITES = ("resid_post", "resid_pre")
UNCHECKED = "unchecked"
# Adding to what enters a block is adding to what left the one before; nothing is before block 0.
EMBEDDED = -1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Served:
    """The served model, as far as a vector has to fit it.

    `fingerprint` may be `UNCHECKED`; `largest` is the largest number that its stream's dtype holds.
    """

    name: str
    n_layers: int
    d_model: int
    fingerprint: str = UNCHECKED
    largest: float = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, eq=False)
class ServedEntry:
    """One registered vector.

    Attributes:
        name: What requests call it: the file's name without its ending.
        column: Its column in the weights of tokens, its row in the vectors of layers.
        steps: layer -> what m = 1 adds to the stream after that block, float32 `[d_model]`.
        strength: The strength m stored in the file, for requests that give none.
        scope: The scope stored in the file.
        digest: Of the steps: what two servers must agree on, and what caches tell apart.
        largest: The largest |m| at which every step stays inside the stream's dtype.
    """

    name: str
    column: int
    steps: dict[int, Tensor]
    strength: float
    scope: str
    digest: str
    largest: float


@dataclass(frozen=True, eq=False)
class VectorRegistry:
    """What a server can steer by.

    Attributes:
        folder: Where the files are.
        served: The model they were checked against.
        entries: name -> vector, in the order of their columns.
        refused: name -> why that file is not registered.
    """

    folder: Path
    served: Served
    entries: dict[str, ServedEntry]
    refused: dict[str, TrimtabError]

    @classmethod
    def read(cls, folder: str | os.PathLike[str], served: Served) -> VectorRegistry:
        """Register every `*.safetensors` of a folder; a file that does not fit is kept out by name.

        Raises:
            TrimtabError: There is no such folder, or no file in it can be registered.
        """
        where = Path(folder).expanduser().absolute()
        files = sorted(where.glob("*.safetensors")) if where.is_dir() else []
        entries: dict[str, ServedEntry] = {}
        refused: dict[str, TrimtabError] = {}
        for file in files:
            try:
                entries[file.stem] = _entry(file, len(entries), served)
            except TrimtabError as error:
                refused[file.stem] = error
        if not entries:
            first = next(iter(refused.values()), None)
            raise TrimtabError(
                asked=f"to serve {served.name} with the vectors in {where}",
                found="no steering file there"
                if first is None
                else f"none that fits: {said(first)}",
                advice="give a folder with files that `trimtab find` or `trimtab tune` wrote",
            )
        return cls(where, served, entries, refused)

    @cached_property
    def digest(self) -> str:
        """Of names, order and steps: equal for two processes that steer alike."""
        parts = [f"{entry.name}={entry.digest}" for entry in self.entries.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def layers(self) -> list[int]:
        """The layers after which something may be added; `EMBEDDED` is what enters block 0."""
        return sorted({layer for entry in self.entries.values() for layer in entry.steps})

    def entry(self, name: str) -> ServedEntry:
        """Return a registered vector.

        Raises:
            TrimtabError: No such name, or a file that was refused at the start, with the reason.
        """
        if name not in self.entries:
            refused = self.refused.get(name)
            raise TrimtabError(
                asked=f"to steer with {name!r}",
                found="no vector of that name"
                if refused is None
                else f"a file that was refused at the start: {said(refused)}",
                advice=f"registered are: {', '.join(self.entries)}",
            )
        return self.entries[name]

    def vectors(self, layer: int) -> Tensor:
        """What m = 1 of each vector adds after a block, float32 `[vectors, d_model]`."""
        none = torch.zeros(self.served.d_model)
        return torch.stack([entry.steps.get(layer, none) for entry in self.entries.values()])

    def record(self) -> dict[str, Any]:
        """What another process needs to read the same registry, as JSON would give it back."""
        return {"folder": str(self.folder), "digest": self.digest, **vars(self.served)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> VectorRegistry:
        """Read the registry that another process has read.

        Raises:
            TrimtabError: The folder holds something else here.
        """
        served = {key: record[key] for key in Served.__dataclass_fields__}
        found = cls.read(record["folder"], Served(**served))
        if found.digest != record["digest"]:
            raise TrimtabError(
                asked=f"the vectors in {record['folder']} as the server registered them",
                found="other files in this process",
                advice="leave the folder as it is, and give every machine the same one",
            )
        return found


def said(error: TrimtabError) -> str:
    """An error on one line."""
    return f"{error.asked}: {error.found} ({error.advice})"


def _entry(file: Path, column: int, served: Served) -> ServedEntry:
    """One file as a registered vector, or the reason why it cannot be one."""
    asked = f"to register {file.name}"
    if not _NAME.fullmatch(file.stem):
        raise TrimtabError(
            asked, f"the name {file.stem!r}", "name it with letters, digits and . _ - alone"
        )
    vector = load_steering(file)
    if not isinstance(vector, VectorSteering):
        raise TrimtabError(asked, "a prompt, which is no vector", "send it as part of the request")
    reason = unserved(vector)
    if reason:
        raise TrimtabError(
            asked,
            f"{reason}, which a server does not know",
            f"use operation add at {' or '.join(SITES)} in one of the scopes {', '.join(SCOPES)}",
        )
    fingerprint = vector.fingerprint if served.fingerprint == UNCHECKED else served.fingerprint
    vector.check_facts(served.name, served.n_layers, served.d_model, fingerprint)
    steps = steps_of(vector)
    return ServedEntry(
        name=file.stem,
        column=column,
        steps=steps,
        strength=vector.strength,
        scope=vector.scope.name,
        digest=_digest(steps),
        largest=largest_strength(steps, served.largest),
    )


def unserved(vector: VectorSteering, scope: bool = True) -> str:
    """Say what of a vector (its scope only if asked) a server does not know, or "" where it does."""
    if vector.operation != "add":
        return f"the operation {vector.operation}"
    if vector.site not in SITES:
        return f"the site {vector.site}"
    if scope and vector.scope.name not in SCOPES:
        return f"the scope {vector.scope}"
    return ""


def largest_strength(steps: Mapping[int, Tensor], limit: float) -> float:
    """The largest |m| at which every step stays within a limit."""
    return limit / max(1.0, *(float(step.abs().max()) for step in steps.values()))


def steps_of(vector: VectorSteering) -> dict[int, Tensor]:
    """What m = 1 adds after each layer."""
    before = vector.site == "resid_pre"
    return {
        layer - 1 if before else layer: vector.directions[layer] * vector.scales[layer]
        for layer in vector.layers
    }


def _digest(steps: Mapping[int, Tensor]) -> str:
    sha = hashlib.sha256()
    for layer in sorted(steps):
        sha.update(f"{layer}:".encode())
        sha.update(steps[layer].numpy().astype("<f4").tobytes())
    return sha.hexdigest()[:32]
