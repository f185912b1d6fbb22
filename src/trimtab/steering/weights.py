"""The weights lever: a low-rank update of the matrices that write to the stream, with a strength.

An output projection y = W x becomes y + m B (A x), which is W + m B A. Hooks add the second term, so
that the model's own weights stay as they are; `bake` writes it into a checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.checks import finite
from trimtab.errors import TrimtabError
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.steering.format import WeightsHeader, expect, layer_number
from trimtab.steering.vector import Bakeable, VectorSteering

Writer: TypeAlias = "tuple[str, int]"  # ("attention" or "mlp", layer)
KINDS = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class WeightSteering(Bakeable):
    """W + m B A on some output projections.

    Attributes:
        left: writer -> B, float32 `[d_model, rank]`, in the units of the projection's output.
        right: writer -> A, float32 `[rank, inner]`.
        strength: the multiplier m; 0 is the identity.
        name: short name, used in tables.
        provenance: JSON-able record of where this came from.
        fingerprint: of the model it was made for; empty when unknown.
        model_name: that model's name or folder.

    Raises:
        TrimtabError: no writer, shapes that do not fit each other, or numbers that are not finite.
    """

    left: Mapping[Writer, Tensor]
    right: Mapping[Writer, Tensor]
    strength: float = 1.0
    name: str = "low rank"
    provenance: dict[str, object] = field(default_factory=dict)
    fingerprint: str = ""
    model_name: str = ""
    # What a vector says of itself, for records and cards.
    operation: ClassVar[str] = "low rank"
    scope: ClassVar[str] = "all"
    alphas: ClassVar[dict[int, float]] = {}

    def __post_init__(self) -> None:
        """Check the shapes once."""
        object.__setattr__(self, "strength", finite("the strength", self.strength))
        good = bool(self.left) and set(self.left) == set(self.right)
        for writer in self.left if good else ():
            b, a = self.left[writer], self.right[writer]
            good &= writer[0] in KINDS and b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0]
            good &= bool(b.isfinite().all()) and bool(a.isfinite().all())
        if not good:
            raise TrimtabError(
                asked=f"a low-rank update of {sorted(self.left)}",
                found="no writers, or factors that do not fit each other",
                advice="give finite B [d_model, rank] and A [rank, inner] for each writer",
            )
        for name in ("left", "right"):  # as the file holds them
            factors = {
                w: t.detach().float().cpu().contiguous() for w, t in vars(self)[name].items()
            }
            object.__setattr__(self, name, factors)

    @property
    def label(self) -> str:
        """Name and strength."""
        return f"{self.name} m={self.strength:+g}"

    @property
    def rank(self) -> int:
        """The largest rank of a factor."""
        return max(b.shape[1] for b in self.left.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose writers are updated, ascending."""
        return tuple(sorted({layer for _, layer in self.left}))

    @property
    def site(self) -> str:
        """The matrices in words, such as `mlp 3, attention 4`."""
        return ", ".join(f"{kind} {layer}" for kind, layer in self.left)

    def at(self, strength: float) -> WeightSteering:
        """Return the same update at another strength m."""
        return replace(self, strength=strength)

    @contextmanager
    def on(self, lm: LanguageModel) -> Iterator[None]:
        """Add the update to the output projections inside a `with` block.

        Raises:
            TrimtabError: another model, or one whose writers have other shapes.
        """
        self.check(lm)
        with Hooks() as hooks:
            for writer in self.left if self.strength else ():
                add = _adding(self.left[writer] * self.strength, self.right[writer])
                hooks.calls(writer_of(lm, writer), after=add)
            yield

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model this update was not made for."""
        if self.fingerprint and self.fingerprint != lm.fingerprint:
            raise TrimtabError(
                asked=f"to steer {lm.name} with {self.label}",
                found="an update that was made for another model",
                advice="use the model it was made for, or make it again",
            )
        for writer, b in self.left.items():
            wanted = tuple(weight_of(writer_of(lm, writer)).shape)
            found = (b.shape[0], self.right[writer].shape[1])
            if wanted != found:
                raise TrimtabError(
                    asked=f"a low-rank update of the {writer[0]} writer of layer {writer[1]}",
                    found=f"factors for {list(found)}, a weight of {list(wanted)}",
                    advice="use the model it was made for",
                )

    def parts(self) -> tuple[WeightsHeader, dict[str, Tensor]]:
        """Return a header, and two tensors for each writer."""
        header = WeightsHeader(
            kind="weights",
            name=self.name,
            strength=self.strength,
            fingerprint=self.fingerprint,
            model_name=self.model_name,
            provenance=self.provenance,
        )
        sides = {"left": self.left, "right": self.right}
        return header, {
            f"{side}.{kind}.{layer}": factor.clone()  # no two tensors of a file share memory
            for side, factors in sides.items()
            for (kind, layer), factor in factors.items()
        }

    @classmethod
    def from_parts(cls, header: WeightsHeader, tensors: Mapping[str, Tensor]) -> WeightSteering:
        """Make the steering that a file holds; see `parts`."""
        sides: dict[str, dict[Writer, Tensor]] = {"left": {}, "right": {}}
        for name, factor in tensors.items():
            side, _, rest = name.partition(".")
            kind, _, layer = rest.partition(".")
            expect(side in sides, "tensors left.KIND.LAYER and right.KIND.LAYER", repr(name))
            sides[side][kind, layer_number(layer)] = factor
        return cls(**sides, **header.model_dump(exclude={"kind"}))

    def __repr__(self) -> str:
        """Name the parts a reader compares, not the tensors."""
        return f"WeightSteering({self.label}, rank {self.rank}, {self.site})"


Scaled: TypeAlias = VectorSteering | WeightSteering  # the levers with a strength of any size


def writer_of(lm: LanguageModel, writer: Writer) -> nn.Module:
    """Return the output projection of a sublayer.

    Args:
        lm: the model.
        writer: `("attention", layer)` or `("mlp", layer)`.

    Raises:
        TrimtabError: names the architecture where the sublayer has no single linear projection.
    """
    kind, layer = writer
    found = lm.sites.attention_writer if kind == "attention" else lm.sites.mlp_writer
    module = found[layer] if 0 <= layer < len(found) else None
    if not isinstance(module, (nn.Linear, Conv1D)):
        what = "no single output projection" if module is None else f"a {type(module).__name__}"
        raise TrimtabError(
            asked=f"the {kind} writer of layer {layer} of {type(lm.model).__name__}",
            found=f"{what} there (a mixture of experts has many)",
            advice="use the attention writer: the sites resid_mid or attn_out; or steer with the hook",
        )
    return module


def weight_of(module: nn.Module) -> Tensor:
    """Return the projection's weight as `[d_model, inner]`, a view of the parameter."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _adding(left: Tensor, right: Tensor) -> Callable[..., Tensor]:
    """A change that adds left (right x) in float32; factors go to the input's device once."""
    places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def add(args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0]
        if x.device not in places:
            places[x.device] = (left.T.float().to(x.device), right.T.float().to(x.device))
        b, a = places[x.device]
        return output + ((x.float() @ a) @ b).to(output.dtype)

    return add
