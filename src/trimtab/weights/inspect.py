"""What a checkpoint folder holds: its architecture, tensors that do not belong, what was baked in."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.models.baked import read_record
from trimtab.results.tables import Printable, Table
from trimtab.weights.disk.checkpoint import open_checkpoint
from trimtab.weights.disk.draft import stray_tensors
from trimtab.weights.disk.layout import layout_of

_SHOWN = 8


@dataclass(frozen=True)
class CheckpointFacts(Printable):
    """What a checkpoint folder holds, read from its headers.

    Attributes:
        folder: its name.
        architecture: from config.json.
        layers: number of decoder blocks.
        d_model: width.
        dtype: of most of its bytes.
        files: safetensors files.
        tensors: their tensors.
        nbytes: their bytes.
        known: whether the architecture's tensors are known, so that the next three say something.
        stray: tensors that the architecture does not know: loading drops them with a line in the
            log, and what they were meant to do is not done.
        missing: tensors that it lacks: loading fills them at random.
        wrong_shape: tensors of another shape than the configuration says.
        baked: the record that Trimtab left when it baked a steering in, or None.
    """

    folder: str
    architecture: str
    layers: int
    d_model: int
    dtype: str
    files: int
    tensors: int
    nbytes: int
    known: bool
    stray: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    baked: dict[str, Any] | None

    @property
    def sound(self) -> bool:
        """Whether every tensor is one that the architecture has, and none is lacking."""
        return not (self.stray or self.missing or self.wrong_shape)

    def table(self) -> Table:
        """Return one line per fact, and a warning where something is wrong."""
        rows = [
            ("architecture", self.architecture),
            ("layers, width", f"{self.layers}, {self.d_model}"),
            ("dtype", self.dtype),
            ("tensors", f"{self.tensors} in {self.files} files, {self.nbytes:,} bytes"),
            ("stray tensors", self._names(self.stray)),
            ("missing tensors", self._names(self.missing)),
            ("tensors of a wrong shape", self._names(self.wrong_shape)),
        ]
        notes = []
        if self.stray:
            notes.append(
                f"loading drops {len(self.stray)} tensors: {self.architecture} has no such weights,"
                " and what they were meant to do is not done"
            )
        if self.missing:
            notes.append(f"loading fills {len(self.missing)} missing tensors at random")
        record, depth = self.baked, 0
        while isinstance(record, dict) and depth < _SHOWN:
            rows += _baked_rows(record)
            record, depth = record.get("earlier"), depth + 1
        if self.baked is None:
            rows.append(("baked by Trimtab", "no record of it"))
        return Table(f"checkpoint {self.folder}", ("what", "value"), tuple(rows), tuple(notes))

    def _names(self, names: tuple[str, ...]) -> str:
        if not self.known:
            return "not checked: an architecture without routes"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return ", ".join(names[:_SHOWN]) + more if names else "none"


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointFacts:
    """Read what a checkpoint folder holds, without loading it.

    Raises:
        TrimtabError: no checkpoint in safetensors is there.
    """
    found = open_checkpoint(folder)
    names = getattr(found.config, "architectures", None) or [found.config.model_type]
    lists: tuple[list[str], list[str], list[str]] | None = None
    with suppress(TrimtabError):  # an architecture without routes
        lists = stray_tensors(found, layout_of(found.config, found.dtype))
    stray, missing, wrong = lists or ([], [], [])
    return CheckpointFacts(
        folder=found.folder.resolve().name,
        architecture=str(names[0]),
        layers=int(found.config.num_hidden_layers),
        d_model=int(found.config.hidden_size),
        dtype=str(found.dtype).removeprefix("torch."),
        files=len(found.files),
        tensors=len(found.tensors),
        nbytes=found.nbytes,
        known=lists is not None,
        stray=tuple(stray),
        missing=tuple(missing),
        wrong_shape=tuple(wrong),
        baked=read_record(found.folder),
    )


def _baked_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    steps = record.get("steps") or []
    rows = [
        ("baked by Trimtab", f"from {record.get('base_model', 'an unnamed model')}"),
        ("route", str((record.get("checked") or {}).get("route", "not recorded"))),
        ("layers added", str(record.get("extra_layers", 0))),
    ]
    for steering in record.get("steerings") or []:
        alphas = steering.get("alphas") or {}
        said = ", ".join(f"layer {k}: alpha {v:.4g}" for k, v in list(alphas.items())[:_SHOWN])
        what = f"{steering.get('operation')} at {steering.get('site')}"
        rows.append((f"steering {steering.get('label')}", f"{what}, {said}"))
    if not record.get("steerings") and steps:
        rows.append(("what was done", str(steps[0])))
    return rows
