"""The harness's file and the steered model object, without the harness itself."""

from __future__ import annotations

import sys
import zipfile
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.export import steered_lm, write_lm_eval
from trimtab.export.lm_eval import steer_config
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import prompt
from trimtab.steering.vector import VectorSteering

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]


def steering(lm: LanguageModel, site: str = "resid_post", m: float = 2.0, **how) -> VectorSteering:
    generator = torch.Generator().manual_seed(2)
    each = {layer: torch.randn(tiny.WIDTH, generator=generator) for layer in (0, 2)}
    return VectorSteering.from_directions(lm, each, m, site=site, **how)


@contextmanager
def as_the_harness(lm: LanguageModel, config: dict[str, dict[str, Any]]):
    """The harness's two actions on the outputs of the modules named, as its documentation says."""

    def change(entry: dict[str, Any], acts: torch.Tensor) -> torch.Tensor:
        vector, number = entry["steering_vector"], entry["steering_coefficient"]
        if entry["action"] == "add":
            return acts + vector * number
        direction = vector / vector.norm()
        return acts + direction * (number - (acts * direction).sum(-1, keepdim=True))

    def hook(entry: dict[str, Any]):
        def changed(module, args, output):
            if isinstance(output, tuple):
                return (change(entry, output[0]), *output[1:])
            return change(entry, output)

        return changed

    modules = dict(lm.model.base_model.named_modules())
    handles = [modules[name].register_forward_hook(hook(e)) for name, e in config.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_out"])
def test_both_actions_are_the_hook(name, site):
    lm = tiny.language_model(name)
    targets = {0: 0.7, 2: -1.1}
    for vector in (
        steering(lm, site),
        steering(lm, site, m=1.0, operation="ablate"),
        steering(lm, site, m=1.0, operation="affine", targets=targets),
    ):
        with vector.on(lm):
            hooked = lm.next_logits(PROMPTS)
        with as_the_harness(lm, steer_config(lm, vector)):
            found = lm.next_logits(PROMPTS)
        assert (hooked - lm.next_logits(PROMPTS)).abs().max() > 0.01
        assert (hooked - found).abs().max() < 2e-5


def test_the_file(tmp_path, llama):
    path = write_lm_eval(llama, steering(llama), tmp_path / "v.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["v.pt"]
    with zipfile.ZipFile(path) as file:
        stored = [file.read(n) for n in file.namelist() if "/data/" in n]
    config = steer_config(llama, steering(llama))
    wanted = [entry["steering_vector"].numpy().tobytes() for entry in config.values()]
    assert sorted(stored) == sorted(wanted) and list(config) == ["layers.0", "layers.2"]


def test_what_the_harness_cannot_hold_is_refused(tmp_path, llama):
    made = steering(llama)
    for found, path, vector in (
        ("sparse autoencoder", "v.csv", made),
        ("ending", "v.safetensors", made),
        ("scope last", "v.pt", made.select(scope="last")),
        ("site resid_mid", "v.pt", made.select(site="resid_mid")),
        ("share of 0.5", "v.pt", steering(llama, m=0.5, operation="ablate")),
        ("strength 0", "v.pt", made.at(0.0)),
        ("fingerprint", "v.pt", steering(tiny.language_model("llama", seed=4))),
    ):
        with pytest.raises(TrimtabError, match=found):
            write_lm_eval(llama, vector, tmp_path / path)
    assert list(tmp_path.iterdir()) == []


class Recorder:
    def __init__(self, pretrained: Any, **options: Any) -> None:
        self.pretrained, self.options = pretrained, options


def test_a_model_that_is_steered(monkeypatch, llama):
    module = ModuleType("lm_eval.models.huggingface")
    module.__dict__["HFLM"] = Recorder
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)
    vector = steering(llama, scope="[1,3)")
    before = llama.next_logits(PROMPTS)
    with vector.on(llama):
        hooked = llama.next_logits(PROMPTS)
    with steered_lm(llama, vector, batch_size=2) as made:
        assert made.pretrained is llama.model
        assert made.options == {"tokenizer": llama.tokenizer, "batch_size": 2}
        assert torch.equal(llama.next_logits(PROMPTS), hooked)
    assert torch.equal(llama.next_logits(PROMPTS), before) and not torch.equal(hooked, before)


def test_what_a_steered_model_cannot_be(monkeypatch, llama):
    for found, lever in (("no vector", prompt("Be kind.")), ("scope last", steering(llama, scope="last"))):  # fmt: skip
        with pytest.raises(TrimtabError, match=found), steered_lm(llama, lever):
            raise AssertionError("refused before the block")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with (
        pytest.raises(TrimtabError, match=r"trimtab\[lm-eval\]"),
        steered_lm(llama, steering(llama)),
    ):
        raise AssertionError("refused before the block")
