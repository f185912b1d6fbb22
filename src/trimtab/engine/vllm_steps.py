"""Expected vectors taken apart into layers, so that a server can put any of their layers together."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from trimtab.models.model import LanguageModel
from trimtab.serve.registry import unserved
from trimtab.steering.vector import VectorSteering


class Steps:
    """Vectors of a single layer each, which expected vectors are sums of; equal ones are one.

    Attributes:
        single: name -> the vector.
    """

    def __init__(self) -> None:
        self.single: dict[str, VectorSteering] = {}

    def add(self, vector: VectorSteering) -> None:
        """Take every layer that a vector has a direction and a scale for, if it can be served."""
        if unserved(vector, scope=False):
            return
        for layer in vector.directions:
            if layer in vector.scales:
                self.single.setdefault(_name(vector, layer), _only(vector, layer))

    def __contains__(self, vector: VectorSteering) -> bool:
        return self.names(vector) <= self.single.keys()

    def names(self, vector: VectorSteering) -> set[str]:
        return {_name(vector, layer) for layer in vector.layers}

    def asked(self, vector: VectorSteering | None, strength: float) -> dict[str, float]:
        """Return what a request asks for to get a vector in its layers and scope at a strength."""
        if vector is None or strength == 0:
            return {}
        return {f"{name}@{vector.scope}": strength for name in sorted(self.names(vector))}

    def write(self, folder: Path, lm: LanguageModel) -> None:
        """Write one steering file for each."""
        for name, vector in self.single.items():
            # A file without a fingerprint would do, but not for the model that is checked here.
            replace(vector, fingerprint=lm.fingerprint).save(folder / f"{name}.safetensors")


def _name(vector: VectorSteering, layer: int) -> str:
    sha = hashlib.sha256(f"{vector.site}:{vector.scales[layer]!r}:".encode())
    sha.update(vector.directions[layer].numpy().astype("<f4").tobytes())
    return f"layer{layer}-{sha.hexdigest()[:24]}"


def _only(vector: VectorSteering, layer: int) -> VectorSteering:
    return VectorSteering(
        directions={layer: vector.directions[layer]},
        layers=(layer,),
        scales={layer: vector.scales[layer]},
        site=vector.site,
        fingerprint=vector.fingerprint,
        model_name=vector.model_name,
        n_layers=vector.n_layers,
        d_model=vector.d_model,
    )
