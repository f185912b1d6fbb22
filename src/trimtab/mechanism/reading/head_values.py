"""What a push of the stream makes each head write: the steering value vectors.

A head's values are W_V norm(h). With s a summand of the stream h, the share of norm(h) due to s is
g c(s) / rms(c(h)), so attending to one such position writes

    k . u,   u = r . p((g c(s)) W_V W_O),   k = 1 / rms(c(h)) > 0

with g the norm's gain (Gemma's 1 + w), c centering for a LayerNorm, W_V the key-value head that the
head reads, W_O its columns of the output projection, r the residual multiplier. Where a norm stands
after the attention (Gemma 2 and 3, OLMo 2), p is its gain and its size joins k. Biases are no
effect of s. Only k depends on the input: what u says does not. Source: arXiv 2604.08524.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.mechanism.circuits.anatomy import anatomy_of
from trimtab.mechanism.frozen.holding import push_before
from trimtab.models import generation
from trimtab.models.chat import Prompt
from trimtab.models.heads import heads_of
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import NormForm
from trimtab.steering.coverage import Coverage
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering


@torch.no_grad()
def head_values(lm: LanguageModel, layer: int, push: Tensor) -> Tensor:
    """Return u at k = 1, what every head of a layer writes for a push `[..., d_model]` that it reads.

    Float32 `[..., heads, d_model]`, on the CPU.
    """
    found = heads_of(lm)[layer]
    forms = anatomy_of(lm)[layer]
    read = _passed(forms.norm, push.float().cpu())
    values = torch.einsum("...d,kwd->...kw", read, found.value.weights().float().cpu())
    values = values.repeat_interleave(found.n_heads // found.n_kv_heads, dim=-2)
    written = torch.einsum("...hw,hdw->...hd", values, found.out_weights().float().cpu())
    return _passed(forms.attention_post, written) * lm.sites.residual_multiplier


@torch.no_grad()
def head_scales(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], max_new_tokens: int = 16
) -> dict[int, float]:
    """Return the mean k on prompts and their steered answers, for each layer that reads a push.

    The norm's size is averaged over the steered positions, that of a norm after the attention over
    the positions that predict the answer.
    """
    readers = reading_layers(lm, vector)
    sums: dict[tuple[int, str], tuple[float, float]] = {}
    coverage = Coverage(lm, None)

    def size(key: tuple[int, str], form: NormForm, scope: Scope):
        slot = coverage.slot(scope)

        def add(stream: Tensor) -> None:
            values = form.center(stream.float())
            inverse = (values.square().mean(-1, keepdim=True) + form.eps).rsqrt()
            weight = coverage.weight(slot, (torch.float32, stream.device)).expand_as(inverse)
            total, count = sums.get(key, (0.0, 0.0))
            sums[key] = total + float((inverse * weight).sum()), count + float(weight.sum())

        return add

    asked = [lm.encode(prompt) for prompt in prompts]
    with vector.on(lm):
        answers = generation.answer_ids(lm, asked, max_new_tokens)
    encoded = [replace(e, ids=[*e.ids, *ids]) for e, ids in zip(asked, answers, strict=True)]
    with Hooks() as hooks:
        hooks.calls(lm.sites.trunk, before=coverage.prepare)
        for layer in readers:
            forms = anatomy_of(lm)[layer]
            places = (
                ("before", forms.heads.norm, forms.norm, vector.scope),
                ("behind", forms.heads.attention_post, forms.attention_post, _LAST),
            )
            for where, norm, form, scope in places:
                if norm is not None and form is not None:
                    hooks.before(norm, size((layer, where), form, scope))
        with vector.on(lm):
            for batch in lm.batches(encoded):
                lm.forward(batch, logits_to_keep=1)
    scales = dict.fromkeys(readers, 1.0)
    for (layer, _), (total, count) in sums.items():
        scales[layer] *= total / max(count, 1.0)
    return scales


_LAST = Scope("last")


def reading_layers(lm: LanguageModel, vector: VectorSteering) -> list[int]:
    """Return the layers whose attention reads a stream with a push of the steering in it."""
    return [
        layer
        for layer in range(lm.n_layers)
        if bool(push_before(lm, vector, layer, "attention").any())
    ]


def _passed(form: NormForm | None, values: Tensor) -> Tensor:
    """What a norm makes of a summand, at its own size 1."""
    return values if form is None else form.center(values) * form.gain.float()
