"""Ranks of planted matrices, and what each null can and cannot see."""

from __future__ import annotations

import pytest
import torch

import planted
from trimtab.errors import TrimtabError
from trimtab.mechanism.geometry.rank import (
    Ranks,
    leading,
    measures,
    pair_differences,
    rank_row,
    spectrum,
)
from trimtab.models.hooking import first_tensor
from trimtab.models.model import LanguageModel

N, D = 40, 64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted_rank(k: int, noise: float = 0.03) -> torch.Tensor:
    """Strong rows in k dimensions, each with as much energy, without a mean; noise everywhere."""
    rows = torch.linalg.qr(drawn(N, k)).Q @ torch.linalg.qr(drawn(D, k, seed=1)).Q.T
    return rows * N**0.5 + noise * drawn(N, D, seed=2)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_planted_rank_is_found(k: int) -> None:
    row = rank_row(planted_rank(k), "planted", "here")
    assert row.above_null == k
    assert row.stable.value == pytest.approx(k, rel=0.15)
    assert row.participation.value == pytest.approx(k, rel=0.2)
    assert row.stable.value < row.stable.null_low and row.entropy.value < row.entropy.null_low
    assert sum(spectrum(planted_rank(k))[:k]) > 0.85


def test_exact_values() -> None:
    same = drawn(1, D).expand(N, D)
    found = measures(same)
    assert found["mean_share"] == pytest.approx(1) == found["resultant"]
    assert found["stable"] == pytest.approx(1) and found["entropy"] == pytest.approx(1, abs=1e-6)
    square = torch.eye(D, dtype=torch.float64)[:N]
    found = measures(square)
    for name in ("stable", "participation", "entropy"):
        assert found[name] == pytest.approx(N)
    assert found["mean_share"] == pytest.approx(1 / N)
    assert found["resultant"] == pytest.approx(N**-0.5)
    # s^2 = 4, 1: |D|^2 / s1^2 = 5/4, 25/17, exp(H(4/5, 1/5)).
    two = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    found = measures(two)
    assert found["stable"] == pytest.approx(5 / 4)
    assert found["participation"] == pytest.approx(25 / 17)
    assert found["entropy"] == pytest.approx(2.718281828459045**0.500402423538188)


def test_signs_of_rows_see_the_mean_and_are_blind_to_the_spectrum() -> None:
    rows = drawn(N, D) + 2 * drawn(1, D, seed=4)
    signs = torch.where(drawn(N, 1, seed=5) > 0, 1.0, -1.0)
    torch.testing.assert_close(spectrum(signs * rows), spectrum(rows))
    assert measures(signs * rows)["mean_share"] < 0.1 < measures(rows)["mean_share"]
    row = rank_row(rows, "shifted", "here")
    assert row.mean_share.value > row.mean_share.null_high
    assert row.mean_share.null == pytest.approx(1 / N, rel=0.8)
    assert row.stable.null > 3 * row.stable.value  # the entries' signs remove it from the spectrum


def test_noise_stands_out_of_no_null() -> None:
    row = rank_row(drawn(N, D), "noise", "here")
    assert row.above_null <= 1
    assert row.stable.null_low <= row.stable.value <= row.stable.null_high
    assert row.mean_share.value == pytest.approx(1 / N, rel=0.5)
    # The jackknife error of a mean share is about its spread over fresh draws.
    again = torch.tensor([measures(drawn(N, D, seed=s))["participation"] for s in range(30)])
    assert row.participation.error == pytest.approx(float(again.std()), rel=1.0)


def test_leading_directions_are_orthonormal_and_ordered() -> None:
    rows = planted_rank(3)
    basis = leading(rows)
    torch.testing.assert_close(basis @ basis.T, torch.eye(N, dtype=torch.float64))
    energies = (rows @ basis.T).square().sum(0)
    torch.testing.assert_close(energies / energies.sum(), spectrum(rows))


def test_differences_on_every_architecture(lm: LanguageModel) -> None:
    part = planted.behavior()
    moves = pair_differences(lm, part, [1, 3], max_pairs=5)
    assert {k: tuple(v.shape) for k, v in moves.items()} == {1: (5, lm.d_model), 3: (5, lm.d_model)}
    seen: list[torch.Tensor] = []

    def keep(module: object, args: tuple, output: object) -> None:
        hidden = first_tensor(output)
        assert hidden is not None
        seen.append(hidden)

    handle = lm.sites.blocks[1].register_forward_hook(keep)
    with handle:
        for example in (part.toward[2], part.away[2]):
            lm.next_logits([example.prompt])
    expected = (seen[0][0, -1] - seen[1][0, -1]).double()
    torch.testing.assert_close(moves[1][2], expected, rtol=1e-3, atol=1e-4)
    table = Ranks((rank_row(moves[3], "differences", "resid_post.3"),)).table()
    assert table.rows[0][2] == "5"


def test_refusals() -> None:
    with pytest.raises(TrimtabError, match="2 rows"):
        rank_row(drawn(2, D), "rows", "here")
    with pytest.raises(TrimtabError, match="zeros"):
        rank_row(torch.zeros(9, D), "rows", "here")
