"""A PEFT adapter: steering as a LoRA with biases, loaded by `PeftModel.from_pretrained`.

A sublayer of a pre-norm block adds r o to the stream, o = W x + b0 its output projection's value.
LoRA makes o + B A x + b of it. What is added to the stream, alpha c, is b = alpha c / r with A and
B zero. A projection r o -> r o - m ((r o).c - t) c is B = -m c, A = c^T W and
b = -m (c.b0 - t / r) c: with t = 0 and no b0 no bias at all. The same holds of the rows of an
embedding, whose LoRA has no bias; there a constant is B A with A constant. A low-rank update of the
output projections is a LoRA as it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import TrimtabError, extra
from trimtab.export.files import not_zero, refusal
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.results.files import staged
from trimtab.steering.hooks import Edit
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled, WeightSteering, writer_of
from trimtab.weights.card import front_matter, one_line, steering_section
from trimtab.weights.disk.base import public_name
from trimtab.weights.disk.layout import layout_of

_FORM = "a PEFT adapter"
_WEIGHTS = "adapter_model.safetensors"
_BY_ATTENTION = ("attn_out", "resid_mid")
_BY_MLP = ("mlp_out", "resid_post")
_LOAD = """## How to load
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")
```
`with model.disable_adapter():` is the base model, unsteered.
"""


@dataclass(frozen=True, eq=False)
class _Update:
    """What LoRA adds to one module: `left` [d, k], `right` [k, n], `bias` [d], all float32."""

    name: str
    module: nn.Module
    left: Tensor
    right: Tensor
    bias: Tensor

    @property
    def embeds(self) -> bool:
        return isinstance(self.module, nn.Embedding)


def write_peft(
    lm: LanguageModel,
    vector: Scaled | Sequence[Scaled],
    out: str | os.PathLike[str],
) -> Path:
    """Write an adapter that steers the model when PEFT loads it.

    `add` goes at `resid_post`, `mlp_out`, `resid_mid` and `attn_out`, into the biases that LoRA
    brings (`lora_bias`). `ablate` and `affine` go at `embed`, `attn_out` and `mlp_out`, as rank-1
    LoRA: at m = 1 the steerings of `trimtab.weights.at_every_writer(vector)` together equal a
    projection at every point of the stream. A model without biases cannot merge an adapter that
    has some; `trimtab bake` writes a checkpoint instead.

    Args:
        lm: the model the vectors were made for; it is only read.
        vector: a vector or low-rank update, or several that would be on together; each module at
            most once.
        out: folder to create; it appears whole or not at all.

    Returns:
        The folder, with `adapter_config.json`, `adapter_model.safetensors` and a card.

    Raises:
        TrimtabError: a scope other than `all`; a post-norm block, a mixture of experts or another
            module that LoRA cannot reach; a bias that an embedding would need; another model's
            vector; the package peft is missing.
    """
    vectors = [vector] if isinstance(vector, Scaled) else list(vector)
    updates = _updates(lm, vectors)
    peft = extra("peft", "peft")
    has_bias = any(bool(update.bias.any()) for update in updates)
    rank = max(update.left.shape[1] for update in updates)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,  # a factor of 1
        lora_dropout=0.0,
        lora_bias=has_bias,
        bias="none",
        target_modules=[update.name for update in updates],
        fan_in_fan_out=any(isinstance(update.module, Conv1D) for update in updates),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=public_name(lm.name or ""),
    )
    with staged(Path(out)) as building:
        config.save_pretrained(building)
        _sorted_targets(building / "adapter_config.json")
        save_file(_tensors(updates, rank, has_bias), building / _WEIGHTS, {"format": "pt"})
        card = _card(lm, vectors, [update.name for update in updates], has_bias)
        (building / "README.md").write_text(card, encoding="utf-8")
    return Path(out)


def _updates(lm: LanguageModel, vectors: Sequence[Scaled]) -> list[_Update]:
    found: dict[str, _Update] = {}
    for vector in vectors:
        vector.check(lm)
        not_zero(vector, _FORM)
        if isinstance(vector, WeightSteering):
            for update in _of_weights(lm, vector):
                found[update.name] = _joined(vector, found.get(update.name), update)
            continue
        if str(vector.scope) != "all":
            raise refusal(
                vector,
                _FORM,
                f"scope {vector.scope}; weights act on every token alike",
                "steer with the hook, or measure the vector again with scope all",
            )
        for edit in vector.edits():
            lm.sites.check(edit.site)
            for update in _of_edit(lm, vector, edit):
                found[update.name] = _joined(vector, found.get(update.name), update)
    if not found:
        raise TrimtabError(f"to write {_FORM}", "no steering", "give at least one vector")
    embedded = [update.name for update in found.values() if update.embeds]
    biased = [update.name for update in found.values() if bool(update.bias.any())]
    if embedded and biased:
        raise TrimtabError(
            asked=f"to write {_FORM} for {embedded[0]} and {biased[0]}",
            found="a bias for the one, and PEFT has no biases in an adapter with an embedding",
            advice="bake a checkpoint, or leave the embedding out",
        )
    return list(found.values())


def _of_weights(lm: LanguageModel, lever: WeightSteering) -> Iterator[_Update]:
    """The updates that are a low-rank update, at its strength."""
    for writer, left in lever.left.items():
        module = writer_of(lm, writer)
        parts = (lever.strength * left.double(), lever.right[writer], torch.zeros(lm.d_model))
        yield _update(_name(lm, module), module, *parts)


def _name(lm: LanguageModel, module: nn.Module) -> str:
    return next(name for name, m in lm.model.named_modules() if m is module)


def _of_edit(lm: LanguageModel, vector: VectorSteering, edit: Edit) -> list[_Update]:
    """The updates that are one edit of the stream."""
    if edit.site.kind == "embed":
        return _of_embedding(lm, vector, edit)
    name, module = _writer(lm, vector, edit.site)
    r, c = lm.sites.residual_multiplier, edit.direction.double()
    weight, own = _weight(module), getattr(module, "bias", None)
    zero = torch.zeros(lm.d_model, dtype=torch.float64)
    if edit.operation == "add":
        empty = torch.zeros(weight.shape[1])
        return [_update(name, module, zero, empty, c * (edit.amount / r))]
    if edit.site.kind in ("resid_mid", "resid_post"):
        raise refusal(
            vector,
            _FORM,
            f"{edit.operation} at {edit.site}, where earlier layers' writing is projected too",
            "use trimtab.weights.at_every_writer(vector), or the sites attn_out and mlp_out",
        )
    b0 = zero if own is None else own.detach().cpu().double()
    target = edit.target if edit.operation == "affine" else 0.0
    shift = -edit.amount * (c @ b0 - target / r)
    return [_update(name, module, -edit.amount * c, c @ weight, shift * c)]


def _of_embedding(lm: LanguageModel, vector: VectorSteering, edit: Edit) -> list[_Update]:
    """A projection, or a constant, of s e + p: e token and p learned position embeddings."""
    tables = [(name, m) for name, m in lm.model.named_modules() if isinstance(m, nn.Embedding)]
    main = next((pair for pair in tables if pair[1] is lm.sites.embedding), None)
    if main is None:
        raise refusal(vector, _FORM, f"no table of embeddings at {edit.site}", "bake a checkpoint")
    scale = layout_of(lm.model.config, main[1].weight.dtype).embed_scale
    c = edit.direction.double()
    made = []
    for name, module in tables:
        rows, first = module.weight.detach().cpu().double(), module is main[1]
        # The constant goes once into the sum, so into the token embedding alone.
        if edit.operation == "add":
            if first:
                right = torch.full((len(rows),), edit.amount / scale, dtype=torch.float64)
                made.append(_update(name, module, c, right, torch.zeros_like(c)))
            continue
        target = edit.target / scale if first and edit.operation == "affine" else 0.0
        made.append(_update(name, module, -edit.amount * c, rows @ c - target, torch.zeros_like(c)))
    return made


def _writer(lm: LanguageModel, vector: VectorSteering, site: Site) -> tuple[str, nn.Module]:
    """The output projection that LoRA changes for a site, and its name."""
    if site.kind not in (*_BY_ATTENTION, *_BY_MLP):
        raise refusal(
            vector, _FORM, f"site {site}", f"use embed, {', '.join(_BY_ATTENTION + _BY_MLP)}"
        )
    if lm.sites.post_norm:
        raise refusal(
            vector,
            _FORM,
            f"{type(lm.model).__name__} puts a norm between the output projection and the stream, so that"
            " what LoRA adds there is rescaled",
            "bake a checkpoint: `trimtab bake` has an exact route",
        )
    module = writer_of(lm, ("attention" if site.kind in _BY_ATTENTION else "mlp", site.layer))
    return _name(lm, module), module


def _weight(module: nn.Module) -> Tensor:
    """The projection's weight as `[d_model, inner]`, float64."""
    weight = module.get_parameter("weight").detach().cpu().double()
    return weight.T if isinstance(module, Conv1D) else weight


def _update(name: str, module: nn.Module, left: Tensor, right: Tensor, bias: Tensor) -> _Update:
    parts = (left.reshape(len(left), -1), right.reshape(-1, right.shape[-1]), bias)
    return _Update(name, module, *(part.float().contiguous() for part in parts))


def _joined(vector: Scaled, old: _Update | None, new: _Update) -> _Update:
    """Constants of one module add up; projections do not."""
    if old is None:
        return new
    if bool(old.left.any()) or bool(new.left.any()):
        raise refusal(
            vector, _FORM, f"a second projection or update at {new.name}", "bake a checkpoint"
        )
    return _Update(new.name, new.module, new.left, new.right, old.bias + new.bias)


def _tensors(updates: Sequence[_Update], rank: int, has_bias: bool) -> dict[str, Tensor]:
    """The adapter's tensors by the names PEFT gives them, all of one rank."""
    found: dict[str, Tensor] = {}
    for update in updates:
        spare = rank - update.left.shape[1]
        left = nn.functional.pad(update.left, (0, spare))
        right = nn.functional.pad(update.right, (0, 0, 0, spare))
        stem = f"base_model.model.{update.name}."
        if update.embeds:
            found[f"{stem}lora_embedding_A"] = right
            found[f"{stem}lora_embedding_B"] = left
            continue
        found[f"{stem}lora_A.weight"] = right
        found[f"{stem}lora_B.weight"] = left
        if has_bias:
            found[f"{stem}lora_B.bias"] = update.bias
    return found


def _sorted_targets(path: Path) -> None:
    """PEFT keeps the modules in a set; in order, equal adapters are equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(
    lm: LanguageModel, vectors: Sequence[Scaled], modules: Sequence[str], has_bias: bool
) -> str:
    """The README.md: what the adapter does, how hard, how to load it."""
    base = public_name(lm.name or "a model without a name")
    limits = (
        "- It acts on every token, and no prompt switches it off.\n"
        "- What it does to the behavior, and what else it changes, was not measured by the"
        " export.\n"
    )
    if has_bias:
        limits += (
            "- It has biases: a base model without them cannot merge it (`trimtab bake` can).\n"
        )
    return "\n".join(
        (
            front_matter("peft", base),
            f"# {one_line(base)}, a steering adapter\n",
            f"Fingerprint of the base: {lm.fingerprint}. Modules: {', '.join(modules)}.\n",
            *(steering_section(vector) for vector in vectors),
            _LOAD,
            f"## Limits\n\n{limits}",
        )
    )
