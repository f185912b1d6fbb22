"""The steering values, a vector or a prompt with a strength: `with steering.on(lm):`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimtab.checks import (
    as_vector,
    choice,
    finite,
    jsonable,
    layer_within,
    unit_direction,
)
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.models.sites import KINDS, Site
from trimtab.steering.format import (
    PER_LAYER,
    Header,
    Model,
    VectorHeader,
    int_keys,
    layer_number,
    text_keys,
    write,
)
from trimtab.steering.hooks import OPERATIONS, Edit, steered
from trimtab.steering.scope import Scope


class Switch(Protocol):
    """What a measurement needs of a lever: to be switched on."""

    def on(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Steer `lm` inside a `with` block, for the thread or task that entered it; undo it exactly."""
        ...


@runtime_checkable
class Steering(Switch, Protocol):
    """What every lever can do: be put at a strength, be switched on, be saved."""

    @property
    def strength(self) -> float:
        """The dimensionless multiplier m."""
        ...

    @property
    def label(self) -> str:
        """A short name for tables."""
        ...

    def at(self, strength: float) -> Steering:
        """Return the same steering at another strength m."""
        ...

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one steering file."""
        ...


class Bakeable(ABC):
    """A lever made for one model: a steering file holds it, and a checkpoint can."""

    model_name: str

    @abstractmethod
    def parts(self) -> tuple[Header, dict[str, Tensor]]:
        """Return what a steering file holds."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one steering file (docs/format.md), byte-identical for equal content."""
        return write(path, *self.parts())

    def bake(self, out: str | os.PathLike[str], lm: LanguageModel | None = None) -> Any:
        """Write a checkpoint that steers itself, verified after a real reload; a `BakeReport`.

        Args:
            out: folder to create.
            lm: the model to bake into; loaded from `model_name` when absent.
        """
        # The one name that is looked up above this room, for the sake of `vector.bake(folder)`.
        bake = resolve_name("trimtab.weights.bake:bake")
        return bake(load(self.model_name) if lm is None else lm, self, out)


@dataclass(frozen=True, eq=False)
class VectorSteering(Bakeable):
    """Unit directions at a site, with calibrated norms, a strength, an operation and a scope.

    `add` moves the stream by `alphas[l] * directions[l]`; `ablate` removes a share m of the
    projection on the direction; `affine` moves a share m of the way to `targets[l]` along the
    direction.

    Attributes:
        directions: layer -> unit direction, float32 `[d_model]` on the CPU, for every layer found.
        layers: the layers that are steered, a subset of `directions`.
        scales: layer -> raw alpha at m = 1, mu_l / sqrt(d_model) when calibrated
            (steering/norms.py).
        strength: the multiplier m; negative steers the other way, 0 is the identity.
        site: kind of site that is written, e.g. `resid_post`.
        operation: `add`, `ablate` or `affine`.
        scope: which tokens are steered.
        targets: layer -> projection that `affine` moves towards (absent: 0).
        norms: layer -> mean norm mu_l of the site on neutral prompts; empty when never calibrated.
        class_gaps: layer -> projection of mean(toward) - mean(away) on the direction.
        spreads: layer -> standard deviation of the projections on the direction.
        provenance: JSON-able record of where this came from: method, behavior, data hash, seed...
        fingerprint: of the model it was made for; empty when unknown, then only shapes are checked.
        model_name: that model's name or folder.
        n_layers: its depth.
        d_model: its width.

    Raises:
        TrimtabError: a direction that is not finite, not of unit norm or not `[d_model]`; a layer
            out of depth; an unknown operation or site; a number that is not finite.
    """

    directions: dict[int, Tensor]
    layers: tuple[int, ...]
    scales: dict[int, float]
    strength: float = 1.0
    site: str = "resid_post"
    operation: str = "add"
    scope: Scope = field(default_factory=lambda: Scope.parse("all"))
    targets: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    class_gaps: dict[int, float] = field(default_factory=dict)
    spreads: dict[int, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = field(default="", kw_only=True)
    model_name: str = field(default="", kw_only=True)
    n_layers: int = field(kw_only=True)
    d_model: int = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check everything once, and bring the fields to one canonical form."""
        choice("operation", self.operation, OPERATIONS)
        choice("site", self.site, KINDS)
        if not isinstance(self.scope, Scope):
            object.__setattr__(self, "scope", Scope.parse(self.scope))
        object.__setattr__(self, "strength", finite("the strength", self.strength))
        directions = {
            layer_within(layer, self.n_layers): unit_direction(
                layer, self.directions[layer], self.d_model
            )
            for layer in sorted(self.directions)
        }
        object.__setattr__(self, "directions", directions)
        object.__setattr__(self, "layers", self._active(self.layers))
        for name in PER_LAYER:
            values = sorted(getattr(self, name).items())
            checked = {
                layer_within(k, self.n_layers): finite(f"{name}[{k}]", value) for k, value in values
            }
            object.__setattr__(self, name, checked)
        missing = [layer for layer in self.layers if layer not in self.scales]
        if missing:
            raise TrimtabError(
                asked=f"a steering vector active at the layers {list(self.layers)}",
                found=f"no scale for the layers {missing}",
                advice="give the raw alpha at m = 1 of every active layer",
            )
        object.__setattr__(self, "provenance", jsonable(self.provenance))

    @classmethod
    def from_directions(
        cls,
        lm: LanguageModel,
        directions: Mapping[int, Tensor | Sequence[float]],
        alpha: float = 1.0,
        scope: str | Scope = "all",
        site: str = "resid_post",
        operation: str = "add",
        targets: Mapping[int, float] | None = None,
    ) -> VectorSteering:
        """Make a steering from your own directions: `alpha * c` is added at each layer given.

        The directions need not be unit vectors: their length goes into the scale, so that m = 1
        adds exactly `alpha * c`. For `ablate` and `affine`, which look only along c, `alpha` is m
        itself.

        Args:
            lm: the model steered; its width, depth and fingerprint are recorded.
            directions: 0-based layer -> `[d_model]` list, numpy array or tensor.
            alpha: raw strength, in units of the site's activations.
            scope: which tokens, see `trimtab.steering.scope`.
            site: kind of site that is written.
            operation: `add`, `ablate` or `affine`.
            targets: projections that `affine` moves towards.

        Raises:
            TrimtabError: a direction of another width, zero, or not finite; a layer out of depth.
        """
        alpha = finite("alpha", alpha)
        units: dict[int, Tensor] = {}
        lengths: dict[int, float] = {}
        for layer, given in directions.items():
            c = as_vector(layer, given, lm.d_model).to(torch.float64)
            lengths[layer] = float(c.norm())
            if lengths[layer] == 0.0:
                raise TrimtabError(
                    asked=f"to steer along the direction given for layer {layer}",
                    found="a vector of zeros",
                    advice="give a direction with a length",
                )
            units[layer] = (c / lengths[layer]).float()
        adds = operation == "add"
        return cls(
            directions=units,
            layers=tuple(units),
            scales={k: alpha * length if adds else length for k, length in lengths.items()},
            strength=1.0 if adds else alpha,
            site=site,
            operation=operation,
            scope=scope if isinstance(scope, Scope) else Scope.parse(scope),
            targets=dict(targets or {}),
            provenance={"method": "given"},
            fingerprint=lm.fingerprint,
            model_name=lm.name or "",
            n_layers=lm.n_layers,
            d_model=lm.d_model,
        )

    def at(self, strength: float) -> VectorSteering:
        """Return the same steering at another strength m; it replaces the old one."""
        return replace(self, strength=strength)

    @property
    def alphas(self) -> dict[int, float]:
        """Active layer -> raw alpha at this strength, m * scales[l]."""
        return {layer: self.strength * self.scales[layer] for layer in self.layers}

    @property
    def label(self) -> str:
        """Behavior, method and strength in a few characters."""
        names = [self.provenance.get("behavior"), self.provenance.get("method")]
        said = " ".join(str(name) for name in names if name) or "vector"
        return f"{said} m={self.strength:+g}"

    def select(
        self,
        layers: Sequence[int] | None = None,
        scope: str | Scope | None = None,
        strength: float | None = None,
        site: str | None = None,
        operation: str | None = None,
    ) -> VectorSteering:
        """Return the same directions used elsewhere or otherwise; what is None stays.

        Raises:
            TrimtabError: a layer that has no direction here, or an unknown name.
        """
        return replace(
            self,
            layers=self.layers if layers is None else tuple(layers),
            scope=self.scope if scope is None else scope,
            strength=self.strength if strength is None else strength,
            site=self.site if site is None else site,
            operation=self.operation if operation is None else operation,
        )

    def edits(self) -> list[Edit]:
        """Return one hook edit per active layer at this strength; none at strength 0."""
        return [] if self.strength == 0.0 else self._edits(self.strength)

    def on(
        self, lm: LanguageModel, row_strengths: Sequence[float] | None = None
    ) -> AbstractContextManager[None]:
        """Steer `lm` inside a `with` block; strength 0 installs nothing at all.

        As `torch.no_grad` does, the block acts on the thread or asyncio task that entered it, so
        several of them may steer one model in different ways at once. What they start with a copy
        of their context is steered too, while the block is open: asyncio tasks,
        `asyncio.to_thread`, `contextvars.copy_context().run`; a plain `threading.Thread` is not.
        Compiled models run eagerly while any block is open.

        Args:
            lm: the model this was made for.
            row_strengths: `[n]` a strength for each prompt of the call instead of the common one.

        Raises:
            TrimtabError: a model of another width, depth or fingerprint; a strength not finite.
        """
        self.check(lm)
        if row_strengths is None:
            return nullcontext() if self.strength == 0.0 else steered(lm, self.edits())
        factors = [finite("a row's strength", m) for m in row_strengths]
        return steered(lm, self._edits(1.0), row_factors=torch.tensor(factors))

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model this steering was not made for: other width, depth or fingerprint."""
        self.check_facts(lm.name, lm.n_layers, lm.d_model, lm.fingerprint)

    def check_facts(self, name: str | None, n_layers: int, d_model: int, fingerprint: str) -> None:
        """Do as `check` does where no model is loaded, only facts of it are known."""
        pairs = (
            ("width", self.d_model, d_model),
            ("depth", self.n_layers, n_layers),
            ("fingerprint", self.fingerprint or fingerprint, fingerprint),
        )
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise TrimtabError(
                    asked=f"to steer {name or 'the model'} with a vector made for "
                    f"{self.model_name or 'another model'}",
                    found=f"{what} {theirs} instead of {mine}",
                    advice="use the model the vector was made for, or find the vector again",
                )

    def parts(self) -> tuple[VectorHeader, dict[str, Tensor]]:
        """Return a header, and one tensor per direction."""
        header = VectorHeader(
            kind="vector",
            model=Model(
                name=self.model_name,
                fingerprint=self.fingerprint,
                n_layers=self.n_layers,
                d_model=self.d_model,
            ),
            site=self.site,
            operation=self.operation,
            scope=str(self.scope),
            strength=self.strength,
            layers=list(self.layers),
            provenance=self.provenance,
            **{name: text_keys(getattr(self, name)) for name in PER_LAYER},
        )
        return header, {f"direction.{layer}": c for layer, c in self.directions.items()}

    @classmethod
    def from_parts(cls, header: VectorHeader, tensors: Mapping[str, Tensor]) -> VectorSteering:
        """Make the steering that a file holds; see `parts`."""
        return cls(
            directions={
                layer_number(name.removeprefix("direction.")): c for name, c in tensors.items()
            },
            layers=tuple(header.layers),
            scope=Scope.parse(header.scope),
            model_name=header.model.name,
            **{name: int_keys(getattr(header, name)) for name in PER_LAYER},
            **header.model_dump(include={"strength", "site", "operation", "provenance"}),
            **header.model.model_dump(exclude={"name"}),
        )

    def __repr__(self) -> str:
        """Name the parts a reader compares, not the tensors."""
        return (
            f"VectorSteering({self.label}, {self.operation} at {self.site} of layers "
            f"{list(self.layers)}, scope {self.scope}, {self.d_model} wide, {self.n_layers} deep)"
        )

    def _edits(self, strength: float) -> list[Edit]:
        adds = self.operation == "add"
        return [
            Edit(
                site=Site(self.site, layer),
                operation=self.operation,
                direction=self.directions[layer],
                amount=strength * self.scales[layer] if adds else strength,
                target=self.targets.get(layer, 0.0),
                scope=self.scope,
            )
            for layer in self.layers
        ]

    def _active(self, layers: Sequence[int]) -> tuple[int, ...]:
        chosen = tuple(sorted({layer_within(layer, self.n_layers) for layer in layers}))
        unknown = [layer for layer in chosen if layer not in self.directions]
        if unknown or not chosen:
            raise TrimtabError(
                asked=f"to steer at the layers {list(layers)}",
                found=f"directions for the layers {sorted(self.directions)}",
                advice="choose at least one layer, and only layers that have a direction",
            )
        return chosen
