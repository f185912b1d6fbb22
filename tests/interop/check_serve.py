"""vLLM with the plugin: for each request the same greedy tokens as the transformers hook alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from interop.check_vllm import GEMMA, GPT2, SIZES
from interop.programs import call, directions, greedy, harbor, random_model
from trimtab import behavior, find
from trimtab.harbor import path as harbor_path
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

NEW = 16
BLOCK = 32
# Fewer tokens a step than the batch's prompts have: they come in chunks, beside generated ones.
SMALL_STEPS = {"max_num_batched_tokens": 64, "max_num_seqs": 64, "block_size": BLOCK}
STRENGTHS = (-9.0, 3.0, 6.0, 12.0)
SCOPES = ("all", "prompt", "generated", "last")
Terms = list[tuple[str, float, str]]


@dataclass
class Batch:
    """Requests with what the hook answers to them."""

    ids: list[list[int]]
    terms: list[Terms]
    plain: list[list[int]]
    hooked: list[list[int]]

    def requests(self) -> list[dict[str, Any]]:
        texts = [[f"{name}:{m}@{scope}" for name, m, scope in terms] for terms in self.terms]
        return [
            {"ids": ids, "steer": text or None} for ids, text in zip(self.ids, texts, strict=True)
        ]


def batch_of(
    lm: LanguageModel,
    vectors: dict[str, VectorSteering],
    prompts: list[list[int]],
    terms: Sequence[Terms],
) -> Batch:
    hooked = []
    for ids, mine in zip(prompts, terms, strict=True):
        with ExitStack() as stack:
            for name, m, scope in mine:
                stack.enter_context(vectors[name].select(scope=scope).at(m).on(lm))
            hooked += greedy(lm, [ids], NEW)
    return Batch(prompts, list(terms), greedy(lm, prompts, NEW), hooked)


def mixed(first: str, second: str, count: int, factor: float = 1.0) -> list[Terms]:
    """No steering, either vector, or both, at four strengths over all scopes."""
    found: list[Terms] = []
    for n in range(count):
        m, scope = STRENGTHS[n // 4 % 4] * factor, SCOPES[(n // 16 + n) % 4]
        both: Terms = [(first, m, scope), (second, -m / 2, "all")]
        found.append([[], [(first, m, scope)], [(second, m, scope)], both][n % 4])
    return found


def save(vectors: dict[str, VectorSteering], folder: Path) -> Path:
    for name, vector in vectors.items():
        vector.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory) -> Any:
    """Make the entry point known to the other interpreter, as an installation would."""
    root = Path(__file__).parents[2]
    info = tmp_path_factory.mktemp("plugin") / "trimtab-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trimtab\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ntrimtab = trimtab.serve.plugin:register\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root / 'src'}:{info.parent}")
        yield


@dataclass
class Built:
    """The built-in model, its vectors in a folder, and a batch."""

    lm: LanguageModel
    vectors: dict[str, VectorSteering]
    folder: Path
    batch: Batch


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    lm, prompts = harbor()
    vectors = {name: find(lm, behavior(name)) for name in ("refusal", "mood")}
    folder = save(vectors, tmp_path_factory.mktemp("steer"))
    # Files that do not fit: another width, other weights, another operation.
    wide, _ = random_model(LlamaConfig(**SIZES))
    other = VectorSteering.from_directions(wide, directions(wide, (1,)))
    foreign = VectorSteering(**{**vars(vectors["mood"]), "fingerprint": "0" * 64})
    ablate = vectors["mood"].select(operation="ablate")
    save({"wide": other, "foreign": foreign, "ablate": ablate}, folder)
    terms = mixed("refusal", "mood", len(prompts))
    return Built(lm, vectors, folder, batch_of(lm, vectors, prompts, terms))


# A prompt of three blocks that is asked again and again: what is said each time, the tokens that
# must come from the cache, and whether the prompt goes on with the answer of the time before.
ASKED_AGAIN: tuple[tuple[Terms, int, bool], ...] = (
    ([], 0, False),
    ([("mood", 6.0, "all")], 0, False),
    ([("mood", 6.0, "all")], 3 * BLOCK, False),
    ([("mood", 5.0, "all")], 0, False),
    ([], 3 * BLOCK, False),
    # Nothing of the prompt is steered, so it is shared with the plain one.
    ([("mood", 6.0, "generated")], 3 * BLOCK, False),
    # Here the answer of before belongs to the prompt, so that none of its blocks will do.
    ([("mood", 6.0, "generated")], 3 * BLOCK, True),
    # The prompt of a request that was steered all over holds just that.
    ([("mood", 6.0, "prompt")], 3 * BLOCK, False),
    ([("mood", -6.0, "prompt")], 0, False),
    # The last token of the prompt stands in the fourth block.
    ([("mood", 6.0, "last")], 3 * BLOCK, False),
    ([("refusal", 3.0, "generated")], 3 * BLOCK, False),
)
REFUSED: dict[str, tuple[object, str]] = {
    "name": ("nobody:1", "no vector of that name"),
    "strength": ("mood:strong", "not a finite number"),
    "too strong": ("mood:1e39", "more than the model's numbers hold"),
    "not a number": ("mood:nan", "not a finite number"),
    "scope": ("mood:1@window", "no such scope"),
    "window": ("mood:1@[0,4)", "by what a token is"),
    "post_instruction": ("mood:1@post_instruction", "not where the user's text ends"),
    "width": ("wide:1", "width 256 instead of 128"),
    "fingerprint": ("foreign:1", "fingerprint"),
    "operation": ("ablate:1", "the operation ablate"),
    "form": (["mood:1", 3], "names no vector"),
}


@dataclass
class Again:
    """The same prompt with several steerings, one after another."""

    batches: list[Batch] = field(default_factory=list)


@pytest.fixture(scope="module")
def again(built: Built) -> Again:
    long = [token for ids in built.batch.ids for token in ids][: 3 * BLOCK + 20]
    found = Again()
    for terms, _, goes_on in ASKED_AGAIN:
        prompt = long + found.batches[-1].hooked[0] if goes_on else long
        found.batches.append(batch_of(built.lm, built.vectors, [prompt], [terms]))
    return found


@pytest.fixture(scope="module")
def served(built: Built, again: Again, tmp_path_factory) -> dict[str, Any]:
    """The built-in model in one process, eager and compiled: each round is a batch."""
    mixed_batch = built.batch.requests()
    alone = [batch.requests() for batch in again.batches]
    refused = [[{"ids": built.batch.ids[0], "steer": value}] for value, _ in REFUSED.values()]
    jobs = [
        {
            "model": str(harbor_path()),
            "folder": str(built.folder),
            "eager": eager,
            "options": SMALL_STEPS,
            # The mixed batch twice, and once more after everything that was refused.
            "rounds": [mixed_batch, mixed_batch, *alone, *refused, mixed_batch],
        }
        for eager in (True, False)
    ]
    asked = {"jobs": jobs, "max_new_tokens": NEW, "max_model_len": 256}
    found = call("vllm", "vllm_steered.py", asked, tmp_path_factory.mktemp("vllm"))
    return dict(zip(("eager", "compiled"), found, strict=True))


def same(answers: list[dict[str, Any]], expected: list[list[int]]) -> int:
    return sum(mine["answer"] == hook for mine, hook in zip(answers, expected, strict=True))


MODES = pytest.mark.parametrize("mode", ["eager", "compiled"])


@MODES
def test_a_mixed_batch_says_what_the_hook_says(built, served, record_property, mode):
    batch, rounds = built.batch, served[mode]["rounds"]
    assert (served[mode]["compilation"] > 0) == (mode == "compiled")
    moved = sum(a != b for a, b in zip(batch.hooked, batch.plain, strict=True))
    assert moved > 24
    for name, answers in (("cold", rounds[0]), ("again", rounds[1]), ("last", rounds[-1])):
        equal = same(answers, batch.hooked)
        record_property(f"{mode} {name}", f"tokens of the hook: {equal} of {len(batch.ids)}")
        assert equal == len(batch.ids)


@MODES
def test_steerings_share_no_cache_but_where_nothing_is_steered(again, served, mode):
    rounds = served[mode]["rounds"][2 : 2 + len(ASKED_AGAIN)]
    for (terms, cached, _), batch, (answer,) in zip(
        ASKED_AGAIN, again.batches, rounds, strict=True
    ):
        assert (answer["cached"], answer["answer"]) == (cached, batch.hooked[0]), terms


@MODES
def test_wrong_requests_are_refused_with_a_reason(served, mode):
    first = 2 + len(ASKED_AGAIN)
    rounds = served[mode]["rounds"][first : first + len(REFUSED)]
    for (name, (_, reason)), (answer,) in zip(REFUSED.items(), rounds, strict=True):
        assert reason in answer["refused"], name


# The twelve architectures, in vLLM's own code and once in transformers' modules.
NEOX: dict[str, Any] = {
    key: value for key, value in SIZES.items() if key not in ("num_key_value_heads",)
}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, float]] = {
    "llama": (LlamaConfig(**SIZES), 1.0),
    "mistral": (MistralConfig(**SIZES, head_dim=32, sliding_window=None), 1.0),
    "qwen2": (Qwen2Config(**SIZES), 1.0),
    "qwen3": (Qwen3Config(**SIZES, head_dim=32), 1.0),
    "gemma2": (Gemma2Config(**GEMMA), 3.0),
    "gemma3": (Gemma3TextConfig(**GEMMA), 3.0),
    "olmo2": (Olmo2Config(**SIZES), 1.0),
    "phi3": (Phi3Config(**SIZES), 1.0),
    "gpt2": (GPT2, 1.0),
    "gpt_neox": (GPTNeoXConfig(**NEOX), 1.0),
    "granite": (GraniteConfig(**SIZES), 1.0),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None), 1.0),
}
COMPILED = ("gemma2", "gpt2")
RUNS = [
    *((name, "eager") for name in ARCHITECTURES),
    *((name, "compiled") for name in COMPILED),
    ("qwen3", "modules"),
]


@pytest.fixture(scope="module")
def architectures(request, tmp_path_factory) -> dict[tuple[str, str], tuple[Batch, Any]]:
    folder = tmp_path_factory.mktemp("architectures")
    items = [item for item in request.session.items if item.module is request.module]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    chosen = [(p["name"], p["run"]) for p in params if "run" in p]
    batches: dict[str, Batch] = {}
    for name in sorted({name for name, _ in chosen}):
        config, factor = ARCHITECTURES[name]
        lm, prompts = random_model(config)
        lm.model.save_pretrained(folder / name)
        drawn = directions(lm, (0, 2, 3))
        behind = VectorSteering.from_directions(lm, {0: drawn[0], 2: drawn[2]})
        before = VectorSteering.from_directions(lm, {0: drawn[3], 3: drawn[0]}, site="resid_pre")
        vectors = {"behind": behind, "before": before}
        (folder / f"{name}-steer").mkdir()
        save(vectors, folder / f"{name}-steer")
        terms = mixed("behind", "before", 16, factor)
        batches[name] = batch_of(lm, vectors, prompts[:16], terms)
    jobs = [
        {
            "model": str(folder / name),
            "folder": str(folder / f"{name}-steer"),
            "eager": run != "compiled",
            "options": SMALL_STEPS | ({"model_impl": "transformers"} if run == "modules" else {}),
            "rounds": [batches[name].requests()],
        }
        for name, run in chosen
    ]
    asked = {"jobs": jobs, "max_new_tokens": NEW, "max_model_len": 256}
    found = call("vllm", "vllm_steered.py", asked, folder)
    return {
        key: (batches[key[0]], answers["rounds"][0])
        for key, answers in zip(chosen, found, strict=True)
    }


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_architectures(architectures, record_property, name, run):
    batch, answers = architectures[name, run]
    moved = sum(a != b for a, b in zip(batch.hooked, batch.plain, strict=True))
    assert moved >= 8
    equal = same(answers, batch.hooked)
    record_property(f"{name} {run}", f"tokens of the hook: {equal} of 16")
    assert equal == 16


PARTS = ("pipeline_parallel_size", "tensor_parallel_size")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Batch, dict[str, Any]]:
    """The built-in model over two processes, compiled; both hold blocks that are steered."""
    lm, prompts = harbor()
    behind = VectorSteering.from_directions(lm, directions(lm, (2, 5)), alpha=50.0)
    before = VectorSteering.from_directions(
        lm, directions(lm, (1, 4)), alpha=50.0, site="resid_pre"
    )
    vectors = {"behind": behind, "before": before}
    folder = save(vectors, tmp_path_factory.mktemp("ranks"))
    batch = batch_of(lm, vectors, prompts[:32], mixed("behind", "before", 32))
    job = {"model": str(harbor_path()), "folder": str(folder), "eager": False}
    jobs = [
        job | {"options": SMALL_STEPS | {part: 2}, "rounds": [batch.requests()]} for part in PARTS
    ]
    asked = {"jobs": jobs, "max_new_tokens": NEW, "max_model_len": 256}
    found = call("vllm", "vllm_steered.py", asked, tmp_path_factory.mktemp("vllm"))
    return batch, dict(zip(PARTS, found, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_two_ranks_steer_as_one(ranks, record_property, part):
    batch, found = ranks
    assert sum(a != b for a, b in zip(batch.hooked, batch.plain, strict=True)) > 12
    equal = same(found[part]["rounds"][0], batch.hooked)
    record_property(part, f"tokens of the hook: {equal} of 32")
    assert equal == 32


CHATS = ("Where is the ferry?", "How do I borrow the harbor ledger?", "Tell me about the tide.")


@pytest.fixture(scope="module")
def http(built, tmp_path_factory) -> tuple[Batch, dict[str, Any]]:
    lm, vectors = built.lm, built.vectors
    terms: list[Terms] = [[], [("mood", 6.0, "generated")], [("refusal", 12.0, "all")]]
    ids = [lm.encode(text).ids for text in CHATS]
    chats = batch_of(lm, vectors, ids, terms)
    steered = [each["steer"] for each in chats.requests()]
    asked = {
        "folder": str(built.folder),
        "arguments": ["--dtype", "float32", "--max-model-len", "256", "--served-model-name"]
        + ["harbor", "--max-num-batched-tokens", "64", "--max-num-seqs", "64"],
        "completions": built.batch.requests(),
        "chats": [{"text": t, "steer": s} for t, s in zip(CHATS, steered, strict=True)],
        # The API itself refuses what is no list of texts and numbers.
        "wrong": [value for value, _ in REFUSED.values()],
        "max_new_tokens": NEW,
    }
    found = call("vllm", "vllm_http.py", asked, tmp_path_factory.mktemp("http"))
    return chats, found


def test_over_http_each_request_has_its_own_steering(built, http, record_property):
    chats, found = http
    equal = sum(a == b for a, b in zip(found["completions"], built.batch.hooked, strict=True))
    record_property("http", f"tokens of the hook: {equal} of {len(built.batch.ids)}")
    assert equal == len(built.batch.ids)
    assert found["chats"] == chats.hooked


def test_over_http_wrong_requests_are_4xx_and_the_server_lives(built, http):
    _, found = http
    for (name, (_, reason)), answer in zip(REFUSED.items(), found["wrong"], strict=True):
        status, message, streamed_status, streamed = answer
        assert (status, streamed_status) == (400, 400), name
        assert reason in message and reason in streamed, name
    for name in ("misspelt", "beams"):
        status, message = found[name]
        assert status == 400 and "steer" in message, name
    assert found["lives"] and found["after"] == built.batch.hooked[1]
