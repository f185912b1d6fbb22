"""Baking: write the steering into a checkpoint, reload it, and keep it only if it is equal."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from trimtab.chat import Prompt
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering
from trimtab.strength.norms import NEUTRAL_PROMPTS
from trimtab.tables import Printable, Table
from trimtab.weights.bias import check_supported, rounding, with_bias
from trimtab.weights.card import model_card

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class BakeReport(Printable):
    """What was written and how equal it is to the hooked model after a real reload.

    The differences are None when verification was switched off.

    Attributes:
        route: how the steering was made a weight; `bias`.
        path: folder of the checkpoint.
        max_logit_difference: largest |hooked - reloaded| over all logits of the check prompts.
        equal_text: whether the greedy answers are the same.
        unexpected_keys: keys of the checkpoint that the reload did not know; always empty.
        missing_keys: keys that the reload did not find; always empty.
        tolerance: what `max_logit_difference` was held against.
        steering_effect: largest |hooked - unsteered| over the same logits, for scale.
        bias_rounding: largest error of the stored bias over the largest entry of alpha c.
        dtype: of the checkpoint.
    """

    route: str
    path: Path
    max_logit_difference: float | None
    equal_text: bool | None
    unexpected_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    tolerance: float | None = None
    steering_effect: float | None = None
    bias_rounding: float = 0.0
    dtype: str = "float32"

    def table(self) -> Table:
        """Return one line per fact."""
        facts = (
            ("route", self.route),
            ("folder", str(self.path)),
            ("largest logit difference to the hook", _figure(self.max_logit_difference)),
            ("allowed", _figure(self.tolerance)),
            ("largest effect of the steering on a logit", _figure(self.steering_effect)),
            ("greedy text equal", {None: "not checked", True: "yes", False: "no"}[self.equal_text]),
            (f"rounding of the bias to {self.dtype}", _figure(self.bias_rounding)),
        )
        return Table("baked checkpoint", ("what", "found"), facts)


def bake(
    lm: LanguageModel,
    vector: VectorSteering,
    out: str | os.PathLike[str],
    *,
    verify: bool = True,
    prompts: Sequence[Prompt] = NEUTRAL_PROMPTS[:4],
) -> BakeReport:
    """Write a checkpoint of `lm` that steers itself; `lm` is left as it is.

    The folder holds weights, config, generation config, tokenizer with its chat template and a
    model card. It is built beside `out` and renamed there at the end, so `out` is complete or
    absent. Verification reloads it, compares every tensor bit by bit with what was meant, and
    compares logits and greedy text with the hooked model.

    Args:
        lm: the model the vector was made for.
        vector: the steering at the strength to bake.
        out: folder to create; an existing empty one is taken.
        verify: False skips the reload, for models that do not fit into memory twice.
        prompts: what the reloaded model is compared on.

    Raises:
        TrimtabError: another model, architecture, scope, operation or site; a folder with something
            in it; a checkpoint that does not reload as what it was meant to be.
    """
    vector.check(lm)
    check_supported(lm, vector)
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrimtabError(
            asked=f"to write a checkpoint to {target}",
            found="something there already",
            advice="name a folder that does not exist yet",
        )
    whole = target.absolute()
    building = whole.with_name(f".{whole.name}.{secrets.token_hex(4)}.partial")
    try:
        building.mkdir(parents=True)
        baked = with_bias(lm, vector)
        _save(lm, baked, building)
        report = BakeReport(
            route="bias",
            path=target,
            max_logit_difference=None,
            equal_text=None,
            bias_rounding=rounding(vector, baked.dtype),
            dtype=str(baked.dtype).removeprefix("torch."),
        )
        if verify:
            report = _verified(lm, vector, building, baked.state_dict(), prompts, report)
        (building / "README.md").write_text(model_card(lm, vector, report), encoding="utf-8")
        if target.exists():
            target.rmdir()  # empty, as checked; a rename onto a folder fails on some systems
        building.rename(target)
    except OSError as error:
        raise TrimtabError(
            asked=f"to write a checkpoint to {target}",
            found=str(error),
            advice="see what stands in the way; nothing was left there",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return report


def _save(lm: LanguageModel, baked: LlamaForCausalLM, folder: Path) -> None:
    try:
        baked.save_pretrained(folder)
    except ValueError as error:  # transformers on a generation config that contradicts itself
        raise TrimtabError(
            asked=f"to save {lm.name or 'the model'} with its generation config",
            found=str(error),
            advice="correct lm.model.generation_config",
        ) from error
    lm.tokenizer.save_pretrained(folder)


def _verified(
    lm: LanguageModel,
    vector: VectorSteering,
    folder: Path,
    meant: dict[str, Tensor],
    prompts: Sequence[Prompt],
    report: BakeReport,
) -> BakeReport:
    reloaded = _reload(lm, folder, report.path)
    _compare_tensors(reloaded.model.state_dict(), meant, report.path)
    torch.nn.Module.to(reloaded.model, lm.device)
    if any(reloaded.encode(p).ids != lm.encode(p).ids for p in prompts):
        raise _unequal(report.path, "a tokenizer that encodes the check prompts differently")

    plain = _logits(lm, prompts)
    answers = reloaded.generate(list(prompts), max_new_tokens=ANSWER_TOKENS)
    baked = _logits(reloaded, prompts)
    with vector.on(lm):
        hooked = _logits(lm, prompts)
        hooked_answers = lm.generate(list(prompts), max_new_tokens=ANSWER_TOKENS)
    difference = float((baked - hooked).abs().max())
    allowed = _tolerance(lm.model.dtype) * max(1.0, float(hooked.abs().max()))
    # In half precision the hook rounds in another order, so near-ties may break differently; there
    # the bit-for-bit comparison of the tensors is the proof and the text is reported.
    text_decides = lm.model.dtype in (torch.float32, torch.float64)
    if not difference <= allowed:
        found = f"logits that differ by {difference:.3g}, {allowed:.3g} allowed"
        raise _unequal(report.path, found)
    if text_decides and answers != hooked_answers:
        raise _unequal(report.path, "other greedy answers than the hooked model gives")
    return BakeReport(
        route=report.route,
        path=report.path,
        max_logit_difference=difference,
        equal_text=answers == hooked_answers,
        tolerance=allowed,
        steering_effect=float((hooked - plain).abs().max()),
        bias_rounding=report.bias_rounding,
        dtype=report.dtype,
    )


def _reload(lm: LanguageModel, folder: Path, target: Path) -> LanguageModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=lm.model.dtype,
        attn_implementation=lm.model.config._attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if not isinstance(model, LlamaForCausalLM):
        raise _unequal(target, f"a {type(model).__name__}")
    faults = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if faults:
        raise _unequal(target, f"loading faults: {faults}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LanguageModel(model.eval(), tokenizer, name=str(target))


def _compare_tensors(loaded: dict[str, Tensor], meant: dict[str, Tensor], target: Path) -> None:
    for name in sorted(meant.keys() | loaded.keys()):
        if name not in loaded or name not in meant:
            raise _unequal(target, f"the tensor {name} on one side only")
        if not torch.equal(loaded[name].cpu(), meant[name].detach().cpu()):
            raise _unequal(target, f"other values in {name}")


def _logits(lm: LanguageModel, prompts: Sequence[Prompt]) -> Tensor:
    """Return the logits of every real token, float32 `[tokens, vocab]`."""
    parts = []
    with torch.no_grad():
        for batch in lm.batches([lm.encode(p) for p in prompts]):
            batch = batch.to(lm.device)
            parts.append(lm.forward(batch)[batch.attention_mask.bool()].float().cpu())
    return torch.cat(parts)


def _tolerance(dtype: torch.dtype) -> float:
    """Return the difference allowed, as a share of the largest logit (at least of 1)."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def _unequal(target: Path, found: str) -> TrimtabError:
    return TrimtabError(
        asked=f"a checkpoint at {target} equal to the hooked model",
        found=f"after saving and reloading: {found}",
        advice="nothing was left there; steer with the hook: `with vector.on(lm):`",
    )


def _figure(value: float | None) -> str:
    return "not checked" if value is None else f"{value:.2g}"
