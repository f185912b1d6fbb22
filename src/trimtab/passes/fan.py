"""One vector at many strengths: what no strength changes runs once, the rest in common batches.

Three things are shared (spec/strength.md, section 4). The blocks below the first steered one give
the same at every strength: they run once per prompt, and their output is handed to every strength.
The tokens before the first steered one have the same keys and values at every strength. And what
all prompts of a batch begin with (a chat template's head) runs once per strength. Of the last block
only the positions that are read run to the end; the others are there for their keys.

The model's own forward does the work, with the hooks of `vector.on`. At the first use on a model
the result is compared with the plain steered forward; where it differs, or the model does not take
part, every strength runs by itself and `Fan.plan` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.models.replay import KeptCache
from trimtab.passes.grouping import Costs, Item, groups
from trimtab.passes.sharing import Shared, call, first_steered, shared_depth, spread
from trimtab.steering.vector import VectorSteering

# One float32 tensor of logits holds at most this many numbers (256 MiB), whatever the vocabulary.
LOGITS_PER_BATCH = 2**26
# What a call of the model costs by itself, in tokens: a processor is busy with few of them.
CALL_TOKENS = {"cpu": 96}
CALL_TOKENS_ELSEWHERE = 4096
# Largest difference from the plain forward, relative to the largest logit, in float32.
TOLERANCE = 1e-4
# What a model says that does not take part; what the user did wrong is a TrimtabError.
_REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# Why a model runs plainly, "" where it need not; forgotten with the model.
_VERDICTS: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Part:
    """Logits of some of the prompts at some of the strengths.

    Attributes:
        strengths: Places in the strengths asked for.
        prompts: Places in the fan's prompts.
        logits: Of the last positions, float32 `[strengths, prompts, kept, vocab]`.
        unsteered: The same without the vector `[prompts, kept, vocab]`, where asked for.
    """

    strengths: tuple[int, ...]
    prompts: tuple[int, ...]
    logits: Tensor
    unsteered: Tensor | None


@dataclass(frozen=True, eq=False)
class State:
    """Rows that have been read and can be continued token by token.

    Attributes:
        strengths: Per row, the place in the strengths asked for.
        prompts: Per row, the place in the fan's prompts.
        batch: The rows' prompts.
        cache: Their keys and values.
        logits: Of the next token `[rows, vocab]`.
    """

    strengths: tuple[int, ...]
    prompts: tuple[int, ...]
    batch: Batch
    cache: KeptCache
    logits: Tensor


class Fan:
    """Prompts at many strengths of one vector.

    Attributes:
        reason: Why every strength runs by itself; empty where it need not.
    """

    def __init__(
        self,
        lm: LanguageModel,
        vector: VectorSteering,
        encoded: Sequence[Encoded],
        counts: Sequence[int] | None = None,
        *,
        max_tokens: int = 8192,
    ) -> None:
        """Plan; nothing is run yet.

        Args:
            lm: The model.
            vector: What is scaled; its own strength does not matter.
            encoded: What `lm.encode` returned, with completions as well.
            counts: Positions at the end of each prompt that are read; 1 by default.
            max_tokens: Most tokens of one call of the model, all strengths together.

        Raises:
            TrimtabError: No prompts, a count out of range, a vector of another model, or a scope
                that a prompt has no tokens for.
        """
        vector.check(lm)
        self.lm, self.vector, self.encoded = lm, vector, list(encoded)
        self.counts = [1] * len(self.encoded) if counts is None else list(counts)
        self.max_tokens, self.reason = max_tokens, ""
        if not self.encoded or len(self.counts) != len(self.encoded):
            raise TrimtabError(
                "many strengths of one vector",
                f"{len(self.encoded)} prompts and {len(self.counts)} counts of positions",
                "give at least one prompt, and one count for each",
            )
        for item, count in zip(self.encoded, self.counts, strict=True):
            if not 1 <= count <= len(item.ids):
                raise TrimtabError(
                    f"the last {count} positions",
                    f"a prompt of {len(item.ids)} tokens",
                    "read at least one position and at most all",
                )
            lm.check_length(len(item.ids))
        self._items = [
            Item(tuple(item.ids), count, first_steered(vector, item))
            for item, count in zip(self.encoded, self.counts, strict=True)
        ]

    @property
    def plan(self) -> str:
        """What is shared; or that nothing is, and why."""
        if self.reason:
            return f"every strength by itself: {self.reason}"
        depth, layers = shared_depth(self.vector), self.lm.n_layers
        blocks = f"blocks 0 to {depth} of {layers}" if depth >= 0 else "no block"
        before = sum(item.first for item in self._items)
        tokens = sum(len(item.ids) for item in self._items)
        return (
            f"once for all strengths: {blocks}, and {before} of {tokens} tokens, "
            f"those before the first that scope {self.vector.scope} steers"
        )

    @torch.no_grad()
    def next_logits(self, strengths: Sequence[float]) -> Tensor:
        """Logits at each prompt's last position, float32 `[strengths, prompts, vocab]` on the CPU.

        Equal to `lm.next_logits` inside `vector.at(m).on(lm)`, strength by strength.
        """
        result = torch.empty(0)
        for part in self.parts(strengths):
            if not result.numel():
                shape = (len(strengths), len(self.encoded), part.logits.shape[-1])
                result = torch.empty(shape)
            places = torch.tensor(part.strengths)[:, None], torch.tensor(part.prompts)
            result[places] = part.logits[:, :, -1].cpu()
        return result

    @torch.no_grad()
    def parts(self, strengths: Sequence[float], *, unsteered: bool = False) -> Iterator[Part]:
        """Logits at the last positions, some prompts and strengths at a time.

        A part keeps as many positions as the greatest count of its prompts; they end in the prompt's
        last one.

        Args:
            strengths: Multipliers m of any sign.
            unsteered: Give the logits without the vector as well.

        Raises:
            TrimtabError: No strengths, or as `vector.on` does.
        """
        if not self.shares(strengths):
            yield from self._plain(strengths, unsteered)
            return
        for shared, order, places in self._calls(strengths, unsteered):
            logits, _ = shared.steer([strengths[i] for i in places])
            logits = logits.unflatten(0, (len(places), len(order)))
            yield Part(places, order, logits, shared.logits if unsteered else None)

    @torch.no_grad()
    def states(self, strengths: Sequence[float]) -> Iterator[State]:
        """Read the prompts at every strength, to be continued; only where `shares` allows it.

        Raises:
            TrimtabError: As `parts` does.
        """
        for shared, order, places in self._calls(strengths, False):
            logits, cache = shared.steer([strengths[i] for i in places], whole=True)
            yield State(
                tuple(place for place in places for _ in order),
                order * len(places),
                spread(shared.batch, len(places)),
                cache,
                logits[:, -1],
            )

    def shares(self, strengths: Sequence[float]) -> bool:
        """Whether the model takes part: at its first use two prompts are compared, see `reason`.

        Raises:
            TrimtabError: No strengths, or one that is not finite.
        """
        if not strengths or not all(map(math.isfinite, strengths)):
            raise TrimtabError(
                "many strengths of one vector",
                f"the strengths {list(strengths)}",
                "give at least one, all of them finite",
            )
        known = _VERDICTS.setdefault(self.lm.model, {})
        vector = self.vector
        kind = (shared_depth(vector), vector.site, vector.operation, vector.scope.name)
        if kind not in known:
            known[kind] = _difference(self, next((m for m in strengths if m), 1.0))
        self.reason = known[kind]
        return not self.reason

    def _calls(
        self, strengths: Sequence[float], unsteered: bool
    ) -> Iterator[tuple[Shared, tuple[int, ...], tuple[int, ...]]]:
        """Groups of prompts, read unsteered, with the places of strengths that fit in one call."""
        vocabulary = int(text_config(self.lm.model).vocab_size)
        call_tokens = CALL_TOKENS.get(self.lm.device.type, CALL_TOKENS_ELSEWHERE)
        reads = LOGITS_PER_BATCH // vocabulary
        costs = Costs(len(strengths), self.max_tokens, reads, call_tokens)
        for prompts in groups(self._items, costs):
            keep = max(self.counts[i] for i in prompts)
            chosen = [self.encoded[i] for i in prompts]
            shared = Shared.of(self.lm, self.vector, chosen, keep, call_tokens)
            shared.run(unsteered)
            order = tuple(prompts[row] for row in shared.batch.rows.tolist())
            each = max(1, costs.rows(shared.width, keep) // len(prompts))
            for start in range(0, len(strengths), each):
                yield shared, order, tuple(range(start, min(start + each, len(strengths))))

    def _plain(self, strengths: Sequence[float], unsteered: bool) -> Iterator[Part]:
        """Every strength by itself."""
        vocabulary = int(text_config(self.lm.model).vocab_size)
        rows = max(1, LOGITS_PER_BATCH // vocabulary // max(self.counts))
        for batch in self.lm.batches(self.encoded, self.max_tokens, min(128, rows)):
            order = tuple(batch.rows.tolist())
            keep = max(self.counts[i] for i in order)
            own = self.lm.forward(batch, logits_to_keep=keep).float() if unsteered else None
            for place, strength in enumerate(strengths):
                with self.vector.at(strength).on(self.lm):
                    logits = self.lm.forward(batch, logits_to_keep=keep).float()
                yield Part((place,), order, logits[None], own)


@torch.no_grad()
def _difference(fan: Fan, strength: float) -> str:
    """Compare two prompts at two strengths with the plain forward; "" where they are equal."""
    lm, vector = fan.lm, fan.vector
    by_length = sorted(fan.encoded, key=lambda item: len(item.ids))
    few = Fan(lm, vector, [by_length[0], by_length[-1]], max_tokens=fan.max_tokens)
    strengths = [0.0, strength]
    try:
        pairs = list(_next_two(few, strengths))
    except _REFUSALS as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"the model does not take part ({type(error).__name__}: {reason})"
    # In half precision two passes of another shape differ by some roundings.
    allowed = max(TOLERANCE, 8 * torch.finfo(lm.model.dtype).eps)
    for mine, plain in pairs:
        size = plain[plain.isfinite()].abs().max() if bool(plain.isfinite().any()) else 1.0
        if not torch.allclose(mine, plain, rtol=0, atol=float(allowed * size), equal_nan=True):
            worst = (mine - plain).abs().nan_to_num(math.inf).max()
            return f"a shared pass differs from a plain one by {float(worst):.1e} in the logits"
    return ""


def _next_two(fan: Fan, strengths: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the next token and of the one after it: from states, and plain."""
    for state in fan.states(strengths):
        rows = [strengths[i] for i in state.strengths]
        encoded = [fan.encoded[i] for i in state.prompts]
        tokens = state.logits.argmax(-1)
        with fan.vector.on(fan.lm, rows):
            mask = torch.nn.functional.pad(state.batch.attention_mask, (0, 1), value=1)
            after = call(fan.lm, state.batch, tokens[:, None], mask, state.cache, 1)
        assert after is not None  # only a cache that is told to stop gives none
        for row, (strength, item) in enumerate(zip(rows, encoded, strict=True)):
            longer = replace(item, ids=[*item.ids, int(tokens[row])])
            (batch,) = fan.lm.batches([longer])
            with fan.vector.at(strength).on(fan.lm):
                plain = fan.lm.forward(batch, logits_to_keep=2)[0].float()
            yield torch.stack([state.logits[row], after[row, -1]]).cpu(), plain.cpu()
