"""Holding one part of a steered run at what it does unsteered, on the same tokens in the same batch.

A batch has two lanes: rows 0..n-1 are the base lane and rows n..2n-1 the steered one. Inside
`holding` the base lane's rows are steered by one factor (0) and the steered lane's by another (1),
and at the first steered layer and above the steered lane is given, of the base lane,

| hold | what |
|---|---|
| `qk` | the attention probabilities |
| `ov` | the values that are mixed by them |
| `mlp` | the outputs of the MLPs |

or only what the vector does there by itself is taken out: with s the steering's pushes that have
entered the stream so far, h the stream and x = norm(h), the share of x that is due to s at h's own
scale is x_s = g c(s) / rms(c(h)) (norm_form.py), and

| hold | what |
|---|---|
| `svv` | W_V x_s is subtracted from the values (queries and keys keep it): the steering value vectors |
| `mlp_direct` | x_s is subtracted from what the MLP reads |

Everything works with a KV cache, because both lanes keep one. Source: the freezing of arXiv
2604.08524, there with a second run per token and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.anatomy import anatomy_of
from trimtab.models.attention import AttentionCall, attending
from trimtab.models.heads import HeadLayer, heads_of
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.steering.coverage import Coverage
from trimtab.steering.hooks import steered
from trimtab.steering.vector import VectorSteering

HOLDS = ("qk", "ov", "svv", "mlp_direct", "mlp")
# A changed pattern of attention has no counterpart of equal size that is a pattern too.
WITHOUT_NULL = ("qk",)
_BEFORE_ATTENTION = ("embed", "resid_pre")
_BEFORE_MLP = ("resid_mid", "attn_out")


def parse_holds(text: str) -> tuple[str, ...]:
    """Read "ov", or several joined as in "ov+mlp"; refuse an unknown name."""
    names = tuple(text.split("+"))
    unknown = [name for name in names if name not in HOLDS]
    if unknown:
        raise TrimtabError(
            asked=f"to freeze {text!r}",
            found=f"nothing called {unknown[0]!r}",
            advice=f"use {', '.join(HOLDS)}, or several joined with +",
        )
    return names


def push_before(lm: LanguageModel, vector: VectorSteering, layer: int, part: str) -> Tensor:
    """Return what an additive steering has added to what "attention" or "mlp" reads, `[d_model]`."""
    own = vector.site in _BEFORE_ATTENTION
    if part == "mlp" and vector.site in _BEFORE_MLP and not lm.sites.parallel:
        own = True
    total = torch.zeros(vector.d_model, dtype=torch.float64)
    for steered_layer, alpha in vector.alphas.items():
        if steered_layer < layer or (own and steered_layer == layer):
            total += alpha * vector.directions[steered_layer].double()
    return total.float()


@contextmanager
def holding(
    lm: LanguageModel,
    vector: VectorSteering,
    holds: Sequence[str],
    factors: Tensor,
    null_seed: int | None = None,
) -> Iterator[None]:
    """Steer the lanes of every call made inside `lm.calling`, and hold parts of the second lane.

    Args:
        lm: the model.
        vector: an additive steering at its strength.
        holds: names of `HOLDS`; none only steers.
        factors: `[2n]` one per row of the batch, both lanes: 0 unsteered, 1 steered.
        null_seed: instead of what is held, a change of the same length in another direction: its
            coordinates permuted, their signs drawn again, alike at every position.
    """
    vector.check(lm)
    names = {name for hold in holds for name in parse_holds(hold)}
    assert vector.operation == "add"
    assert null_seed is None or not names & set(WITHOUT_NULL)
    held = _Held(lm, vector, names, factors, null_seed)
    # Attention is always seen, so that runs with and without a hold differ in nothing else.
    with Hooks() as hooks, attending(lm, held.attend):
        held.install(hooks)
        # After the hooks that hold: a push at a module that is held is added to what is held.
        with steered(lm, vector.edits(), row_factors=factors):
            yield


@dataclass(eq=False)
class _Held:
    """The hooks that hold; see `holding`."""

    lm: LanguageModel
    vector: VectorSteering
    names: set[str]
    factors: Tensor
    null_seed: int | None
    _streams: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _turns: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = min(self.vector.layers)
        self.coverage = Coverage(self.lm, self.factors.float())
        self.slot = self.coverage.slot(self.vector.scope)

    def install(self, hooks: Hooks) -> None:
        """Put the hooks on values and MLPs in place."""
        found = heads_of(self.lm)
        if self.names & {"svv", "mlp_direct"}:
            hooks.calls(self.lm.sites.trunk, before=self.coverage.prepare)
        for layer in range(self.first, self.lm.n_layers):
            if "svv" in self.names:
                share = self._share(hooks, layer, "attention", found[layer].norm)
                hooks.after(found[layer].value.module, _less_value(found[layer], share))
            mlp = self.lm.sites.mlp[layer]
            if "mlp_direct" in self.names:
                share = self._share(hooks, layer, "mlp", found[layer].mlp_norm)
                hooks.before(mlp, lambda hidden, share=share: _less(hidden, share()))
            if "mlp" in self.names:
                hooks.after(mlp, partial(self._base, what="mlp", layer=layer))

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Handle one attention."""
        if call.layer < self.first or not self.names & {"qk", "ov"}:
            return None
        probabilities, value = call.probabilities(), call.value
        if "qk" in self.names:
            probabilities = torch.cat([probabilities.chunk(2)[0]] * 2)
        if "ov" in self.names:
            # All heads of a position as one vector, so that the null's length is that of the change.
            together = value.transpose(1, 2).flatten(2)
            kept = self._base(together, "value", call.layer)
            value = kept.unflatten(2, (value.shape[1], value.shape[3])).transpose(1, 2)
        return call.mix(probabilities, value)

    def _base(self, both: Tensor, what: str, layer: int) -> Tensor:
        """Give the steered lane the base lane's values `[2n, ..., width]`; or the null."""
        base, mine = both.chunk(2)
        if self.null_seed is None:
            return torch.cat([base, base])
        return torch.cat([base, mine - self._turned(mine - base, what, layer)])

    def _turned(self, values: Tensor, what: str, layer: int) -> Tensor:
        """The null of a change `[..., width]`: coordinates permuted, signs drawn."""
        if self.null_seed is None:
            return values
        key = (what, layer, values.shape[-1])
        if key not in self._turns:
            kind = ("value", "mlp", "attention share", "mlp share").index(what)
            seed = (self.null_seed * 1009 + layer) * 4 + kind
            generator = torch.Generator().manual_seed(seed % 2**63)
            order = torch.randperm(key[2], generator=generator)
            signs = torch.randint(0, 2, (key[2],), generator=generator) * 2.0 - 1.0
            self._turns[key] = order, signs
        order, signs = (x.to(values.device) for x in self._turns[key])
        return values[..., order] * signs.to(values.dtype)

    def _share(
        self, hooks: Hooks, layer: int, part: str, norm: nn.Module | None
    ) -> Callable[[], Tensor]:
        """Return a function that gives x_s of the current call's steered lane `[n, seq, d_model]`."""
        push = push_before(self.lm, self.vector, layer, part)
        forms = anatomy_of(self.lm)[layer]
        form = forms.norm if part == "attention" else forms.mlp_norm
        if norm is not None:
            hooks.before(norm, partial(self._streams.__setitem__, (part, layer)))

        def share() -> Tensor:
            stream = self._streams[part, layer].chunk(2)[1] if form is not None else None
            device = self.coverage.device if stream is None else stream.device
            weight = self.coverage.weight(self.slot, (torch.float32, device))
            base, mine = weight.chunk(2)
            pushed = (mine - base) * push.to(device)
            if form is not None and stream is not None:
                pushed = form.direct(pushed, stream.float())
            return self._turned(pushed, f"{part} share", layer)

        return share


def _less(both: Tensor, share: Tensor) -> Tensor:
    """Subtract a share `[n, seq or 1, width]` from the steered lane of `[2n, seq, width]`."""
    base, mine = both.chunk(2)
    return torch.cat([base, (mine.float() - share.to(mine.device)).to(mine.dtype)])


def _less_value(layer: HeadLayer, share: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    rows = layer.value.rows.flatten()
    weights = layer.value.weights().detach().flatten(0, 1).float()  # [kv_heads * head_dim, d_model]

    def change(output: Tensor) -> Tensor:
        at = rows.to(output.device)
        changed = output.clone()
        changed[..., at] = _less(output[..., at], share() @ weights.T)
        return changed

    return change
