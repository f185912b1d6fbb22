from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tiny
from serving import direction, fill, served, term, vector
from trimtab import load
from trimtab.cli.app import app
from trimtab.errors import TrimtabError
from trimtab.serve import SCOPES, Served, Term, VectorRegistry, terms
from trimtab.serve.prefix import block_key, salt
from trimtab.serve.registry import EMBEDDED
from trimtab.serve.request import RESOLVED, pack, unpack
from trimtab.serve.step import StepWeights
from trimtab.steering.prompt import prompt
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.language_model("llama")


@pytest.fixture
def registry(lm: Any, tmp_path: Path) -> VectorRegistry:
    return fill(tmp_path, lm)


@pytest.fixture
def folder(registry: VectorRegistry) -> Path:
    return registry.folder


# --- the registry


def test_files_become_entries_in_the_order_of_their_names(registry):
    assert list(registry.entries) == ["mood", "tone"] and not registry.refused
    assert [entry.column for entry in registry.entries.values()] == [0, 1]
    # What enters block 3 leaves block 2; before block 0 there is none.
    assert list(registry.entries["tone"].steps) == [EMBEDDED, 2]
    assert registry.layers == [EMBEDDED, 1, 2]


def test_a_layers_vectors_are_what_strength_one_adds(lm, registry):
    behind = registry.vectors(2)
    torch.testing.assert_close(behind[0], 2.0 * direction(lm.d_model, 2))
    torch.testing.assert_close(behind[1], 2.0 * direction(lm.d_model, 8))
    assert not registry.vectors(1)[1].any()


def test_what_does_not_fit_is_refused_by_name_and_the_rest_is_served(lm, folder):
    wide = tiny.language_model("gpt2")
    mood = vector(lm)
    files = {
        "ablate": (mood.select(operation="ablate"), "the operation ablate"),
        "mlp": (mood.select(site="mlp_out"), "the site mlp_out"),
        "window": (mood.select(scope="[0,4)"), r"the scope \[0,4\)"),
        "instructed": (mood.select(scope="post_instruction"), "the scope post_instruction"),
        "foreign": (VectorSteering(**{**vars(mood), "fingerprint": "0" * 64}), "fingerprint"),
        "other": (vector(wide), "fingerprint"),
        "words": (prompt("Be kind."), "a prompt"),
        "a b": (mood, "the name 'a b'"),
    }
    for name, (lever, _) in files.items():
        lever.save(folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    found = VectorRegistry.read(folder, served(lm))
    assert list(found.entries) == ["mood", "tone"]
    assert set(found.refused) == {*files, "broken"}
    for name, (_, reason) in files.items():
        with pytest.raises(TrimtabError, match=reason):
            terms({"steer": [name]}, found)
    with pytest.raises(TrimtabError, match="registered are: mood, tone"):
        found.entry("nobody")


def test_another_width_is_refused(lm, folder):
    narrow = Served("tiny", lm.n_layers, lm.d_model // 2)
    with pytest.raises(TrimtabError, match=f"width {lm.d_model // 2} instead of {lm.d_model}"):
        VectorRegistry.read(folder, narrow)


def test_an_unchecked_fingerprint_lets_the_shape_decide(lm, folder):
    assert list(VectorRegistry.read(folder, Served("copy", lm.n_layers, lm.d_model)).entries)


def test_an_empty_folder_is_refused(lm, tmp_path):
    for where in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrimtabError, match="no steering file there"):
            VectorRegistry.read(where, served(lm))


def test_another_process_reads_the_same_or_refuses(lm, registry, folder):
    again = VectorRegistry.from_record(registry.record())
    assert again.digest == registry.digest and again.layers == registry.layers
    vector(lm, (2,), seed=9).save(folder / "mood.safetensors")
    with pytest.raises(TrimtabError, match="other files in this process"):
        VectorRegistry.from_record(registry.record())


# --- requests


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("mood", [("mood", 1.5, "all")]),
        ("tone", [("tone", 1.0, "last")]),
        ("mood:-2", [("mood", -2.0, "all")]),
        ("mood:1e-1@generated", [("mood", 0.1, "generated")]),
        ("mood@prompt", [("mood", 1.5, "prompt")]),
        (["mood:1", "tone:2@all"], [("mood", 1.0, "all"), ("tone", 2.0, "all")]),
        (["mood:1", "mood:2@last"], [("mood", 1.0, "all"), ("mood", 2.0, "last")]),
        ({"mood": 3, "tone@prompt": -1.0}, [("mood", 3.0, "all"), ("tone", -1.0, "prompt")]),
        ("mood:0", []),
        ([], []),
        (None, []),
    ],
)
def test_what_a_request_writes(registry, written, expected):
    found = terms({"steer": written, "session_id": "x"}, registry)
    names = {entry.column: name for name, entry in registry.entries.items()}
    assert [(names[term.column], term.strength, term.scope) for term in found] == expected
    assert unpack({RESOLVED: pack(found)}) == found


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"steer": "nobody"}, "no vector of that name"),
        ({"steer": "mood:much"}, "not a finite number"),
        ({"steer": "mood:"}, "not a finite number"),
        ({"steer": "mood:inf"}, "not a finite number"),
        ({"steer": {"mood": True}}, "not a finite number"),
        ({"steer": {"mood": None, "tone": [1]}}, "not a finite number"),
        ({"steer": {"mood:1": 2.0}}, "names no vector"),
        ({"steer": "mood:1e38"}, "more than the model's numbers hold"),
        ({"steer": "mood:1@[2,5)"}, "by what a token is"),
        ({"steer": "mood:1@post_instruction"}, "where the user's text ends"),
        ({"steer": "mood:1@some"}, "no such scope"),
        ({"steer": ["mood", 3]}, "names no vector"),
        ({"steer": 3}, "names no vector"),
        ({"steer": ""}, "names no vector"),
        ({"steering": "mood"}, "no such key"),
        ({"Steer_strength": 2}, "no such key"),
    ],
)
def test_what_cannot_be_served_is_refused(lm, folder, extra, reason):
    limits = Served("tiny", lm.n_layers, lm.d_model, largest=1e30)
    with pytest.raises(TrimtabError, match=reason):
        terms(extra, VectorRegistry.read(folder, limits))


# --- tokens of a step


def by_scope(found: Sequence[Term], positions: Tensor, length: int, vectors: int) -> Tensor:
    """The weights of one request's tokens from `Scope.mask`, `[tokens, vectors]`."""
    table = torch.zeros(len(positions), vectors)
    for each in found:
        rows = positions[None], torch.ones(1, len(positions), dtype=torch.bool)
        mask = Scope.parse(each.scope).mask(*rows, prompt_length=torch.tensor([length]))
        table[:, each.column] += mask[0].float() * each.strength
    return table


REQUESTS: dict[str, list[Term]] = {
    "plain": [],
    **{scope: [term(n % 3, n + 1.0, scope)] for n, scope in enumerate(SCOPES)},
    "both": [term(0, 2.0, "prompt"), term(0, -0.5, "all"), term(2, 1.5, "generated")],
}


def step_of(
    step: StepWeights, names: list[str], computed, scheduled, lengths, fresh=True
) -> Tensor:
    arrays = [np.array(numbers) for numbers in (computed, scheduled, lengths)]
    step.fill(names, lambda name: REQUESTS[name], *arrays, fresh=fresh)
    return step.values[: sum(scheduled)].clone()


def test_a_step_in_chunks_is_weighted_as_the_scopes_say():
    step = StepWeights(200, 3, CPU)
    names = list(REQUESTS)
    lengths = [7, 1, 12, 5, 9, 20]
    generator = np.random.default_rng(0)
    computed = np.zeros(len(names), dtype=int)
    for _ in range(12):
        scheduled = generator.integers(1, 6, len(names))
        found = step_of(step, names, computed, scheduled, lengths, fresh=False)
        spans = zip(names, computed, computed + scheduled, lengths, strict=True)
        expected = [by_scope(REQUESTS[n], torch.arange(a, b), p, 3) for n, a, b, p in spans]
        torch.testing.assert_close(found, torch.cat(expected))
        computed = computed + scheduled
    assert (computed > lengths).all()


def test_an_unsteered_step_after_steered_ones_is_zero_at_every_row():
    step = StepWeights(50, 3, CPU)
    assert step_of(step, ["all"], [0], [40], [40]).any()
    assert step_of(step, ["all"], [40], [1], [40], fresh=False).any()
    assert not step_of(step, ["plain"], [0], [50], [50]).any()


def test_requests_that_change_places_keep_their_own_weights():
    step = StepWeights(50, 3, CPU)
    first = step_of(step, ["all", "plain"], [0, 0], [2, 3], [9, 9], fresh=False)
    second = step_of(step, ["plain", "all"], [2, 3], [3, 2], [9, 9], fresh=False)
    assert torch.equal(first[:2], second[3:]) and not second[:3].any()


def test_an_id_that_is_taken_again_is_looked_up_again():
    step, meant = StepWeights(50, 3, CPU), {"id": REQUESTS["all"]}
    ask = ["id"], lambda name: meant[name], *(np.array([n]) for n in (0, 4, 4))
    step.fill(*ask, fresh=True)
    meant["id"] = []
    step.fill(*ask, fresh=True)
    assert not step.values.any()


# --- the prefix cache


def test_a_blocks_key_says_which_of_its_tokens_are_steered_how():
    """Two blocks have one key exactly if their tokens have equal weights."""
    seen: dict[str | None, Tensor] = {}
    chosen = itertools.product(SCOPES, (2.0, -1.0), (3, 8, 11, 30))
    for (scope, strength, length), start in itertools.product(chosen, (0, 8, 16)):
        found = [term(0, strength, scope)]
        key = block_key(found, start, start + 8, length)
        mine = by_scope(found, torch.arange(start, start + 8), length, 1)
        assert (key is None) == (not mine.any())
        assert torch.equal(seen.setdefault(key, mine), mine)
        for other, theirs in seen.items():
            assert (other == key) == torch.equal(theirs, mine)


def test_a_key_tells_vectors_apart_and_does_not_ask_for_their_order():
    one, other = term(0, 1.0, "all"), term(1, 1.0, "all")
    assert block_key([one], 0, 8, 4) != block_key([other], 0, 8, 4)
    assert block_key([one, other], 0, 8, 4) == block_key([other, one], 0, 8, 4)
    assert block_key([one], 0, 8, 4) != block_key([one, one], 0, 8, 4)


def test_no_salt_of_a_user_is_a_salt_of_a_steering():
    steered = salt(None, [term(0, 1.0, "all")], 9)
    assert steered and steered != salt(None, [term(0, 1.0, "all")], 10)
    assert salt("mine", [term(0, 1.0, "all")], 9) not in (steered, "mine")
    assert salt(steered, [], 9) != steered
    assert salt("mine", [], 9) == "mine" and salt(None, [], 9) is None


# --- the command


def test_the_command_starts_stock_vllm_with_the_folder(tmp_path):
    lm = load("harbor")
    vector(lm).save(tmp_path / "mood.safetensors")
    arguments = [
        "serve",
        "harbor",
        "--steer",
        str(tmp_path),
        "--dry-run",
        "--port",
        "8123",
        "-tp",
        "2",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "vllm.entrypoints" in done.stdout and "harbor/model" in done.stdout
    assert done.stdout.strip().endswith("--port 8123 -tp 2")
    assert "mood: m=1, scope all" in done.stderr


def test_the_command_refuses_a_folder_without_vectors(tmp_path):
    done = CliRunner().invoke(app, ["serve", "harbor", "--steer", str(tmp_path), "--dry-run"])
    assert isinstance(done.exception, TrimtabError)
