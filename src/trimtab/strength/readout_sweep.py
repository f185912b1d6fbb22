"""The readout at many strengths: what the answer's first position says, without generating.

One row per prompt and strength, from one fan (`trimtab.passes.fan`): fit for a fine grid. It sees only the
first position; what becomes of whole answers is measured by `strength/sweep.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import percentile_95, token_kl
from trimtab.evaluation.readout import readout_tokens
from trimtab.passes.fan import Fan, Part
from trimtab.results.tables import Printable, Table, number

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.evaluation.evaluate import Progress
    from trimtab.models.chat import Prompt
    from trimtab.models.model import LanguageModel
    from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class ReadoutRow:
    """One strength, over prompts.

    Attributes:
        strength: the multiplier m.
        gap: mean log-odds of the toward against the away tokens, in nats; None without readout.
        probability: mean mass on the toward tokens, 0 to 1; None without readout.
        kl: mean KL(unsteered || steered) at the first answer position, in nats.
        kl_p95: its 95th percentile over prompts.
    """

    strength: float
    gap: float | None
    probability: float | None
    kl: float
    kl_p95: float


@dataclass(frozen=True, eq=False)
class ReadoutSweep(Printable):
    """A curve of the first answer position.

    Attributes:
        behavior: its name.
        label: what steers.
        layers: the layers steered.
        rows: one per strength, in the order asked for.
        gaps: `[strengths, prompts]` float32; None without readout words.
        probabilities: mass on the toward tokens, the same shape; None without readout words.
        kl: KL(unsteered || steered) in nats, float64 of the same shape.
        plan: what was computed once for all strengths, or why nothing was.
    """

    behavior: str
    label: str
    layers: tuple[int, ...]
    rows: tuple[ReadoutRow, ...]
    gaps: Tensor | None
    probabilities: Tensor | None
    kl: Tensor
    plan: str

    def table(self) -> Table:
        """Return one line per strength."""
        layers = ", ".join(map(str, self.layers))
        return Table(
            f"{self.behavior}: {self.label} at the layers {layers}, first answer position",
            ("m", "gap", "target probability", "KL (p95)"),
            tuple(
                (
                    f"{row.strength:+g}" if row.strength else "0",
                    number(row.gap),
                    number(row.probability, 3),
                    f"{number(row.kl, 3)} ({number(row.kl_p95, 3)})",
                )
                for row in self.rows
            ),
            (f"means over {self.kl.shape[1]} prompts; gap and KL in nats",),
        )


@torch.no_grad()
def readout_sweep(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    strengths: Sequence[float],
    *,
    sign: int = 1,
    prompts: Sequence[Prompt] | None = None,
    max_prompts: int | None = None,
    progress: Progress | None = None,
) -> ReadoutSweep:
    """Read the first answer position at every strength, all strengths on the same prompts.

    Args:
        lm: the unsteered model.
        behavior: gives the readout words and, without `prompts`, the prompts.
        vector: what is scaled; its own strength does not matter.
        strengths: multipliers m of any sign, kept in this order.
        sign: whose prompts are read, as `Evaluator.scored` says: those to be turned toward the
            behavior (+1) or away from it (-1). The target stays the toward tokens.
        prompts: read these instead.
        max_prompts: read the first so many.
        progress: called with (readings done, readings in all).

    Raises:
        TrimtabError: without strengths or prompts, or as `vector.on` does.
    """
    chosen = list(_side(behavior, sign) if prompts is None else prompts)[:max_prompts]
    if not chosen or (max_prompts is not None and max_prompts < 1):
        raise TrimtabError(
            asked=f"a readout of the behavior {behavior.name!r}",
            found="no prompts",
            advice="give prompts, or a split that has some on this side",
        )
    tokens = None if behavior.readout is None else readout_tokens(lm, behavior)
    fan = Fan(lm, vector, [lm.encode(prompt) for prompt in chosen])
    shape = (len(strengths), len(chosen))
    kl = torch.zeros(shape, dtype=torch.float64)
    gaps, masses = (None if tokens is None else torch.zeros(shape) for _ in range(2))
    done = 0
    for part in fan.parts(strengths, unsteered=True):
        places = torch.tensor(part.strengths)[:, None], torch.tensor(part.prompts)
        log_q = torch.log_softmax(part.logits[:, :, -1], dim=-1)
        kl[places] = _divergence(part, log_q)
        if tokens is not None and gaps is not None and masses is not None:
            toward = log_q[..., list(tokens.toward)].logsumexp(-1)
            away = log_q[..., list(tokens.away)].logsumexp(-1)
            gaps[places], masses[places] = (toward - away).cpu(), toward.exp().cpu()
        done += len(part.strengths) * len(part.prompts)
        if progress is not None:
            progress(done, kl.numel())
    # A strength of zero is no steering: what differs is the rounding of another batch.
    kl[[i for i, strength in enumerate(strengths) if not strength]] = 0
    return ReadoutSweep(
        behavior=behavior.name,
        label=f"{vector.provenance.get('method') or 'vector'} ({vector.operation}, {vector.scope})",
        layers=tuple(vector.layers),
        rows=tuple(
            ReadoutRow(
                strength=float(strength),
                gap=None if gaps is None else float(gaps[i].double().mean()),
                probability=None if masses is None else float(masses[i].double().mean()),
                kl=float(kl[i].mean()),
                kl_p95=percentile_95(kl[i]),
            )
            for i, strength in enumerate(strengths)
        ),
        gaps=gaps,
        probabilities=masses,
        kl=kl,
        plan=fan.plan,
    )


def _divergence(part: Part, log_q: Tensor) -> Tensor:
    """KL of a part's first positions `[strengths, prompts]`."""
    assert part.unsteered is not None  # asked for
    return token_kl(torch.log_softmax(part.unsteered[:, -1], dim=-1), log_q)


def _side(behavior: Behavior, sign: int) -> list[Prompt]:
    examples = behavior.requests or (behavior.away if sign > 0 else behavior.toward)
    return [example.prompt for example in examples]
