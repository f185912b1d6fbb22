"""The evaluation harness lm-eval: its `steered` model's file, or a model that is already steered.

`lm_eval --model steered --model_args pretrained=MODEL,steer_path=FILE.pt` adds a vector to a
module's output, or clamps the output's projection on a direction, at every token. The harness also
reads a CSV; its rows name features of published sparse autoencoders, so a vector of one's own has
no row there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import TrimtabError, extra
from trimtab.export.files import not_zero, refusal
from trimtab.models.model import LanguageModel
from trimtab.results.files import written
from trimtab.steering.hooks import Edit
from trimtab.steering.vector import Switch, VectorSteering

_FORM = "lm-eval's steered model"
_SITES = ("resid_post", "attn_out", "mlp_out")


def write_lm_eval(lm: LanguageModel, vector: VectorSteering, path: str | os.PathLike[str]) -> Path:
    """Write the file that lm-eval's `steered` model reads as `steer_path`.

    `add` becomes the action `add`. `ablate` and `affine` at m = 1 become `clamp`, to 0 or to the
    target; the harness has no other shares.

    Args:
        lm: the model the vector was made for; its modules' names go into the file.
        vector: at `resid_post`, `attn_out` or `mlp_out`, scope `all`.
        path: file to write; the harness takes its format from the ending, `.pt` or `.pth`.

    Raises:
        TrimtabError: another ending, scope or site; a share other than 1; strength 0; another
            model's vector; the file cannot be written.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        csv = "a CSV, whose rows can only name features of a published sparse autoencoder"
        found = csv if Path(path).suffix == ".csv" else "an ending that means no file of vectors"
        raise refusal(vector, f"{path} for {_FORM}", found, "end the file's name in .pt")
    config = steer_config(lm, vector)
    with written(path) as temporary:
        torch.save(config, temporary)
    return Path(path)


def steer_config(lm: LanguageModel, vector: VectorSteering) -> dict[str, dict[str, Any]]:
    """Return the file's content: the name of a module below the trunk -> what is done to its output."""
    vector.check(lm)
    not_zero(vector, _FORM)
    _whole_scope(vector, _FORM)
    names = {id(module): name for name, module in lm.model.base_model.named_modules()}
    config: dict[str, dict[str, Any]] = {}
    for edit in vector.edits():
        if edit.site.kind not in _SITES:
            raise refusal(vector, _FORM, f"site {edit.site}", f"use {', '.join(_SITES)}")
        if edit.operation != "add" and edit.amount != 1.0:
            share = f"{edit.operation} by a share of {edit.amount:g}"
            raise refusal(vector, _FORM, share, "use strength 1")
        tap = lm.sites.writing(edit.site)
        config[names[id(tap.module)]] = _action(edit, tap.scale)
    return config


def _action(edit: Edit, scale: float) -> dict[str, Any]:
    """One module's entry; its output times `scale` is what the edit means."""
    c = edit.direction.double()
    if edit.operation == "add":
        # Whole, with coefficient 1: the harness rounds the vector before it multiplies.
        action, vector, coefficient = "add", c * (edit.amount / scale), 1.0
    else:
        target = edit.target if edit.operation == "affine" else 0.0
        action, vector, coefficient = "clamp", c, target / scale
    return {
        "action": action,
        "steering_vector": vector.float(),
        "steering_coefficient": coefficient,
        "head_index": None,
        "bias": None,
    }


@contextmanager
def steered_lm(lm: LanguageModel, steering: Switch, **options: Any) -> Iterator[Any]:
    """Give the harness a model that is steered inside the `with` block, by any vector.

    Every operation and site works, and windows such as `[0,4)`. The harness does not say where a
    prompt ends, so scopes that need to know are refused.

        with steered_lm(lm, vector) as model:
            results = lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])

    Args:
        lm: the model.
        steering: what to switch on.
        options: of `lm_eval.models.huggingface.HFLM`, such as `batch_size`.

    Yields:
        A `HFLM`; outside the block it is not steered.

    Raises:
        TrimtabError: a prompt, or a scope that needs the prompt's end; lm-eval is missing.
    """
    if not isinstance(steering, VectorSteering):
        raise TrimtabError(
            asked=f"to evaluate with {getattr(steering, 'label', type(steering).__name__)}",
            found="a lever that is no vector; the harness writes its own system message",
            advice="pass the text as the harness's system_instruction",
        )
    _whole_scope(steering, "lm-eval", windows=True)
    made = extra("lm_eval.models.huggingface", "lm-eval")
    with steering.on(lm):
        yield made.HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, **options)


def _whole_scope(vector: VectorSteering, form: str, windows: bool = False) -> None:
    scope = str(vector.scope)
    if scope != "all" and not (windows and scope.startswith("[")):
        raise TrimtabError(
            asked=f"to use {vector.label} in {form}",
            found=f"scope {scope}; {form} steers "
            + ("without knowing where a prompt ends" if windows else "every token alike"),
            advice="measure the vector again with vector.select(scope='all')",
        )
