"""A low-rank update of the matrices that write to the stream, as a lever with a strength.

An output projection y = W x becomes y + m B (A x), which is W + m B A. Hooks add the second term, so
that the model's own weights stay as they are; `merged` writes it into a copy of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.checks import finite
from trimtab.errors import TrimtabError
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel

Writer: TypeAlias = "tuple[str, int]"  # ("attention" or "mlp", layer)
KINDS = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """W + m B A on some output projections.

    Attributes:
        left: writer -> B, float32 `[d_model, rank]`, in the units of the projection's output.
        right: writer -> A, float32 `[rank, inner]`.
        strength: the multiplier m; 0 is the identity.
        name: short name, used in tables.
        provenance: JSON-able record of where this came from.
        fingerprint: of the model it was made for; empty when unknown.

    Raises:
        TrimtabError: no writer, shapes that do not fit each other, or numbers that are not finite.
    """

    left: Mapping[Writer, Tensor]
    right: Mapping[Writer, Tensor]
    strength: float = 1.0
    name: str = "low rank"
    provenance: Mapping[str, object] = field(default_factory=dict)
    fingerprint: str = ""

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

    @property
    def label(self) -> str:
        """Name and strength."""
        return f"{self.name} m={self.strength:+g}"

    @property
    def rank(self) -> int:
        """The largest rank of a factor."""
        return max(b.shape[1] for b in self.left.values())

    def at(self, strength: float) -> LowRankUpdate:
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


@torch.no_grad()
def merged(lm: LanguageModel, update: LowRankUpdate) -> LanguageModel:
    """Return a copy of a model whose weights hold the update; the model is left as it is.

    Exact up to one rounding of each weight to the model's dtype. The copy takes as much memory again.
    """
    update.check(lm)
    made = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.name)
    for writer, b in update.left.items():
        weight = weight_of(writer_of(made, writer))
        change = update.strength * (b.double() @ update.right[writer].double())
        weight.copy_((weight.double().cpu() + change).to(weight.dtype))
    return made


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
