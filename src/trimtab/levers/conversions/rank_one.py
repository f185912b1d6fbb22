"""Vector to a rank-1 update a u^T of the output projection that writes where the vector is added.

With x the projection's input and t = 1 for a token that the scope steers and 0 for another, the update
adds a (u . x). Closest to the vector a t, in mean square over tokens, is

    u = (E x x^T + ridge I)^-1 E t x,   ridge = `RIDGE` times the mean of the diagonal
    unexplained = E (t - u . x)^2 / E t^2

which without a ridge, and for t = 1, is 1 - E x^T (E x x^T)^-1 E x. It is exact only where some u gives
u . x = t for every token. What is reported is on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import (
    Conversion,
    Setting,
    read_writers,
    refuse_post_norm,
)
from trimtab.levers.conversions.recovered import Recovered
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Table, number
from trimtab.steering.coverage import Coverage
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering, Writer, weight_of, writer_of

RIDGE = 1e-3
WRITES = {"resid_post": "mlp", "mlp_out": "mlp", "resid_mid": "attention", "attn_out": "attention"}


@dataclass(frozen=True)
class WriterFit:
    """How constant an input can be made at one writer.

    Attributes:
        writer: the sublayer and its layer.
        tokens: fitted on.
        unexplained: share of E t^2 on the fitted tokens.
        held_out: the same on held-out tokens.
        null: the held-out share that a u leaves which was fitted to targets in random order (with
            random signs where all are 1).
        spread: standard deviation of u . x over the held-out tokens that are steered.
    """

    writer: Writer
    tokens: int
    unexplained: float
    held_out: float
    null: float
    spread: float


@dataclass(frozen=True, eq=False)
class VectorAsRankOne(Conversion):
    """A vector as rank-1 updates, with its residual.

    Attributes:
        lever: the update, at the vector's strength; m means the same for both.
        ridge: share of the mean squared input that was added to the diagonal.
        fits: one per steered layer.
        recovered: gap and behavior on test prompts beside a random direction's update.
    """

    lever: WeightSteering
    ridge: float
    fits: tuple[WriterFit, ...]
    recovered: Recovered
    lost = "unexplained share of the push, held-out tokens"

    @property
    def residual(self) -> float:
        """The largest unexplained share on held-out tokens over the steered layers."""
        return max(fit.held_out for fit in self.fits)

    def figures(self) -> Table:
        rows = tuple(
            (
                f"{f.writer[0]} of layer {f.writer[1]}",
                str(f.tokens),
                *(number(x, 3) for x in (f.unexplained, f.held_out, f.null, f.spread)),
            )
            for f in self.fits
        )
        columns = ("writer", "tokens", "unexplained", "held out", "shuffled", "spread of u.x")
        notes = (f"ridge {self.ridge:g} of the mean squared input",)
        return Table("vector to rank-1 update", columns, rows, notes)


def vector_to_rank_one(
    setting: Setting, vector: VectorSteering, *, ridge: float = RIDGE
) -> VectorAsRankOne:
    """Convert a vector into a rank-1 update of the matrix that writes where it is added.

    It is fitted on train prompts of both sides with their unsteered answers, and reported on test
    prompts. The vector is to `add`, with any scope, at `resid_post` or `mlp_out` (MLP writer),
    `resid_mid` or `attn_out` (attention writer).

    Raises:
        TrimtabError: another site or operation, a post-norm block, no single output projection.
    """
    update, fits = fit_rank_one(setting, vector, ridge=ridge)
    null = replace(update, left=_left(setting.lm, setting.null(vector)))
    return VectorAsRankOne(update, ridge, fits, setting.recovered(vector, update, null))


def fit_rank_one(
    setting: Setting, vector: VectorSteering, *, ridge: float = RIDGE
) -> tuple[WeightSteering, tuple[WriterFit, ...]]:
    """Fit the update alone; see `vector_to_rank_one`."""
    lm = setting.lm
    writers = writers_of(lm, vector).values()
    train, held = (
        _moments(lm, setting.answered(part), vector, writers)
        for part in (setting.train(48), setting.test)
    )
    right: dict[Writer, Tensor] = {}
    fits: list[WriterFit] = []
    for writer in writers:
        (x, t), (x_held, t_held) = train[writer], held[writer]
        u = _solve(x, t, ridge)
        right[writer] = u[None].float()
        fits.append(
            WriterFit(
                writer=writer,
                tokens=len(t),
                unexplained=_unexplained(x, t, u),
                held_out=_unexplained(x_held, t_held, u),
                null=_unexplained(x_held, t_held, _solve(x, _shuffled(t, setting.seed), ridge)),
                spread=float((x_held[t_held != 0] @ u).std(correction=0)),
            )
        )
    note = {"method": "vector to rank-1 update", "vector": vector.label, "ridge": ridge}
    update = WeightSteering(
        _left(lm, vector), right, vector.strength, "rank-1", note, lm.fingerprint, lm.name or ""
    )
    return update, tuple(fits)


def _left(lm: LanguageModel, vector: VectorSteering) -> dict[Writer, Tensor]:
    """What each writer adds where u . x = 1, at m = 1: the vector, in the writer's own units."""
    r = lm.sites.residual_multiplier
    return {
        writer: (vector.directions[layer] * (vector.scales[layer] / r))[:, None]
        for layer, writer in writers_of(lm, vector).items()
    }


def writers_of(lm: LanguageModel, vector: VectorSteering) -> dict[int, Writer]:
    """Return layer -> the writer that adds where the vector does.

    Raises:
        TrimtabError: a site or operation without such a writer, or a norm after it.
    """
    vector.check(lm)
    asked = f"{vector.label} ({vector.operation} at {vector.site}) as a rank-1 update"
    kind = WRITES.get(vector.site)
    if kind is None or vector.operation != "add":
        raise TrimtabError(
            asked,
            "no output projection that adds a constant there",
            f"add at one of {', '.join(WRITES)}",
        )
    if kind == "attention" and lm.sites.parallel and vector.site == "resid_mid":
        raise TrimtabError(asked, "no stream between attention and MLP", "use resid_post")
    refuse_post_norm(lm, asked, "bake the vector (`vector_to_weights`), or steer with the hook")
    found = {layer: (kind, layer) for layer in vector.layers}
    for writer in found.values():
        weight_of(writer_of(lm, writer))
    return found


def _moments(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    vector: VectorSteering,
    writers: Collection[Writer],
) -> dict[Writer, tuple[Tensor, Tensor]]:
    """Each writer's inputs x `[tokens, width]` and which of the tokens the scope covers, t; float64."""
    found: dict[Writer, tuple[list[Tensor], list[Tensor]]] = {w: ([], []) for w in writers}
    coverage = Coverage(lm, None)
    slot = coverage.slot(vector.scope)

    def read(writer: Writer, x: Tensor, inside: Tensor) -> None:
        t = coverage.weight(slot, (torch.float32, x.device)).expand(*x.shape[:2], 1)[..., 0]
        for kept, values in zip(found[writer], (x, t), strict=True):
            kept.append(values[inside].float().cpu())

    with Hooks() as hooks:
        hooks.calls(lm.sites.trunk, before=coverage.prepare)
        read_writers(lm, encoded, writers, read)
    return {w: (torch.cat(xs).double(), torch.cat(ts).double()) for w, (xs, ts) in found.items()}


def _solve(x: Tensor, t: Tensor, ridge: float) -> Tensor:
    square, mixed = x.T @ x / len(x), (x * t[:, None]).mean(0)
    square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    if not ridge:  # fewer tokens than inputs leave it singular: the shortest u of the best
        return torch.linalg.pinv(square, hermitian=True) @ mixed
    return torch.linalg.solve(square, mixed)


def _unexplained(x: Tensor, t: Tensor, u: Tensor) -> float:
    return float((t - x @ u).square().sum() / t.square().sum())


def _shuffled(t: Tensor, seed: int) -> Tensor:
    """The targets, or where those are constant their signs, at random."""
    generator = torch.Generator().manual_seed(seed)
    if bool((t == t[0]).all()):
        return t * (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1)
    return t[torch.randperm(len(t), generator=generator)]
