"""A LoRA trained through the library peft on the answers that trained vectors are trained on.

A reference lever: how well does a low-rank update do that was free to be anything? The adapter is
trained on a copy of the model and handed back as factors, which hooks add to the model itself.

    minimize  -log p(wanted answers) + KEEP * KL(unsteered || adapted) along the model's own answers

Source: Hu et al. 2021 (arXiv 2106.09685) for the adapter; the objective is that of `next_token`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError, extra
from trimtab.levers.conversions.conversion import Levered
from trimtab.methods.registry import Task
from trimtab.methods.training import answer_logits, answer_tokens, log_likelihoods
from trimtab.methods.wanted import Answered, own_answers, wanted_answers
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.passes.adam import adam
from trimtab.passes.calls import counting
from trimtab.results.tables import Table, number
from trimtab.steering.norms import Norms
from trimtab.steering.scope import Scope
from trimtab.steering.weights import KINDS, WeightSteering, Writer, writer_of

KEEP = 0.1


@dataclass(frozen=True, eq=False)
class Lora(Levered):
    """A trained adapter as a lever.

    Attributes:
        lever: the update; m = 1 is the adapter as it was trained.
        rank: of each factor.
        loss_start: cross-entropy of the wanted answers, nats per token, untrained.
        loss: trained; both on all training answers.
        steps: taken.
        calls: rows put through the model, forward passes alone.
        difference: largest logit difference on a training text between the adapter that peft runs
            and the lever.
    """

    lever: WeightSteering
    rank: int
    loss_start: float
    loss: float
    steps: int
    calls: int
    difference: float

    def table(self) -> Table:
        rows = (
            ("rank", str(self.rank)),
            ("matrices", str(len(self.lever.left))),
            ("cross-entropy of the wanted answers", f"{number(self.loss_start, 3)} to {number(self.loss, 3)}"),
            ("steps", str(self.steps)),
            ("model calls", str(self.calls)),
            ("logit difference to peft", number(self.difference, 6)),
        )  # fmt: skip
        return Table("LoRA", ("", ""), rows)


def train_lora(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    sign: int = 1,
    rank: int = 4,
    writers: Sequence[Writer] | None = None,
    steps: int = 40,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    tokens: int = 32,
    seed: int = 0,
) -> Lora:
    """Train a LoRA on the output projections of the train split's wanted answers.

    Args:
        lm: the model; left as it is, a copy in float32 is trained.
        behavior: split here.
        sign: +1 toward, -1 away.
        rank: of every factor.
        writers: `("attention" or "mlp", layer)`; by default every output projection there is.
        steps: of Adam, the rate falling to 0 linearly.
        batch_size: wanted answers a step; half as many kept ones are added.
        learning_rate: of the factors.
        tokens: only so many first tokens of an answer count.
        seed: of the split, the factors and the order.

    Raises:
        TrimtabError: the package peft is missing; no writers; an unusable number; a loss that is not
            finite.
    """
    if min(rank, steps, batch_size, tokens) < 1 or learning_rate <= 0:
        raise TrimtabError(
            asked=f"a LoRA of rank {rank}, {steps} steps of {batch_size} answers",
            found=f"learning_rate={learning_rate}",
            advice="use counts from 1 and a positive rate",
        )
    peft = extra("peft", "peft")
    chosen = tuple(writers) if writers is not None else all_writers(lm)
    with counting(lm) as before:
        task, found = wanted_answers_of(lm, behavior.split(seed).train, sign, tokens)
        shown = task.behavior.toward if sign > 0 else task.behavior.away
        answers, kept = found.encoded, own_answers(task, shown, tokens).encoded
    clone = LanguageModel(copy.deepcopy(lm.model).float(), lm.tokenizer, lm.name)
    adapted = _inject(peft, clone, chosen, rank, seed)
    trained = [p for p in clone.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)

    def drawn(texts: Sequence[Encoded], count: int) -> list[Encoded]:
        order = torch.randperm(len(texts), generator=generator)[:count].tolist()
        return [texts[i] for i in order]

    def gradients(step: int) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(*_answers(clone, drawn(answers, batch_size)))
        if kept:
            some = drawn(kept, max(1, batch_size // 2))
            loss = loss + KEEP * _divergence(clone, adapted, some)
        return torch.autograd.grad(loss, trained)

    with counting(clone) as calls:
        start = _loss(clone, answers)
        adam(trained, gradients, what="a LoRA", steps=steps, learning_rate=learning_rate)
        end = _loss(clone, answers)
    left, right = {}, {}
    for writer, module in adapted.items():
        scale = module.scaling["default"]
        left[writer] = module.lora_B["default"].weight.detach().cpu().float() * scale
        right[writer] = module.lora_A["default"].weight.detach().cpu().float()
    note = {"method": "LoRA", "rank": rank, "steps": steps, "behavior": behavior.name, "sign": sign}
    lever = WeightSteering(left, right, 1.0, "LoRA", note, lm.fingerprint, lm.name or "")
    with torch.no_grad():
        with lever.on(lm):
            hooked, _ = _answers(lm, answers[:1])
        difference = float((hooked - _answers(clone, answers[:1])[0]).abs().max())
    return Lora(lever, rank, start, end, steps, before.rows + calls.rows, difference)


def wanted_answers_of(
    lm: LanguageModel, behavior: Behavior, sign: int, tokens: int = 32
) -> tuple[Task, Answered]:
    """Collect what `find(..., "next_token")` trains on, for every lever that is trained."""
    task = Task(
        lm=lm,
        behavior=behavior,
        site="resid_post",
        layers=tuple(range(lm.n_layers)),
        active=None,
        position="last",
        scope=Scope.parse("all"),
        norms=Norms({}, 0, lm.d_model),
        seed=0,
        progress=None,
    )
    found = wanted_answers(task, sign, tokens)
    return task, found


def all_writers(lm: LanguageModel) -> tuple[Writer, ...]:
    """Return every sublayer that has a single linear output projection.

    Raises:
        TrimtabError: there is none.
    """
    found: list[Writer] = []
    for kind in KINDS:
        for layer in range(lm.n_layers):
            try:
                writer_of(lm, (kind, layer))
            except TrimtabError:  # such as the experts of a mixture
                continue
            found.append((kind, layer))
    if not found:
        raise TrimtabError(
            asked=f"a LoRA of {type(lm.model).__name__}",
            found="no output projection that is a linear layer",
            advice="use a vector",
        )
    return tuple(found)


def _inject(
    peft: Any, lm: LanguageModel, writers: Sequence[Writer], rank: int, seed: int
) -> dict[Writer, Any]:
    """Put peft's layers into the copy, only their factors trainable, and find them again."""
    modules = {writer: writer_of(lm, writer) for writer in writers}
    names = {id(module): name for name, module in lm.model.named_modules()}
    targets = {writer: names[id(module)] for writer, module in modules.items()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets.values()),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, lm.model)
    return {writer: lm.model.get_submodule(name) for writer, name in targets.items()}


def _answers(lm: LanguageModel, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Float32 logits `[tokens, vocab]` before each answer token, and the tokens; one batch."""
    (batch,) = lm.batches(texts, sum(len(t.ids) for t in texts) * len(texts), len(texts))
    return answer_logits(lm, batch, texts)[:2]


def _divergence(
    lm: LanguageModel, adapted: Mapping[Writer, Any], texts: Sequence[Encoded]
) -> Tensor:
    """Mean KL(unsteered || adapted) per token."""
    for module in adapted.values():
        module.enable_adapters(False)
    with torch.no_grad():
        before = _answers(lm, texts)[0].log_softmax(-1)
    for module in adapted.values():
        module.enable_adapters(True)
    after = _answers(lm, texts)[0].log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


def _loss(lm: LanguageModel, texts: Sequence[Encoded]) -> float:
    return float(-log_likelihoods(lm, texts).sum() / answer_tokens(texts).sum())
