"""`tt.convert` and `trimtab convert`: every conversion by one door, the loss first, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

import planted
import trimtab as tt
from cli.test_cli import Ran
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.results.tables import number
from trimtab.steering.together import Together

WORDS = {"toward": ["Z"], "away": ["Q"]}
SMALL: dict[str, Any] = {"max_prompts": 2, "max_new_tokens": 4}
OWN: dict[str, dict[str, Any]] = {
    "prompt": {"k": 1, "steps": 1, "top_k": 4},
    "soft": {"k": 1, "steps": 2},
}


@pytest.fixture(scope="module")
def behavior() -> Any:
    return planted.behavior(8, readout=WORDS)


@pytest.mark.parametrize("to", ["prompt", "soft", "rank-1", "bias", "ablation"])
def test_what_a_vector_becomes(
    llama: LanguageModel, behavior: Any, tmp_path: Path, to: str
) -> None:
    vector = planted.push(llama, scope="all")
    done = tt.convert(llama, behavior, vector, to, **OWN.get(to, {}), **SMALL)
    title = done.table().title
    assert f"residual {number(done.residual, 3)} ({done.lost})" in title
    figures = json.loads(done.save(tmp_path / "figures.json").read_text())
    assert figures["residual"] == pytest.approx(done.residual)
    if to in ("bias", "ablation"):
        assert done.measured is None and done.residual is not None and done.residual < 1e-4
        baked = tt.load(str(tt.bake(llama, done.lever, tmp_path / "baked").path))
        with done.lever.on(llama):
            hooked = llama.next_logits(["Cats?"])
        assert (baked.next_logits(["Cats?"]) - hooked).abs().max() < 1e-4
        return
    assert done.measured is not None and done.measured.gap is not None
    assert f"recovered: gap {done.measured.gap[0]:.2f}" in title
    assert figures["recovered"]["gap"][0] == pytest.approx(done.measured.gap[0])
    assert isinstance(done.lever, tt.Steering)
    assert "vectors" in figures["lever"] or done.lever.label == figures["lever"]


def test_one_vector_is_a_vector_and_several_are_together(
    llama: LanguageModel, behavior: Any
) -> None:
    both = planted.low_rank(llama, layers=(1,))
    one = tt.WeightSteering({("mlp", 1): both.left["mlp", 1]}, {("mlp", 1): both.right["mlp", 1]})
    assert isinstance(tt.convert(llama, behavior, both, "vector", **SMALL).lever, Together)
    lever = tt.convert(llama, behavior, one, "vector", **SMALL).lever
    assert isinstance(lever, tt.VectorSteering) and lever.site == "mlp_out"


def test_the_side_is_that_of_the_strength_unless_told(llama: LanguageModel, behavior: Any) -> None:
    vector = planted.push(llama, scope="all").at(-1.0)
    for direction, sign in ((None, -1), ("toward", 1)):
        done = tt.convert(llama, behavior, vector, "rank-1", direction=cast("Any", direction), **SMALL)
        assert done.measured is not None and done.measured.sign == sign


def test_refused_by_name_with_what_is_possible(llama: LanguageModel, behavior: Any) -> None:
    vector = planted.push(llama, scope="all")
    for lever, to, named in (
        (vector, "vector", "a vector"),
        (tt.prompt("Say Z."), "rank-1", "a prompt"),
        (planted.low_rank(llama), "bias", "a low-rank update"),
    ):
        with pytest.raises(TrimtabError, match=f"no such conversion from {named}") as caught:
            tt.convert(llama, behavior, lever, to)
        assert "a vector to prompt, soft, rank-1, bias, ablation" in caught.value.advice
    with pytest.raises(TrimtabError, match="steps") as caught:
        tt.convert(llama, behavior, vector, "rank-1", steps=3)
    assert "ridge" in caught.value.advice
    with pytest.raises(TrimtabError, match="direction"):
        tt.convert(llama, behavior, vector, "rank-1", direction="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TrimtabError, match="every token alike"):
        tt.convert(llama, behavior, planted.push(llama, scope="last"), "bias")


def test_words_and_mixtures_are_not_baked(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="prompt in words") as caught:
        tt.bake(llama, tt.prompt("Say Z."), tmp_path / "out")
    assert "Say Z." in caught.value.asked
    mixed: Any = [planted.push(llama, scope="all"), tt.prompt("Say Z.")]
    with pytest.raises(TrimtabError, match="PromptSteering"):
        tt.bake(llama, mixed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, behavior: Any) -> Path:
    """A model, a behavior and a vector on disk."""
    made = tmp_path_factory.mktemp("convert")
    lm = planted.language_model()
    lm.model.save_pretrained(made / "model")
    lm.tokenizer.save_pretrained(made / "model")
    content = {k: v for k, v in behavior.to_dict().items() if v not in (None, [])}
    (made / "opening.yaml").write_text(yaml.safe_dump(content))
    planted.push(lm, scope="all").save(made / "push.safetensors")
    return made


QUICK = ("--max-prompts", "2", "--max-new-tokens", "4")


def test_typed(folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = (folder / "model", folder / "opening.yaml")
    out, facts = tmp_path / "vector.safetensors", tmp_path / "facts.json"
    done = Ran(
        capsys, "convert", *given, "prefix:Say Z.", "--to", "vector", "-o", out, *QUICK,
        "--json", facts,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "prompt to vector: residual" in done.out and "wrote" in done.out
    written = json.loads(facts.read_text())
    lever = tt.load_steering(out)
    assert isinstance(lever, tt.VectorSteering) and written["lever"] == lever.label
    baked = tmp_path / "baked"
    done = Ran(capsys, "convert", *given, folder / "push.safetensors", "--to", "bias", "-o", baked)
    assert done.code == 0, done.err
    assert (baked / "config.json").is_file() and "exact" not in done.err
    done = Ran(capsys, "convert", *given, folder / "push.safetensors", "--to", "vector", "-o", out)
    assert done.code == 2 and "no such conversion from a vector" in done.err


def test_a_low_rank_update_goes_where_a_vector_goes(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """From the file: generate, measure with a null, inspect, bake, PEFT; GGUF is refused by name."""
    model, opening = folder / "model", folder / "opening.yaml"
    file, facts = tmp_path / "rank1.safetensors", tmp_path / "facts.json"
    done = Ran(
        capsys, "convert", model, opening, folder / "push.safetensors", "--to", "rank-1",
        "-o", file, *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    lever, lm = tt.load_steering(file), tt.load(str(model))
    with lever.at(2.0).on(lm):
        steered = lm.generate("Cats?", max_new_tokens=5)
    assert steered != lm.generate("Cats?", max_new_tokens=5)
    words = ("--max-new-tokens", "5", "--json", facts)
    done = Ran(capsys, "generate", model, "Cats?", "--with", file, "--strength", "2", *words)
    assert done.code == 0 and json.loads(facts.read_text())["answer"] == steered
    done = Ran(capsys, "measure", model, opening, file, "--nulls", "1", *QUICK, "--json", facts)
    assert done.code == 0, done.err
    names = [row["name"] for row in json.loads(facts.read_text())["rows"]]
    assert names == ["baseline", "rank-1 m=+1", "random control of rank-1 m=+1"]
    assert "rank-1" in Ran(capsys, "inspect", file).out
    done = Ran(capsys, "bake", model, file, "-o", tmp_path / "baked", "--json", facts)
    assert done.code == 0, done.err
    assert json.loads(facts.read_text())["equal_text"] is True
    done = Ran(capsys, "inspect", tmp_path / "baked")
    assert done.code == 0 and "rank-1 m=+1" in done.out
    done = Ran(capsys, "export", model, file, "--to", "peft", "-o", tmp_path / "adapter")
    assert done.code == 0, done.err
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    done = Ran(capsys, "export", model, file, "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert done.code == 2 and "no vector but rank-1" in done.err
    for words in (["prompt:Say Z."], [file, "--every-writer", "1"]):
        done = Ran(capsys, "bake", model, *words, "-o", tmp_path / "refused")
        assert done.code == 2 and not (tmp_path / "refused").exists()
