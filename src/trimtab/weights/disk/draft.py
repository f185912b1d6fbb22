"""A checkpoint in the making: blocks of tensors that the routes rearrange before a byte is written.

Blocks are a list and their tensors are named by what follows the block's number, so that a block
can be put in anywhere; full names are made when everything is in its place.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from trimtab.errors import TrimtabError
from trimtab.weights.disk.checkpoint import DTYPES, Checkpoint, TensorFact
from trimtab.weights.disk.layout import Layout, expected_tensors, layout_of
from trimtab.weights.disk.sources import TensorSource, Value, Zeros, copied, value_of


@dataclass
class Block:
    """One decoder block: where it comes from, and its tensors by what follows its number.

    Attributes:
        origin: the base model's block whose number it had.
        part: `whole`, or what of the origin is left in it: `attention`, `mlp` or `nothing`.
        tensors: such as `mlp.down_proj.weight`.
        kind: its entry of `layer_types`, if the architecture has such a list.
    """

    origin: int
    part: str
    tensors: dict[str, TensorSource]
    kind: str | None = None


@dataclass
class Draft:
    """What will be written.

    Attributes:
        base: the checkpoint it is made from.
        layout: of the result; conversions change it.
        raw: the config.json of the result.
        blocks: in order.
        outer: tensors outside the blocks, by full name.
        steps: what was done, in words, in order.
        rounding: what was stored less precisely than meant, ||stored - meant|| / ||meant||.
    """

    base: Checkpoint
    layout: Layout
    raw: dict[str, Any]
    blocks: list[Block]
    outer: dict[str, TensorSource]
    steps: list[str] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of new tensors."""
        return self.base.dtype

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the result as transformers understands it."""
        return AutoConfig.for_model(**self.raw)

    def block_of(self, origin: int, part: str) -> Block:
        """Return the block that holds a part (`attention` or `mlp`) of the base's block."""
        return next(b for b in self.blocks if b.origin == origin and b.part in ("whole", part))

    def tensors(self) -> dict[str, TensorSource]:
        """Return every tensor by its full name."""
        named = dict(self.outer)
        for number, block in enumerate(self.blocks):
            prefix = self.layout.block.format(number)
            named |= {prefix + suffix: source for suffix, source in block.tensors.items()}
        return named

    def ensure_bias(self, bias: str) -> None:
        """Set the configuration flag that brings a bias, if one does; biases not there are zero."""
        for flag, names in self.layout.switches:
            if bias not in names:
                continue
            self.raw[flag] = True
            for block in self.blocks:
                for name in names:
                    if name not in block.tensors:
                        weight = block.tensors[name.removesuffix("bias") + "weight"]
                        block.tensors[name] = Zeros(weight.dtype, (weight.shape[0],))

    def shift_bias(self, block: Block, name: str, constant: Tensor, what: str) -> None:
        """Add a float64 constant to a bias, rounded once to its dtype."""
        old = block.tensors[name]
        before = value_of(old).double()
        meant = before + constant
        block.tensors[name] = self.value(meant, old, what, constant)

    def value(self, meant: Tensor, old: TensorSource, what: str, constant: Tensor | None = None) -> Value:
        """Return a small tensor in the place of `old`; its rounding is noted.

        Raises:
            TrimtabError: a value that the dtype cannot hold.
        """
        stored = meant.to(DTYPES[old.dtype])
        if not bool(stored.isfinite().all()):
            raise TrimtabError(
                asked=f"to store {what} in {str(stored.dtype).removeprefix('torch.')}",
                found="values too large for it",
                advice="lower the strength, or bake into a float32 or bfloat16 copy of the model",
            )
        scale = meant if constant is None else constant
        self.note(what, stored.double() - meant, scale)
        return Value(stored, old.home)

    def note(self, what: str, error: Tensor, scale: Tensor) -> None:
        """Remember a rounding error, as a share of the norm of what was meant."""
        share = float(error.norm() / scale.norm().clamp_min(1e-300))
        self.rounding[what] = max(share, self.rounding.get(what, 0.0))

    def untie(self) -> None:
        """Give the unembedding the embedding's values, as a tensor of its own."""
        if self.config.tie_word_embeddings:
            self.raw["tie_word_embeddings"] = False
            self.outer[self.layout.head] = self.outer[self.layout.embedding]
            self.steps.append("untie the unembedding from the embedding")

    def fork(self) -> Draft:
        """Return a copy that can be changed without changing this one."""
        blocks = [replace(block, tensors=dict(block.tensors)) for block in self.blocks]
        forked = replace(self, raw=copy.deepcopy(self.raw), blocks=blocks, outer=dict(self.outer))
        forked.steps, forked.rounding = list(self.steps), dict(self.rounding)
        return forked


def start_draft(base: Checkpoint) -> Draft:
    """Take a checkpoint apart.

    Raises:
        TrimtabError: an architecture without routes, quantized weights, code of its own, or tensors
            that are not its architecture's.
    """
    layout = layout_of(base.config, base.dtype)
    _refuse_special(base, layout)
    raw = copy.deepcopy(base.raw)
    raw["architectures"] = [layout.architecture]
    kinds = getattr(base.config, "layer_types", None)
    count = int(base.config.num_hidden_layers)
    blocks = [Block(n, "whole", {}, kinds[n] if kinds else None) for n in range(count)]
    outer: dict[str, TensorSource] = {}
    first, _, rest = layout.block.partition("{}")
    pattern = re.compile(re.escape(first) + r"(\d+)" + re.escape(rest) + "(.+)")
    _refuse_misfits(base, layout)
    for name, fact in _renamed(base, layout).items():
        match = pattern.fullmatch(name)
        if match and int(match[1]) < count:
            blocks[int(match[1])].tensors[match[2]] = copied(fact)
        else:
            outer[name] = copied(fact)
    return Draft(base, layout, raw, blocks, outer)


def stray_tensors(base: Checkpoint, layout: Layout) -> tuple[list[str], list[str], list[str]]:
    """Return the names that the architecture does not know, those it lacks, and wrong shapes.

    What is not known is dropped on loading, with no more than a line in the log.
    """
    expected = expected_tensors(base.config)
    found = {name: fact.shape for name, fact in _renamed(base, layout).items()}
    optional = {layout.head} if base.config.tie_word_embeddings else set()
    stray = sorted(found.keys() - expected.keys())
    missing = sorted(expected.keys() - found.keys() - optional)
    wrong = sorted(n for n in found.keys() & expected.keys() if found[n] != expected[n])
    return stray, missing, wrong


def _refuse_misfits(base: Checkpoint, layout: Layout) -> None:
    stray, missing, wrong = stray_tensors(base, layout)
    if stray or missing or wrong:
        kinds = (("that it does not know", stray), ("missing", missing), ("of other shapes", wrong))
        said = "; ".join(f"tensors {what}: {names[:3]}" for what, names in kinds if names)
        raise TrimtabError(
            asked=f"to bake into the {layout.architecture} in {base.folder.name}",
            found=said,
            advice="merge or remove adapters and other additions first: loading drops such tensors",
        )


def _renamed(base: Checkpoint, layout: Layout) -> dict[str, TensorFact]:
    """Old GPT-2 files leave out the prefix, and hold masks that are no weights."""
    if layout.model_type != "gpt2":
        return dict(base.tensors)
    mask = re.compile(r".*\.attn\.(bias|masked_bias)")
    kept = {name: fact for name, fact in base.tensors.items() if not mask.fullmatch(name)}
    if any(name.startswith("transformer.") for name in kept):
        return kept
    return {n if n == layout.head else f"transformer.{n}": fact for n, fact in kept.items()}


def _refuse_special(base: Checkpoint, layout: Layout) -> None:
    found, advice = "", "bake into the unquantized model and quantize the result"
    odd = sorted({f.dtype for f in base.tensors.values()} - DTYPES.keys())
    if base.raw.get("quantization_config") is not None:
        method = dict(base.raw["quantization_config"]).get("quant_method", "an unnamed method")
        found = f"quantized weights ({method})"
    elif odd:
        found = f"tensors of the types {', '.join(odd)}"
    elif base.raw.get("auto_map"):
        found, advice = "a model with code of its own", "steer with the hook: `with vector.on(lm):`"
    if found:
        raise TrimtabError(f"to bake into architecture {layout.architecture}", found, advice)


def finish(draft: Draft) -> None:
    """Bring the configuration in line with the blocks."""
    draft.raw[draft.layout.depth_key] = len(draft.blocks)
    kinds = [block.kind for block in draft.blocks]
    if all(kind is not None for kind in kinds) and kinds:
        draft.raw["layer_types"] = kinds
    windows = draft.raw.get("max_window_layers")
    if isinstance(windows, int):
        origins = [block.origin for block in draft.blocks]
        added = [o for n, o in enumerate(origins) if o in origins[:n] and o < windows]
        draft.raw["max_window_layers"] = windows + len(added)
