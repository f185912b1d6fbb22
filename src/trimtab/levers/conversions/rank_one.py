"""Vector to a rank-1 update a u^T of the output projection that writes where the vector is added.

With x the projection's input and t = 1 for a token that the scope steers and 0 for another, the update
adds a (u . x). Closest to the vector a t, in mean square over tokens, is

    u = (E x x^T + ridge I)^-1 E t x,   ridge = `RIDGE` times the mean of the diagonal
    unexplained = E (t - u . x)^2 / E t^2

which without a ridge, and for t = 1, is 1 - E x^T (E x x^T)^-1 E x. It is exact only where some u gives
u . x = t for every token. What is reported is on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Conversion, Setting
from trimtab.levers.conversions.recovered import Recovered
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Table, number
from trimtab.steering.coverage import Coverage
from trimtab.steering.nulls import null_seeds, random_null
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
        """Return one line per writer."""
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

    Args:
        setting: fitted on its train prompts of both sides and their unsteered answers, reported on
            test prompts.
        vector: `add` at `resid_post` or `mlp_out` (MLP writer), `resid_mid` or `attn_out` (attention
            writer); any scope.
        ridge: see above.

    Raises:
        TrimtabError: another site or operation, a post-norm block, no single output projection.
    """
    update, fits = fit_rank_one(setting, vector, ridge=ridge)
    random = random_null(vector, null_seeds(setting.seed, 1)[0])
    null = pointing(update, random, setting.lm)
    return VectorAsRankOne(update, ridge, fits, setting.recovered(vector, update, null))


def fit_rank_one(
    setting: Setting, vector: VectorSteering, *, ridge: float = RIDGE
) -> tuple[WeightSteering, tuple[WriterFit, ...]]:
    """Fit the update alone; see `vector_to_rank_one`."""
    lm = setting.lm
    writers = writers_of(lm, vector)
    train, held = (
        _moments(lm, setting.answered(part), vector, writers)
        for part in (setting.train(48), setting.test)
    )
    right: dict[Writer, Tensor] = {}
    fits: list[WriterFit] = []
    for writer in writers.values():
        mine, other = train[writer], held[writer]
        u = mine.solve(ridge)
        right[writer] = u[None].float()
        shuffled = mine.shuffled(setting.seed).solve(ridge)
        fits.append(
            WriterFit(
                writer=writer,
                tokens=mine.count,
                unexplained=mine.unexplained(u),
                held_out=other.unexplained(u),
                null=other.unexplained(shuffled),
                spread=other.spread(u),
            )
        )
    blank = WeightSteering(
        {writer: torch.zeros(lm.d_model, 1) for writer in right},
        right,
        vector.strength,
        "rank-1",
        {"method": "vector to rank-1 update", "vector": vector.label, "ridge": ridge},
        lm.fingerprint,
        lm.name or "",
    )
    return pointing(blank, vector, lm), tuple(fits)


def pointing(update: WeightSteering, vector: VectorSteering, lm: LanguageModel) -> WeightSteering:
    """Return an update with the same u that adds another vector of the same layers, at its strength."""
    r = lm.sites.residual_multiplier
    left = {
        writer: (vector.directions[layer] * (vector.scales[layer] / r))[:, None]
        for layer, writer in writers_of(lm, vector).items()
    }
    return replace(update, left=left, strength=vector.strength)


def writers_of(lm: LanguageModel, vector: VectorSteering) -> dict[int, Writer]:
    """Return layer -> the writer that adds where the vector does.

    Raises:
        TrimtabError: a site or operation without such a writer, or a norm behind it.
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
    if lm.sites.post_norm:
        raise TrimtabError(
            asked,
            f"{type(lm.model).__name__} puts a norm between the output projection and the stream",
            "bake the vector (`vector_to_weights`), or steer with the hook",
        )
    found = {layer: (kind, layer) for layer in vector.layers}
    for writer in found.values():
        weight_of(writer_of(lm, writer))
    return found


class _Moments:
    """Inputs of one writer with their targets, as sums over tokens (float64)."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, x: Tensor, t: Tensor) -> None:
        self.inputs.append(x)
        self.targets.append(t)

    @property
    def x(self) -> Tensor:
        return torch.cat(self.inputs).double()

    @property
    def t(self) -> Tensor:
        return torch.cat(self.targets).double()

    @property
    def count(self) -> int:
        return sum(len(t) for t in self.targets)

    def shuffled(self, seed: int) -> _Moments:
        """The same inputs with the targets, or where those are constant their signs, at random."""
        made, t = _Moments(), self.t
        generator = torch.Generator().manual_seed(seed)
        if bool((t == t[0]).all()):
            signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
            made.add(self.x, t * signs)
        else:
            made.add(self.x, t[torch.randperm(len(t), generator=generator)])
        return made

    def solve(self, ridge: float) -> Tensor:
        x, t = self.x, self.t
        square, mixed = x.T @ x / len(x), (x * t[:, None]).mean(0)
        square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        if not ridge:  # fewer tokens than inputs leave it singular: the shortest u of the best
            return torch.linalg.pinv(square, hermitian=True) @ mixed
        return torch.linalg.solve(square, mixed)

    def unexplained(self, u: Tensor) -> float:
        x, t = self.x, self.t
        return float((t - x @ u).square().sum() / t.square().sum())

    def spread(self, u: Tensor) -> float:
        x, t = self.x, self.t
        return float((x[t != 0] @ u).std(correction=0))


@torch.no_grad()
def _moments(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    vector: VectorSteering,
    writers: dict[int, Writer],
) -> dict[Writer, _Moments]:
    """Read the writers' inputs at every token, padding left out, with what the scope covers."""
    found = {writer: _Moments() for writer in writers.values()}
    coverage = Coverage(lm, None)
    mask = torch.empty(0)

    slot = coverage.slot(vector.scope)

    def read(writer: Writer, x: Tensor) -> None:
        t = coverage.weight(slot, (torch.float32, x.device)).expand(*x.shape[:2], 1)
        inside = mask.to(x.device)
        found[writer].add(x[inside].float().cpu(), t[..., 0][inside].cpu())

    with Hooks() as hooks:
        hooks.calls(lm.sites.trunk, before=coverage.prepare)
        for writer in found:
            hooks.before(writer_of(lm, writer), partial(read, writer))
        for batch in lm.batches(encoded):
            mask = batch.attention_mask.bool()
            lm.forward(batch, logits_to_keep=1)
    return found
