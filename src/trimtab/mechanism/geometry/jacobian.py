"""J v and J^T g: how a change of the stream at one depth arrives at the last prompt position.

Forward: the stream at a depth is a dual number h + v epsilon and the blocks above run once. Where an
operation has no forward derivative, a central difference takes its place, and the reason is logged
once per model. Backward: one pass gives the gap's gradient at every depth and position.

Depth 0 is what enters block 0 (after any embedding scale and learned positions); depth k is what
block k - 1 hands on; the last depth is what the final norm reads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.evaluation.readout import ReadoutTokens, gap_of
from trimtab.margins.radius import TINY, TOKENS_PER_BATCH
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.gradients import frozen
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.replay import Recording, Stopped, recorded, replayed
from trimtab.models.sites import Site
from trimtab.passes.sharing import spread
from trimtab.passes.slope import DIFFERENCE
from trimtab.steering.vector import VectorSteering

logger = logging.getLogger(__name__)

# Models on which forward mode has failed, with the largest depth where it did.
_FAILED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Course:
    """A batch of prompts and its unsteered stream at every depth.

    Attributes:
        batch: the prompts; rows end together.
        entry: what enters block 0, `[rows, seq, d_model]`.
        blocks: what each block handed on.
    """

    batch: Batch
    entry: Tensor
    blocks: tuple[Recording, ...]

    def hidden(self, depth: int) -> Tensor:
        """Return the stream at a depth, `[rows, seq, d_model]`."""
        return self.blocks[depth - 1].hidden if depth else self.entry

    @property
    def real(self) -> Tensor:
        """1 for a token, 0 for padding, `[rows, seq, 1]`, in the stream's dtype."""
        return self.batch.attention_mask[..., None].to(self.entry.dtype)


def depth_name(depth: int) -> str:
    """Return the site that a depth is: `embed.0`, `resid_post.0`, ..."""
    return str(Site("resid_post", depth - 1) if depth else Site("embed", 0))


def direction_at(vector: VectorSteering, depth: int) -> Tensor | None:
    """Return a vector's own unit direction `[d_model]` at a depth; None where it has none."""
    return vector.directions.get(depth - 1) if vector.site == "resid_post" else None


@torch.no_grad()
def courses(lm: LanguageModel, encoded: Sequence[Encoded]) -> list[Course]:
    """Read prompts once, so that what starts at a depth needs only the blocks above it."""
    found = []
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        recordings = tuple(Recording(stop=False) for _ in lm.sites.blocks)
        with ExitStack() as stack:
            entries = stack.enter_context(_entry(lm))
            for block, recording in zip(lm.sites.blocks, recordings, strict=True):
                stack.enter_context(recorded(block, recording))
            lm.forward(batch, logits_to_keep=1)
        found.append(Course(batch, entries[-1], recordings))
    return found


def carried(
    lm: LanguageModel, course: Course, depth: int, pushes: Tensor
) -> tuple[list[Tensor], str]:
    """Return J v at the last prompt position for pushes v `[copies, rows, seq, d_model]`, and how.

    Per depth from `depth` to the last `[copies, rows, d_model]`, float32 at least; "jvp" or
    "difference".
    """
    if depth > _FAILED.get(lm.model, -1):
        try:
            return _jvp(lm, course, depth, pushes), "jvp"
        except torch.OutOfMemoryError:
            raise  # fewer copies help, two passes of a difference do not
        except RuntimeError as error:  # what torch raises where an operation has no derivative
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("%s: no forward-mode derivative (%s); differences", lm.name, reason)
            _FAILED[lm.model] = depth
    # Every copy gets a step of its own, a small share of the stream.
    size = pushes.float().flatten(1).norm(dim=1) / course.hidden(depth).float().norm()
    step = (DIFFERENCE / size.clamp_min(TINY)).to(pushes.dtype)[:, None, None, None]
    ahead, behind = (moved(lm, course, depth, sign * step * pushes) for sign in (1, -1))
    width = _wide(2 * step[..., 0])
    return [(a - b) / width for a, b in zip(ahead, behind, strict=True)], "difference"


def secant(lm: LanguageModel, course: Course, depth: int, pushes: Tensor) -> list[Tensor]:
    """Return F(h + v) - F(h) at the last prompt position, shaped as `carried` returns it."""
    after = moved(lm, course, depth, pushes)
    before = [_wide(course.hidden(k)[:, -1]) for k in range(depth, lm.n_layers + 1)]
    return [a - b for a, b in zip(after, before, strict=True)]


@torch.no_grad()
def moved(lm: LanguageModel, course: Course, depth: int, pushes: Tensor) -> list[Tensor]:
    """Return the stream at the last position at each depth from `depth` up, under real pushes."""
    hidden = (course.hidden(depth) + pushes).flatten(0, 1)
    found = _run(lm, course, depth, hidden, len(pushes))
    return [_wide(x).unflatten(0, (len(pushes), -1)) for x in found]


@torch.no_grad()
def moved_gaps(
    lm: LanguageModel, tokens: ReadoutTokens, course: Course, depth: int, pushes: Tensor
) -> Tensor:
    """Return the gap under pushes `[copies, rows, seq, d_model]`, float64 `[copies, rows]`."""
    batch = spread(course.batch, len(pushes))
    hidden = (course.hidden(depth) + pushes).flatten(0, 1)
    with _entering(lm, course, depth, hidden):
        logits = lm.forward(batch, logits_to_keep=1)[:, -1].cpu().double()
    return gap_of(logits, tokens).unflatten(0, (len(pushes), -1))


def pulled_back(
    lm: LanguageModel, tokens: ReadoutTokens, batch: Batch, attention: bool = True
) -> list[Tensor]:
    """Return the gap's gradient by the stream at every depth, float32 `[rows, seq, d_model]` each.

    Without `attention` what every attention adds is held as it is: what is left is the path along
    the stream and through the MLPs, which never leaves its position.
    """
    with frozen(lm.model), _entry(lm, traced=True) as streams, Hooks() as hooks:
        for block in lm.sites.blocks:
            hooks.after(block, streams.append)
        if not attention:
            for module in lm.sites.attention_added:
                hooks.after(module, Tensor.detach)
        logits = lm.forward(batch, logits_to_keep=1)[:, -1]
        gaps = gap_of(logits.float(), tokens)
        # The rows of a batch do not see each other: the gradient of the sum is each row's own.
        parts = torch.autograd.grad(gaps.sum(), streams)
    # What a left-padded column holds is no token: no gradient is to count there.
    real = batch.attention_mask[..., None].float().cpu()
    return [part.float().cpu() * real for part in parts]


def _jvp(lm: LanguageModel, course: Course, depth: int, pushes: Tensor) -> list[Tensor]:
    copies = len(pushes)
    hidden = course.hidden(depth).repeat(copies, 1, 1)
    # The fused attention kernels have no forward derivative; the plain one is a few products.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.make_dual(hidden, pushes.flatten(0, 1).to(hidden.dtype))
        found = [forward_ad.unpack_dual(x) for x in _run(lm, course, depth, dual, copies)]
    tangents = [one.tangent for one in found if one.tangent is not None]
    if len(tangents) < len(found):
        raise RuntimeError("the derivative is lost on the way to the last block")
    return [_wide(tangent).unflatten(0, (copies, -1)) for tangent in tangents]


def _run(
    lm: LanguageModel, course: Course, depth: int, hidden: Tensor, copies: int
) -> list[Tensor]:
    """Run the blocks above a depth; the last position of the stream from there up."""
    seen = [hidden[:, -1]]
    last = lm.n_layers - 1

    def keep(layer: int, stream: Tensor) -> None:
        if layer >= depth:
            seen.append(stream[:, -1])
        if layer == last:
            raise Stopped  # nobody reads the logits

    with Hooks() as hooks, _entering(lm, course, depth, hidden):
        for layer, block in enumerate(lm.sites.blocks):
            hooks.after(block, partial(keep, layer))
        try:
            lm.forward(spread(course.batch, copies), logits_to_keep=1)
        except Stopped:
            pass
    return seen


@contextmanager
def _entering(lm: LanguageModel, course: Course, depth: int, hidden: Tensor) -> Iterator[None]:
    """Let `hidden` be the stream at a depth."""
    blocks = list(lm.sites.blocks)
    if depth:
        with replayed(blocks, depth - 1, course.blocks[depth - 1], hidden):
            yield
        return
    with Hooks() as hooks:
        hooks.before(blocks[0], lambda _: hidden)
        yield


@contextmanager
def _entry(lm: LanguageModel, traced: bool = False) -> Iterator[list[Tensor]]:
    """Collect what enters block 0; as a node of the graph if `traced`."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        if traced and not hidden.requires_grad:
            hidden.requires_grad_()  # with frozen weights the graph starts here
        seen.append(hidden)

    with Hooks() as hooks:
        hooks.before(lm.sites.blocks[0], keep)
        yield seen


def _wide(x: Tensor) -> Tensor:
    """On the CPU, half precision in float32."""
    return x.cpu().to(torch.promote_types(x.dtype, torch.float32))
