"""The engine vllm: sweeps, measurements and tuning give what the local engine gives."""

from __future__ import annotations

from typing import Any

import pytest

from interop.check_serve import plugin  # noqa: F401  (the entry point, for the other interpreter)
from interop.programs import call

PARTS = ("answers", "sweep", "measure", "tune")
# Of a report of `tune`, what is not a finding.
CLOCK = {"model_calls", "seconds"}


@pytest.fixture(scope="module")
def single(plugin, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    asked = {"dtype": "float32", "parts": PARTS}
    return call("vllm", "engine_answers.py", asked, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def half(plugin, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    asked = {"dtype": "bfloat16", "parts": ["answers"]}
    return call("vllm", "engine_answers.py", asked, tmp_path_factory.mktemp("engine"))


def apart(mine: list[Any], theirs: list[Any]) -> int:
    return sum(a != b for a, b in zip(mine, theirs, strict=True))


def test_answers(single, record_property):
    plain, steered = single["answers"]["plain"], single["answers"]["steered"]
    differing = apart(steered["local"], steered["vllm"])
    record_property("float32", f"{differing} of {len(steered['vllm'])} steered answers differ")
    assert len(set(steered["local"])) > 100
    assert differing == apart(*plain) == 0


def test_a_sweep(single, record_property):
    local, vllm = single["sweep"]
    assert len(local["rows"]) == 11 and len({row["score"] for row in local["rows"]}) >= 3
    differing = apart(local["rows"], vllm["rows"])
    record_property("sweep", f"{differing} of {len(local['rows'])} rows differ")
    texts = [[s for row in each["rows"] for s in row["samples"]] for each in (local, vllm)]
    assert len(texts[0]) > 20 and apart(*texts) == 0
    assert differing == 0


def test_a_measurement_with_prompts_and_nulls(single, record_property):
    local, vllm = single["measure"]
    differing = apart(local["rows"], vllm["rows"])
    record_property("measure", f"{differing} of {len(local['rows'])} rows differ")
    kinds = {row["kind"] for row in local["rows"]}
    assert kinds == {"baseline", "prompt", "vector", "lever", "null"}
    assert differing == 0 and local == vllm


def test_tuning_chooses_the_same(single, record_property):
    local, vllm = ({k: v for k, v in each.items() if k not in CLOCK} for each in single["tune"])
    record_property("tune", f"layers {vllm['layers']}, {vllm['scope']}, m = {vllm['strength']:.4f}")
    for name in ("layers", "scope", "strength", "score", "window"):
        assert vllm[name] == local[name], name
    assert vllm == local


def test_what_vllm_cannot_do_is_done_here(single):
    assert set(single["answered_here"]) == {"the scope post_instruction"}
    # Eight layers of a vector and of two nulls, which its levers and `tune` have in common.
    assert single["files"] == 3 * 8


def test_nothing_is_left(single, half):
    for found in (single, half):
        assert any("VLLM" in name for name in found["while_open"])
        assert found["left"] == {"processes": [], "folder": False, "environment": False}


def test_half_precision(half, record_property):
    """Batches that round differently choose another word now and then, here and there alike."""
    steered = half["answers"]["steered"]
    here, there = (apart(steered["alone"], steered[name]) for name in ("local", "vllm"))
    record_property(
        "bfloat16",
        f"of {len(steered['alone'])} steered answers {here} differ between transformers' own "
        f"batches of one and of many, {there} between those and vLLM",
    )
    assert max(here, there) <= len(steered["alone"]) // 4


def test_speed(single, record_property):
    seconds = single["answers"]["seconds"]
    local, vllm = min(seconds["local"]), min(seconds["vllm"])
    record_property(
        "21 strengths x 24 prompts x 40 tokens",
        f"local {local:.1f} s, vllm {vllm:.1f} s ({local / vllm:.2f} times as fast), "
        f"start {seconds['start']:.0f} s",
    )
    assert local > 0 and vllm > 0
