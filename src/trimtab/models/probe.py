"""What each decoder block adds to its stream, seen in one tiny forward and checked by numbers.

Names differ between architectures, so names only propose attention and MLP; what becomes of their
outputs is read off the tensors of the probe, and the sums are checked: `resid_mid = resid_pre + c *
attention` and `resid_post = resid_mid + c * mlp`, with c = 1 or the configuration's residual
multiplier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.models.hooking import Hooks, first_tensor, input_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|experts", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language part of a model."""
    return model.config.get_text_config(decoder=True)


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The roles inside one block.

    Attributes:
        attention: The attention module.
        mlp: The MLP or mixture of experts.
        attention_added: The module whose output is added to the stream for the attention (a
            post-norm, say).
        mlp_added: The same for the MLP.
        middle: The module whose input is the stream between the two.
        post_norm: Whether a norm stands between a sublayer and the stream.
        parallel: Whether both sublayers read the same stream.
        values: In the probe: what the two sublayers returned for the stream, and the input of
            `middle`.
    """

    attention: nn.Module
    mlp: nn.Module
    attention_added: nn.Module
    mlp_added: nn.Module
    middle: nn.Module
    post_norm: bool
    parallel: bool
    values: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Probed:
    """What the probe found; `refused` names the kinds of site that the model lacks, and why."""

    trunk: nn.Module
    blocks: nn.ModuleList
    final_norm: nn.Module | None
    parts: list[BlockParts]
    residual_multiplier: float
    refused: dict[str, str]


def probe(model: PreTrainedModel) -> Probed:
    """Run three tokens through a causal language model and leave it exactly as it was.

    Raises:
        TrimtabError: No stack of decoder blocks is found.
    """
    config = text_config(model)
    trunk, blocks = _find_blocks(model, int(config.num_hidden_layers))
    multiplier = float(getattr(config, "residual_multiplier", 1.0) or 1.0)
    trace = _run(model, trunk, blocks)
    _check_chain(trace)
    parts = [_follow(block, trace.of_block[i], trace.entry[i]) for i, block in enumerate(blocks)]
    return Probed(
        trunk, blocks, trace.final_norm, parts, multiplier, _verify(trace, parts, multiplier)
    )


def _unknown(found: str) -> TrimtabError:
    return TrimtabError(
        "the layers of this model",
        found,
        "use a decoder-only language model built from transformer blocks",
    )


def _find_blocks(model: nn.Module, n_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """The stack of decoder blocks and the module that owns it."""
    for owner in model.modules():
        for blocks in owner.children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
                first = dict(blocks[0].named_children()) if n_layers else {}
                if all(any(_is(kind, name) for name in first) for kind in (_ATTENTION, _MLP)):
                    return owner, blocks
    name = type(model).__name__
    raise _unknown(f"no list of {n_layers} blocks with attention and an MLP in {name}")


def _is(kind: re.Pattern[str], name: str) -> bool:
    return bool(kind.search(name)) and not _NORM.search(name) and "dropout" not in name


@dataclass
class _Call:
    """One call of a child of a block during the probe."""

    name: str
    module: nn.Module
    entered: Tensor
    left: Tensor


@dataclass
class _Trace:
    """What the probe saw."""

    of_block: list[list[_Call]]
    entry: list[Tensor]
    exit: list[Tensor]
    final_norm: nn.Module | None = None


def _run(model: PreTrainedModel, trunk: nn.Module, blocks: nn.ModuleList) -> _Trace:
    """Run three tokens and note the tensors that enter and leave each child of each block."""
    trace = _Trace([[] for _ in blocks], [], [])

    def around_block(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        entered, left = input_tensor(args, kwargs), first_tensor(output)
        if entered is None or left is None:
            raise _unknown(f"{type(module).__name__} without hidden states")
        trace.entry.append(entered)
        trace.exit.append(left)

    def watch(
        calls: list[_Call], name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        entered, left = input_tensor(args, kwargs), first_tensor(output)
        if entered is not None and left is not None:
            calls.append(_Call(name, module, entered, left))

    def watch_norm(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if trace.exit and input_tensor(args, kwargs) is trace.exit[-1]:
            trace.final_norm = module

    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    ids = torch.arange(3, device=device)[None] % int(text_config(model).vocab_size)
    training = [module for module in model.modules() if module.training]
    with Hooks() as hooks, torch.no_grad():
        for i, block in enumerate(blocks):
            hooks.calls(block, after=partial(around_block, block))
            for name, child in block.named_children():
                hooks.calls(child, after=partial(watch, trace.of_block[i], name, child))
        for child in trunk.children():
            if child is not blocks:
                hooks.calls(child, after=partial(watch_norm, child))
        try:
            model.eval()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            for module in training:
                module.training = True
    if len(trace.exit) != len(blocks):
        raise _unknown(f"{len(trace.exit)} of {len(blocks)} blocks run, or run more than once")
    return trace


def _follow(block: nn.Module, calls: Sequence[_Call], entry: Tensor) -> BlockParts:
    """Follow the tensors of one block by identity, on from its sublayers and back from its MLP.

    A post-norm or dropout takes the very tensor that the sublayer returned; what is added to the
    stream is the end of that chain. In the other direction, the chain that leads to the MLP starts
    at the middle of the block, or at the block's own entry where both sublayers run side by side.
    """
    by_attention = [call for call in calls if _is(_ATTENTION, call.name)]
    by_mlp = [call for call in calls if _is(_MLP, call.name)]
    if len(by_attention) != 1 or len(by_mlp) != 1:
        names = [call.name for call in calls]
        raise _unknown(
            f"{type(block).__name__} with the parts {names}: not one attention and one MLP"
        )

    def added(start: _Call) -> tuple[_Call, bool]:
        end, normed = start, False
        for call in calls[calls.index(start) + 1 :]:
            if call.entered is end.left:
                normed = normed or bool(_NORM.search(call.name))
                end = call
        return end, normed

    def source(start: _Call) -> _Call:
        first = start
        for call in reversed(calls[: calls.index(start)]):
            if call.left is first.entered:
                first = call
        return first

    attention, mlp = by_attention[0], by_mlp[0]
    attention_end, attention_normed = added(attention)
    mlp_end, mlp_normed = added(mlp)
    middle = source(mlp)
    return BlockParts(
        attention=attention.module,
        mlp=mlp.module,
        attention_added=attention_end.module,
        mlp_added=mlp_end.module,
        middle=middle.module,
        post_norm=attention_normed or mlp_normed,
        parallel=middle.entered is entry or middle is source(attention),
        values=(attention_end.left, mlp_end.left, middle.entered),
    )


def _verify(trace: _Trace, parts: Sequence[BlockParts], multiplier: float) -> dict[str, str]:
    """Check by numbers that blocks add what they are thought to; name the kinds that fail."""
    refused: dict[str, str] = {}
    for i, part in enumerate(parts):
        # On the CPU: the parts of a sharded model may lie on several devices.
        entry, leave, attention, mlp, middle = (
            value.float().cpu() for value in (trace.entry[i], trace.exit[i], *part.values)
        )
        attention, mlp = attention * multiplier, mlp * multiplier
        # Two or three roundings of the stream's own dtype; float32 sums are exact enough here.
        size = torch.stack([x.abs().max() for x in (entry, leave, attention, mlp)]).max()
        allowed = 8 * torch.finfo(trace.exit[i].dtype).eps * size
        # not (a <= b), so that NaN fails
        if not bool((entry + attention + mlp - leave).abs().max() <= allowed):
            reason = f"block {i} does not add its attention and MLP outputs to the stream"
            refused |= dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), reason)
        elif part.parallel:
            reason = "a model whose attention and MLP run in parallel: no stream is between them"
            refused.setdefault("resid_mid", reason)
        elif not bool((entry + attention - middle).abs().max() <= allowed):
            refused.setdefault("resid_mid", f"block {i} changes the stream before its MLP")
    return refused


def _check_chain(trace: _Trace) -> None:
    """The output of a block must be the input of the next."""
    for i, (left, entered) in enumerate(zip(trace.exit, trace.entry[1:], strict=False)):
        if not torch.equal(left.to(entered.device), entered):
            raise _unknown(f"the output of block {i} is not the input of block {i + 1}")
