"""The selected difference of means: its candidates, their scores, and the choice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap_of, readout_tokens
from trimtab.methods import Task, find
from trimtab.methods import selected_difference as module
from trimtab.methods.selected_difference import PositionCandidate, _parts, _Selection
from trimtab.models.model import LanguageModel
from trimtab.steering.norms import calibrate
from trimtab.steering.scope import Scope

THINGS = ("ferry", "cats", "ledger", "pier", "harbor", "noon", "rules", "work")
TOWARD = [f"Please talk about the {thing}, thank you." for thing in THINGS]
AWAY = [f"How do I borrow {thing} today?" for thing in THINGS]
ANY: dict[str, Any] = {"max_kl": math.inf, "min_induce": -math.inf}


def behavior(**more: object) -> Behavior:
    fields = {
        "name": "polite", "toward": TOWARD, "away": AWAY,
        "neutral": ["The sea is wide.", "A boat.", "Cats sleep at noon."],
        "readout": {"toward": ["Z"], "away": ["Q"]},
    }  # fmt: skip
    return Behavior(**{**fields, **more})


def _task(lm: LanguageModel, scope: str = "all") -> Task:
    return Task(
        lm=lm, behavior=behavior(), site="resid_post", layers=tuple(range(lm.n_layers)), active=None,
        position="post_instruction", scope=Scope.parse(scope), norms=calibrate(lm), seed=0,
        progress=None,
    )  # fmt: skip


def stream(lm: LanguageModel, prompt: object, layer: int, position: int) -> Tensor:
    """What leaves a block (not the last one) at a position from the end, as Hugging Face says."""
    with torch.no_grad():
        ids = torch.tensor([lm.encode(prompt).ids])  # pyright: ignore[reportArgumentType]
        output = lm.model(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[layer + 1][0, position].double()


def test_it_is_the_plain_difference_at_the_chosen_place(lm: LanguageModel) -> None:
    vector = find(lm, behavior(), "selected_difference", split=None, **ANY)
    chosen = vector.provenance["details"]["selected"]
    layer, position = chosen["layer"], chosen["position"]
    assert vector.layers == (layer,) and layer < 3  # 0.8 of 4 layers
    assert str(vector.scope) == "post_instruction"
    part, _ = _parts(behavior(), 0.25, 0)
    toward, away = (
        torch.stack([stream(lm, e.prompt, layer, position) for e in side]).mean(0)
        for side in (part.toward, part.away)
    )
    added = vector.alphas[layer] * vector.directions[layer].double()
    assert torch.allclose(added, toward - away, rtol=1e-3, atol=1e-4)
    assert vector.class_gaps[layer] == pytest.approx(float((toward - away).norm()), rel=1e-3)


@pytest.mark.parametrize("scope", ["all", "post_instruction"])
def test_scores_are_those_of_plain_hooks(llama: LanguageModel, scope: str) -> None:
    _, part = _parts(behavior(), 0.5, 0)
    tokens = readout_tokens(llama, behavior())
    selection = _Selection(llama, "resid_post", Scope.parse(scope), part, 32)
    difference = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = selection.score(-2, 1, difference)
    unit = (difference / difference.norm()).float()

    def without(h: Tensor) -> Tensor:
        return h - (h @ unit)[..., None] * unit

    def logits(prompt: object, mode: str) -> Tensor:
        encoded = llama.encode(prompt)  # pyright: ignore[reportArgumentType]
        handles = []

        def on_block(m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return (without(args[0]), *args[1:]), kwargs

        def on_output(m: nn.Module, args: tuple, out: object) -> object:
            if isinstance(out, tuple):
                return (without(out[0]), *out[1:])
            assert isinstance(out, Tensor)
            return without(out)

        def add(m: nn.Module, args: tuple, out: Tensor) -> Tensor:
            steered = out.clone()
            start = 0 if scope == "all" else encoded.instruction_end
            steered[:, start:] += difference.float()
            return steered

        blocks = llama.model.get_submodule("model.layers")
        for at, block in enumerate(blocks.children()):
            if mode == "ablate":
                handles.append(block.register_forward_pre_hook(on_block, with_kwargs=True))
                for name in ("self_attn", "mlp"):
                    handles.append(block.get_submodule(name).register_forward_hook(on_output))
            elif mode == "add" and at == 1:
                handles.append(block.register_forward_hook(add))
        try:
            with torch.no_grad():
                return llama.model(input_ids=torch.tensor([encoded.ids])).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()

    def mean_gap(prompts: list, mode: str) -> float:
        gaps = [float(gap_of(logits(p, mode), tokens)) for p in prompts]
        return sum(gaps) / len(gaps)

    assert got.bypass == pytest.approx(mean_gap(selection.prompts["toward"], "ablate"), abs=1e-3)
    assert got.induce == pytest.approx(mean_gap(selection.prompts["away"], "add"), abs=1e-3)
    kls = []
    for prompt in selection.prompts["neutral"]:
        p, q = (logits(prompt, mode).log_softmax(-1) for mode in ("", "ablate"))
        kls.append(float((p.exp() * (p - q)).sum()))
    assert got.kl == pytest.approx(sum(kls) / len(kls), rel=1e-2)
    assert got.kl > 1e-4 and abs(got.bypass - selection.unsteered["toward"]) > 1e-3


def test_the_lowest_bypass_among_those_that_pass_wins(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = {
        (-1, 0): PositionCandidate(-1, 0, bypass=-9.0, induce=-0.1, kl=0.01),  # induces nothing
        (-1, 1): PositionCandidate(-1, 1, bypass=-8.0, induce=2.0, kl=0.11),  # breaks neutral prompts
        (-1, 2): PositionCandidate(-1, 2, bypass=-1.0, induce=1.0, kl=0.1),
        (-2, 1): PositionCandidate(-2, 1, bypass=-2.0, induce=0.0, kl=0.05),
        (-2, 2): PositionCandidate(-2, 2, bypass=-7.0, induce=1.0, kl=math.nan),
    }
    asked: list[tuple[int, int]] = []

    def score(self: object, position: int, layer: int, difference: Tensor) -> PositionCandidate:
        asked.append((position, layer))
        other = PositionCandidate(position, layer, bypass=0.0, induce=-1.0, kl=0.5)
        return planted.get((position, layer), other)

    monkeypatch.setattr(_Selection, "score", score)
    vector = find(llama, behavior(), "selected_difference", split=None, position=2)
    details = vector.provenance["details"]
    assert vector.layers == (1,) and vector.provenance["read_at"] == "prompt[-2]"
    assert details["passed"] == 2 and details["runners_up"][0]["layer"] == 2
    assert set(asked) == {(p, x) for p in (-2, -1) for x in range(3)}
    # what the caller allows decides
    loose = find(llama, behavior(), "selected_difference", split=None, position=2, max_kl=0.2)
    assert loose.provenance["details"]["selected"]["bypass"] == -8.0
    asked.clear()
    named = {"layers": 3, "position": -1, **ANY}
    deep = find(llama, behavior(), "selected_difference", split=None, **named)
    assert deep.layers == (3,) and asked == [(-1, 3)]


def test_what_selects_is_not_what_finds() -> None:
    finding, judging = _parts(behavior(), 0.5, 0)
    for name in ("toward", "away", "neutral"):
        one, two = ({e.key for e in getattr(part, name)} for part in (finding, judging))
        assert one and two and not one & two
        assert one | two == {e.key for e in getattr(behavior(), name)}


def test_refusals(llama: LanguageModel, plain: LanguageModel) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": [0, 1]}, "keeps one layer"),
        ({"position": "answer"}, "positions of the prompt"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"deepest": 0.0}, "deepest=0.0"),
        ({"max_kl": -1.0}, "the lowest kl is"),
        ({"min_induce": 1e9}, "the highest induce"),
    ]
    for options, said in cases:
        with pytest.raises(TrimtabError) as caught:
            find(llama, behavior(), "selected_difference", **options)
        assert said in str(caught.value), said
    with pytest.raises(TrimtabError, match="readout"):
        find(llama, behavior(readout=None), "selected_difference")
    with pytest.raises(TrimtabError, match="no chat template"):
        find(plain, behavior(), "selected_difference")
    assert find(plain, behavior(), "selected_difference", position="last", **ANY).layers


def test_every_candidate_is_scored_in_the_scope_that_is_used(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    plain_init = _Selection.__init__

    def init(self: _Selection, lm: LanguageModel, **given: Any) -> None:
        seen.append(str(given["scope"]))
        plain_init(self, lm, **given)

    monkeypatch.setattr(_Selection, "__init__", init)
    vector = find(llama, behavior(), "selected_difference", scope="all", **ANY)
    assert seen == ["all"] and str(vector.scope) == "all"
    assert module.ABLATED == ("resid_pre", "attn_out", "mlp_out")
