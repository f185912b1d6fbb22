"""A PEFT adapter: steering as a LoRA with biases, loaded by `PeftModel.from_pretrained`.

A sublayer of a pre-norm block adds r o to the stream, o = W x + b0 its output projection's value.
LoRA makes o + B A x + b of it. What is added to the stream, alpha c, is b = alpha c / r with A and
B zero. Projections r o -> (I - U V^T) r o + s are B = -U, A = V^T W and b = s / r - U V^T b0: with s = 0
and no b0 no bias at all. The same holds of the rows of an embedding, whose LoRA has no bias; there a
constant is B A with A constant. A low-rank update of the output projections is a LoRA as it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import TrimtabError, extra
from trimtab.export.files import not_zero, refusal
from trimtab.models.model import LanguageModel
from trimtab.results.files import staged
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled, WeightSteering, Writer, writer_of
from trimtab.weights.card import front_matter, one_line, steering_section
from trimtab.weights.disk.base import public_name
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.routes.changes import Affine, Changes, changes_of

_FORM = "a PEFT adapter"
_WEIGHTS = "adapter_model.safetensors"
# point of the stream -> the sublayer whose bias adds a constant there.
_WRITERS = {"mid": "attention", "post": "mlp"}
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

    `add` goes into the biases that LoRA brings (`lora_bias`), at `embed` into the embedding. `ablate`
    and `affine` go at `embed`, `attn_out` and `mlp_out`, as LoRA of rank 1 for each direction (one
    more for `affine` at `embed`): at m = 1 the steerings of `trimtab.weights.at_every_writer(vector)` together equal a
    projection at every point of the stream. A model without biases cannot merge an adapter that
    has some; `trimtab bake` writes a checkpoint instead.

    Args:
        lm: the model the vectors were made for; it is only read.
        vector: a vector or low-rank update, or several that would be on together.
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
    rank = max(1, *(update.left.shape[1] for update in updates))
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


def _updates(lm: LanguageModel, levers: Sequence[Scaled]) -> list[_Update]:
    if not levers:
        raise TrimtabError(f"to write {_FORM}", "no steering", "give at least one vector")
    for lever in levers:
        lever.check(lm)
        not_zero(lever, _FORM)
    vectors = [lever for lever in levers if isinstance(lever, VectorSteering)]
    added = [lever for lever in levers if isinstance(lever, WeightSteering)]
    for vector in vectors:
        for edit in vector.edits():
            lm.sites.check(edit.site)
            if lm.sites.post_norm and edit.site.kind != "embed":
                raise refusal(
                    vector,
                    _FORM,
                    f"{type(lm.model).__name__} puts a norm between the output projection and the"
                    " stream, so that what LoRA adds there is rescaled",
                    "bake a checkpoint: `trimtab bake` has an exact route",
                )
    changes = changes_of(vectors, lm.sites.parallel)
    for (number, _), why in changes.refused.items():
        what = vectors[number]
        said = f"{what.operation} at {what.site}, scope {what.scope}: {why.reason}"
        raise refusal(what, _FORM, said, why.advice)
    found = []
    behind = [(_WRITERS[kind], layer) for kind, layer in changes.constants]
    for writer in dict.fromkeys((*changes.maps, *behind, *(w for u in added for w in u.left))):
        if writer[0] == "embed":
            found += _of_embedding(lm, changes.maps[writer])
        else:
            found.append(_of_writer(lm, writer, changes, added))
    embedded = [update.name for update in found if update.embeds]
    biased = [update.name for update in found if bool(update.bias.any())]
    if embedded and biased:
        raise TrimtabError(
            asked=f"to write {_FORM} for {embedded[0]} and {biased[0]}",
            found="a bias for the one, and PEFT has no biases in an adapter with an embedding",
            advice="bake a checkpoint, or leave the embedding out",
        )
    return found


def _of_writer(
    lm: LanguageModel, writer: Writer, changes: Changes, added: Sequence[WeightSteering]
) -> _Update:
    """All that becomes of one output projection; low-rank updates stand before projections."""
    module = writer_of(lm, writer)
    map_ = changes.maps.get(writer) or Affine.identity(lm.d_model)
    point = next(point for point, kind in _WRITERS.items() if kind == writer[0]), writer[1]
    constant = map_.shift + changes.constants.get(point, 0.0)
    weight, own = _weight(module), getattr(module, "bias", None)
    bias = constant / lm.sites.residual_multiplier
    if own is not None:
        bias = bias - map_.left @ (map_.right.T @ own.detach().cpu().double())
    left, right = [-map_.left], [map_.right.T @ weight]
    for lever in added:
        if writer in lever.left:
            b = lever.strength * lever.left[writer].double()
            left.append(b - map_.left @ (map_.right.T @ b))
            right.append(lever.right[writer].double())
    name = next(name for name, m in lm.model.named_modules() if m is module)
    return _update(name, module, left, right, bias)


def _of_embedding(lm: LanguageModel, map_: Affine) -> list[_Update]:
    """A x + b of x = s e + p: e token and p learned position embeddings."""
    tables = [(name, m) for name, m in lm.model.named_modules() if isinstance(m, nn.Embedding)]
    main = next((m for _, m in tables if m is lm.sites.embedding), None)
    if main is None:
        raise TrimtabError(f"to write {_FORM}", "no table of embeddings", "bake a checkpoint")
    scale = layout_of(lm.model.config, main.weight.dtype).embed_scale
    made = []
    for name, module in tables:
        left, right = [-map_.left], [map_.right.T @ module.weight.detach().cpu().double().T]
        # The constant goes once into the sum, so into the token embedding alone.
        if module is main and bool(map_.shift.any()):
            left.append(map_.shift[:, None] / scale)
            right.append(torch.ones(1, len(module.weight), dtype=torch.float64))
        if left[1:] or map_.left.shape[1]:
            made.append(_update(name, module, left, right, torch.zeros(lm.d_model)))
    return made


def _weight(module: nn.Module) -> Tensor:
    """The projection's weight as `[d_model, inner]`, float64."""
    weight = module.get_parameter("weight").detach().cpu().double()
    return weight.T if isinstance(module, Conv1D) else weight


def _update(
    name: str, module: nn.Module, left: list[Tensor], right: list[Tensor], bias: Tensor
) -> _Update:
    parts = (torch.cat(left, dim=1), torch.cat(right), bias)
    return _Update(name, module, *(part.float().contiguous() for part in parts))


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
