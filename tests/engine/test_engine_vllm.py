"""The engine that has answers written by vLLM: what it registers and asks for, and what stays here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from trimtab.engine import vllm_engine, vllm_process
from trimtab.engine.vllm_engine import STRANGER, VllmEngine
from trimtab.engine.vllm_process import Request, VllmProcess
from trimtab.engine.vllm_steps import Steps
from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel, Source
from trimtab.passes.engine import Engine
from trimtab.serve import Served, VectorRegistry
from trimtab.serve.engine import FINGERPRINT
from trimtab.serve.plugin import FOLDER
from trimtab.serve.prefix import TAG
from trimtab.steering.load import load_steering
from trimtab.steering.nulls import random_null
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering

PROMPTS = ["How do I borrow the ledger?", "Please talk.", "The cats sleep on the pier at noon."]
STRENGTHS = [-1.0, 0.0, 0.4, 1.5]
NEW = 6


def model(architecture: str) -> LanguageModel:
    lm = tiny.language_model(architecture)
    lm.source = Source("/models/tiny", None, "float32", None, False)
    return lm


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return model("llama")


def lever(lm: LanguageModel, layers: Sequence[int] = (0, 1, 3), **more: Any) -> VectorSteering:
    generator = torch.Generator().manual_seed(7)
    drawn = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    return VectorSteering.from_directions(lm, drawn, alpha=2.0, **more)


class StandIn(VllmProcess):
    """Answers as vLLM does, with the model and the files that it is given; keeps what was asked."""

    def __init__(self, lm: LanguageModel, folder: Path | None, options: Any) -> None:
        self.lm, self.folder, self.options = lm, folder, options
        self.longest = options.get("max_model_len", 256)
        self.batches: list[list[Request]] = []
        self.closed = False
        self.files = [] if folder is None else sorted(file.stem for file in folder.iterdir())

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        assert not self.closed and list(ends) == generation.end_ids(self.lm)
        self.batches.append(list(requests))
        found: list[list[int]] = []
        for _, same in groupby(requests, key=lambda request: sorted(request.steer.items())):
            found += self._alike(list(same), max_new_tokens)
        return found

    def read(self, ids: Sequence[int]) -> list[float]:
        (batch,) = self.lm.batches([encoded(ids)])
        found = self.lm.forward(batch)[0].float().log_softmax(-1)
        return [float(found[place, token]) for place, token in enumerate(ids[1:])]

    def close(self) -> None:
        self.closed = True

    def _alike(self, requests: list[Request], max_new_tokens: int) -> list[list[int]]:
        with ExitStack() as stack:
            for text, strength in requests[0].steer.items():
                name, scope = text.split("@")
                assert self.folder is not None
                vector = load_steering(self.folder / f"{name}.safetensors")
                assert isinstance(vector, VectorSteering)
                stack.enter_context(vector.select(scope=scope, strength=strength).on(self.lm))
            rows = [encoded(request.ids) for request in requests]
            return generation.answer_ids(self.lm, rows, max_new_tokens)


def encoded(ids: Sequence[int]) -> Encoded:
    return Encoded("", list(ids), len(ids), len(ids))


class Starts:
    """Starts stand-ins, and keeps them."""

    def __init__(self) -> None:
        self.made: list[StandIn] = []

    def __call__(self, lm: LanguageModel, folder: Path | None, options: Any) -> StandIn:
        self.made.append(StandIn(lm, folder, options))
        return self.made[-1]

    @property
    def asked(self) -> list[list[Request]]:
        return [batch for each in self.made for batch in each.batches]


@pytest.fixture
def starts() -> Starts:
    return Starts()


@pytest.fixture
def engine(lm: LanguageModel, starts: Starts) -> Iterator[VllmEngine]:
    with closing(VllmEngine(lm, start=starts)) as made:
        yield made


def test_a_model_without_a_source_is_refused() -> None:
    with pytest.raises(TrimtabError, match="made in memory"):
        VllmEngine(tiny.language_model("llama"))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_texts_are_those_of_the_local_engine(architecture: str, starts: Starts) -> None:
    lm = model(architecture)
    local, vector = Engine(lm), lever(lm)
    before = lever(lm, (0, 2), site="resid_pre")
    asked = [
        vector,
        vector.select(layers=[1], scope="last"),
        vector.select(layers=[0, 3], scope="generated"),
        before.select(scope="prompt"),
    ]
    with closing(VllmEngine(lm, start=starts)) as engine:
        engine.expect([vector, before])
        for each in asked:
            want = local.rollout(each, PROMPTS, STRENGTHS, NEW)
            assert engine.rollout(each, PROMPTS, STRENGTHS, NEW) == want
            assert len({tuple(row) for row in want}) > 1
            assert engine.answer(each.at(1.5), PROMPTS, NEW) == want[3]
        assert engine.answer(None, PROMPTS, NEW) == lm.generate(PROMPTS, max_new_tokens=NEW)
        assert not engine.answered_here
    assert len(starts.made) == 1 and len(starts.asked) == 9


def test_every_layer_is_registered_once(lm: LanguageModel, tmp_path: Path) -> None:
    vector, steps = lever(lm), Steps()
    tuned = vector.select(layers=[1], scope="last", strength=0.7)
    null = random_null(vector, 3)
    ablating = vector.select(operation="ablate")
    for each in (vector, tuned, vector.at(-2.0), null, ablating, random_null(tuned, 3)):
        steps.add(each)
    assert len(steps.single) == 6
    assert tuned in steps and steps.names(tuned) < steps.names(vector)
    assert vector.select(site="resid_pre") not in steps
    steps.write(tmp_path, lm)
    registry = VectorRegistry.read(tmp_path, Served("tiny", lm.n_layers, lm.d_model, lm.fingerprint))
    assert set(registry.entries) == set(steps.single) and not registry.refused
    for layer in vector.layers:
        (name,) = steps.names(vector.select(layers=[layer]))
        step = registry.entry(name).steps[layer]
        torch.testing.assert_close(step, vector.directions[layer] * vector.scales[layer])


def test_a_rollout_is_one_batch(lm: LanguageModel, engine: VllmEngine, starts: Starts) -> None:
    vector = lever(lm).select(layers=[0, 3], scope="last")
    strengths = [0.1, 0.0, -1e-7]
    engine.rollout(vector, PROMPTS, strengths, NEW)
    (batch,) = starts.asked
    ids = [lm.encode(prompt).ids for prompt in PROMPTS]
    assert [request.ids for request in batch] == ids * 3
    names = sorted(engine._steps.names(vector))
    assert len(names) == 2
    for place, strength in enumerate(strengths):
        steer = {f"{name}@last": strength for name in names} if strength else {}
        assert [request.steer for request in batch[3 * place :][:3]] == [steer] * 3


def test_a_prompt_in_words_is_part_of_the_ids(
    lm: LanguageModel, engine: VllmEngine, starts: Starts
) -> None:
    for slot in ("system", "suffix"):
        words = PromptSteering("Talk about cats.", slot=slot)
        assert engine.answer(words, PROMPTS, NEW) == Engine(lm).answer(words, PROMPTS, NEW)
        with words.on(lm):
            ids = [lm.encode(prompt).ids for prompt in PROMPTS]
        assert [request.ids for request in starts.asked[-1]] == ids
        assert not any(request.steer for request in starts.asked[-1])
        assert lm.system is None and not lm.inserts
    assert not engine.answered_here and not starts.made[0].files


def test_nothing_starts_before_an_answer_and_expected_vectors_start_it_again(
    lm: LanguageModel, engine: VllmEngine, starts: Starts
) -> None:
    vector = lever(lm)
    null, other = random_null(vector, 1), random_null(vector, 2)
    engine.expect([vector])
    assert not starts.made
    engine.answer(None, PROMPTS, NEW)
    engine.answer(vector, PROMPTS, NEW)
    assert len(starts.made) == 1 and len(starts.made[0].files) == 3
    engine.expect([null, other])
    engine.answer(vector, PROMPTS, NEW)
    assert len(starts.made) == 1
    for each in (null, other, vector):
        engine.answer(each, PROMPTS, NEW)
    assert len(starts.made) == 2 and len(starts.made[1].files) == 9
    assert starts.made[0].closed and not starts.made[1].closed
    first, second = (made.folder for made in starts.made)
    assert first is not None and second is not None
    assert not first.exists() and second.exists() and second.stat().st_mode & 0o077 == 0
    engine.close()
    assert starts.made[1].closed and not second.exists()


def soft(lm: LanguageModel) -> PromptSteering:
    return PromptSteering("", vectors=torch.ones(2, lm.d_model))


STAYS = {
    "post_instruction": "the scope post_instruction",
    "window": "the scope [3,9)",
    "ablate": "the operation ablate",
    "site": "the site mlp_out",
    "stranger": STRANGER,
    "soft": "the lever is a soft prompt",
    "together": "the lever is Together",
}


@pytest.mark.parametrize("kind", STAYS)
def test_what_stays_here_and_why(
    lm: LanguageModel, engine: VllmEngine, starts: Starts, caplog: Any, kind: str
) -> None:
    vector = lever(lm).at(1.5)
    levers: dict[str, Any] = {
        "post_instruction": vector.select(scope="post_instruction"),
        "window": vector.select(scope="[3,9)"),
        "ablate": vector.select(operation="ablate"),
        "site": vector.select(site="mlp_out"),
        "stranger": random_null(vector, 5),
        "soft": soft(lm),
        "together": Together((vector, random_null(vector, 5))),
    }
    chosen = levers[kind]
    engine.expect([each for each in (vector, chosen) if isinstance(each, VectorSteering)][:1])
    engine.expect([chosen] if kind in ("post_instruction", "window", "ablate", "site") else [])
    engine.answer(None, PROMPTS, NEW)
    with caplog.at_level(logging.WARNING, "trimtab.engine"):
        assert engine.answer(chosen, PROMPTS, NEW) == Engine(lm).answer(chosen, PROMPTS, NEW)
        if isinstance(chosen, VectorSteering):
            found = engine.rollout(chosen, PROMPTS, STRENGTHS, NEW)
            assert found == Engine(lm).rollout(chosen, PROMPTS, STRENGTHS, NEW)
            assert engine.answered_here == {STAYS[kind]: 5 * len(PROMPTS)}
        else:
            assert engine.answered_here == {STAYS[kind]: len(PROMPTS)}
    assert [record.args for record in caplog.records] == [(STAYS[kind],)]
    assert len(starts.made) == 1 and len(starts.asked) == 1


def test_what_half_precision_cannot_hold_is_refused_here(starts: Starts) -> None:
    lm = model("llama")
    lm.model.half()
    vector = lever(lm, (1,)).at(3e4)
    with closing(VllmEngine(lm, start=starts)) as engine:
        with pytest.raises(TrimtabError, match="more than torch.float16 holds"):
            engine.answer(vector, PROMPTS, NEW)
        engine.answer(vector.at(1.0), PROMPTS, NEW)
    assert len(starts.asked) == 1


def test_inside_a_soft_prompt_everything_stays_here(lm: LanguageModel, engine: VllmEngine) -> None:
    with soft(lm).on(lm):
        assert engine.answer(None, PROMPTS, NEW) == Engine(lm).answer(None, PROMPTS, NEW)
    assert engine.answered_here == {"a soft prompt is in place": 3}


def test_longer_prompts_are_answered_here(lm: LanguageModel, starts: Starts) -> None:
    lengths = [len(lm.encode(prompt).ids) for prompt in PROMPTS]
    assert lengths[1] < min(lengths[0], lengths[2])
    most, vector = lengths[1] + NEW, lever(lm)
    with closing(VllmEngine(lm, start=starts, max_model_len=most)) as engine:
        found = engine.rollout(vector, PROMPTS, STRENGTHS, NEW)
        assert found == Engine(lm).rollout(vector, PROMPTS, STRENGTHS, NEW)
        assert engine.answered_here == {"prompts longer than vLLM's max_model_len": 8}
    assert len(starts.asked[0]) == 4 and starts.made[0].options == {"max_model_len": most}


def test_what_the_local_engine_refuses_is_refused(lm: LanguageModel, engine: VllmEngine) -> None:
    vector, local = lever(lm), Engine(lm)
    for asked in (
        lambda each: each.answer(None, [], NEW),
        lambda each: each.answer(vector, PROMPTS, -1),
        lambda each: each.rollout(vector, [], STRENGTHS, NEW),
        lambda each: each.rollout(vector, PROMPTS, [float("nan")], NEW),
        lambda each: each.rollout(lever(model("gpt2")), PROMPTS, STRENGTHS, NEW),
    ):
        for each in (local, engine):
            with pytest.raises(TrimtabError):
                asked(each)
    assert engine.answer(vector, PROMPTS, 0) == ["", "", ""]
    assert not engine.answered_here


def test_a_model_changed_in_memory_is_refused(lm: LanguageModel) -> None:
    changed, started = model("llama"), Starts()
    with torch.no_grad():
        changed.model.get_parameter("model.layers.2.mlp.down_proj.weight").mul_(1.2)

    def start(_: LanguageModel, folder: Path | None, options: Any) -> StandIn:
        return started(lm, folder, options)  # what the folder holds

    engine = VllmEngine(changed, start=start)
    with pytest.raises(TrimtabError, match="another model in '/models/tiny'"):
        engine.answer(lever(changed), PROMPTS, NEW)
    assert started.made[0].closed and not started.asked
    assert vllm_engine.APART < vllm_engine.APART_HALF


class FakeVllm:
    """The few names of vLLM that are used, as modules; keeps what they are called with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.arguments: dict[str, Any] = {}
        self.variables: dict[str, str] = {}
        self.calls: list[tuple[list[Any], list[Any]]] = []
        self.registered = 0
        self.plugins: dict[str, Any] = {"trimtab": self.register}
        self.error: Exception | None = None
        self.ended: list[float] = []
        dead = type("EngineDeadError", (Exception,), {})
        self.dead: Exception | None = None
        content: dict[str, dict[str, Any]] = {
            "vllm": {"LLM": self.start, "SamplingParams": lambda **given: SimpleNamespace(**given)},
            "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
            "vllm.plugins": {
                "DEFAULT_PLUGINS_GROUP": "general",
                "load_plugins_by_group": {"general": self.plugins}.__getitem__,
            },
            "vllm.v1.engine.exceptions": {"EngineDeadError": dead},
        }
        for name, inside in content.items():
            module = ModuleType(name)
            vars(module).update(inside)
            patch.setitem(sys.modules, name, module)

    def register(self) -> None:
        self.registered += 1

    def start(self, **arguments: Any) -> Any:
        self.arguments, self.variables = arguments, dict(os.environ)
        os.environ["SET_BY_VLLM"] = "1"
        if self.error is not None:
            raise self.error
        known = {TAG: {}} if self.registered else {}
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=arguments["max_model_len"]),
            additional_config=known,
        )
        core = SimpleNamespace(shutdown=lambda timeout: self.ended.append(timeout))
        engine = SimpleNamespace(vllm_config=config, engine_core=core)
        return SimpleNamespace(llm_engine=engine, generate=self.generate)

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        if self.dead is not None:
            raise self.dead
        self.calls.append((prompts, params))
        output = SimpleNamespace(token_ids=(5, 2))
        known = [None, {9: SimpleNamespace(logprob=-0.1), 4: SimpleNamespace(logprob=-2.5)}]
        return [SimpleNamespace(outputs=[output], prompt_logprobs=known) for _ in prompts]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "SET_BY_VLLM"):
        monkeypatch.delenv(name, raising=False)
    return FakeVllm(monkeypatch)


def test_vllm_starts_with_the_same_checkpoint_and_leaves_the_environment(
    lm: LanguageModel, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "/of/a/server")
    before = dict(os.environ)
    process = VllmProcess(lm, tmp_path, {"tensor_parallel_size": 2})
    assert dict(os.environ) == before and fake.registered == 1
    assert fake.variables[FOLDER] == str(tmp_path)
    assert fake.variables[FINGERPRINT] == lm.fingerprint
    assert fake.variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert fake.variables["VLLM_LOGGING_LEVEL"] == "ERROR"
    expected = {"model": "/models/tiny", "dtype": "float32", "tensor_parallel_size": 2}
    assert expected.items() <= fake.arguments.items()
    assert fake.arguments["kv_cache_memory_bytes"] == vllm_process.CPU_CACHE_BYTES
    assert process.longest == 256  # the model's own limit
    process.close()
    assert fake.ended == [vllm_process.PATIENCE]


def test_without_vectors_the_plugin_is_not_asked_for(
    lm: LanguageModel, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "/of/a/server")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    VllmProcess(lm, None, {})
    assert FOLDER not in fake.variables and not fake.registered
    assert fake.variables["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "kv_cache_memory_bytes" not in fake.arguments


def test_requests_are_greedy_and_end_where_generate_ends(lm: LanguageModel, fake: FakeVllm) -> None:
    process = VllmProcess(lm, None, {})
    requests = [Request([3, 4], {"layer1-ab@last": -0.5}), Request([6], {})]
    assert process.answer(requests, 40, [2, 9]) == [[5, 2], [5, 2]]
    prompts, params = fake.calls[0]
    assert prompts == [{"prompt_token_ids": [3, 4]}, {"prompt_token_ids": [6]}]
    assert [each.extra_args for each in params] == [{"steer": {"layer1-ab@last": -0.5}}, None]
    for each in params:
        assert (each.temperature, each.max_tokens, each.stop_token_ids) == (0.0, 40, [2, 9])
        assert each.ignore_eos and not each.detokenize
    assert process.read([3, 4]) == [-2.5]


def test_a_vllm_that_cannot_steer_is_refused(
    lm: LanguageModel, fake: FakeVllm, tmp_path: Path
) -> None:
    fake.plugins.clear()
    with pytest.raises(TrimtabError, match="none of that name among vLLM's plugins"):
        VllmProcess(lm, tmp_path, {})
    fake.plugins["trimtab"] = lambda: None
    with pytest.raises(TrimtabError, match="started without it"):
        VllmProcess(lm, tmp_path, {})
    assert fake.ended == [vllm_process.PATIENCE]


@pytest.mark.parametrize("error", [RuntimeError("no\n  memory"), ValueError("no memory")])
def test_what_vllm_says_at_its_start_is_passed_on(
    lm: LanguageModel, fake: FakeVllm, error: Exception
) -> None:
    before, fake.error = dict(os.environ), error
    with pytest.raises(TrimtabError, match="does not start: no memory\n"):
        VllmProcess(lm, None, {})
    assert dict(os.environ) == before


def test_a_process_that_ended_is_an_error_of_ours(lm: LanguageModel, fake: FakeVllm) -> None:
    process = VllmProcess(lm, None, {})
    fake.dead = sys.modules["vllm.v1.engine.exceptions"].EngineDeadError("gone")
    with pytest.raises(TrimtabError, match="its process has ended"):
        process.answer([Request([3], {})], 4, [])
