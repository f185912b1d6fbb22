"""The tilt against brute force: grids, autograd, plain bisection, and closed forms of two tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from trimtab.theory import peaks
from trimtab.theory.tilt import Tilt
from trimtab.theory.token_sets import concept_peak, window

ALPHAS = [-30.0, -2.0, -0.3, 0.0, 1e-3, 0.7, 5.0, 40.0]


def make(n: int = 4, vocab: int = 30, seed: int = 0, spread: float = 1.0) -> Tilt:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    slope = spread * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    return Tilt(logits, slope)


def brute(tilt: Tilt, alpha: float) -> Tensor:
    weights = (tilt.log_p0 + alpha * tilt.slope).exp()
    return weights / weights.sum(-1, keepdim=True)


def mean_slope(tilt: Tilt, alpha: float) -> Tensor:
    """E_alpha[s]."""
    return (tilt.log_probs(alpha).exp() * tilt.slope).sum(-1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_distribution_moments_and_divergences(alpha: float) -> None:
    tilt = make()
    p, p0, s = brute(tilt, alpha), brute(tilt, 0.0), tilt.slope
    assert close(tilt.log_probs(alpha).exp(), p)
    mean = (p * s).sum(-1)
    assert close(tilt.variance(alpha), (p * (s - mean[:, None]) ** 2).sum(-1))
    log_ratio = tilt.log_p0 - tilt.log_probs(alpha)
    assert close(tilt.kl(alpha), (p0 * log_ratio).sum(-1))


def test_psi_has_the_mean_and_the_variance_as_derivatives() -> None:
    tilt = make()
    alpha = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    psi = (tilt.log_p0 + alpha * tilt.slope).logsumexp(-1)
    for row in range(4):
        (first,) = torch.autograd.grad(psi[row], alpha, create_graph=True)
        (second,) = torch.autograd.grad(first, alpha, retain_graph=True)
        assert float(mean_slope(tilt, 0.8)[row]) == pytest.approx(first.item(), abs=1e-12)
        assert float(tilt.variance(0.8)[row]) == pytest.approx(second.item(), abs=1e-12)


def test_the_divergence_has_its_leading_order() -> None:
    tilt = make()
    errors = {a: float((tilt.kl(a) - tilt.quadratic_kl(a)).abs().max()) for a in (1e-2, 1e-3)}
    assert errors[1e-3] < 2e-3 * errors[1e-2]  # the rest is of third order


def test_alphas_of_every_shape_give_the_same_numbers() -> None:
    tilt = make()
    per_row = torch.tensor([0.5, -1.0, 2.0, 0.0])
    grid = torch.stack([per_row, torch.full((4,), 0.5)])
    for method in (tilt.kl, tilt.quadratic_kl, tilt.variance):
        assert method(0.5).shape == (4,)
        assert torch.equal(method(grid)[1], method(0.5))
        assert torch.equal(method(grid)[0], method(per_row))
        column = method(torch.tensor([[0.5], [-1.0], [2.0]]))
        assert torch.equal(column[1], method(-1.0))
    assert tilt.log_probs(grid).shape == (2, 4, 30)


def test_many_strengths_are_taken_in_parts() -> None:
    tilt = make(n=1, vocab=100_000)
    grid = torch.linspace(-3, 3, 60)[:, None]
    assert grid.numel() * tilt.slope.numel() > peaks.CELLS
    whole = tilt.kl(grid)
    assert close(whole, torch.stack([tilt.kl(alpha) for alpha in grid])) and whole.shape == (60, 1)


def test_a_constant_in_the_slopes_changes_nothing() -> None:
    tilt = make()
    steps = (tilt.slope * 2**20).round() / 2**20  # so that adding 2^20 is exact
    plain, shifted = Tilt(tilt.log_p0, steps), Tilt(tilt.log_p0, steps + 2.0**20)
    for alpha in (1e-3, 1.0, 50.0):
        assert close(shifted.kl(alpha), plain.kl(alpha), 1e-12)
        assert close(shifted.variance(alpha), plain.variance(alpha), 1e-12)
        assert close(shifted.log_probs(alpha), plain.log_probs(alpha), 1e-12)
    finite = plain.peaks().isfinite()
    assert close(shifted.peaks()[finite], plain.peaks()[finite])
    assert close(shifted.strength_for_kl(0.5), plain.strength_for_kl(0.5))
    assert close(concept_peak(shifted, [0, 1]), concept_peak(plain, [0, 1])) or bool(
        concept_peak(plain, [0, 1]).isinf().any()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_comes_in_and_float64_goes_out(dtype: torch.dtype) -> None:
    tilt = make()
    narrow = Tilt(tilt.log_p0.to(dtype), tilt.slope.to(dtype))
    assert narrow.kl(1.0).dtype == torch.float64
    assert float(narrow.log_p0.exp().sum(-1).sub(1).abs().max()) < 1e-14
    wide = Tilt(narrow.log_p0, tilt.slope.to(dtype).double())
    assert close(narrow.log_probs(3.0), wide.log_probs(3.0), 1e-13)


def test_very_large_strengths_stay_finite() -> None:
    tilt = make()
    for alpha in (1e6, -1e6, 1e12):
        p = tilt.log_probs(alpha).exp()
        assert torch.equal(p.argmax(-1), tilt.collapse_token(1 if alpha > 0 else -1))
        assert float(p.max(-1).values.min()) == 1.0
        assert bool(tilt.kl(alpha).isfinite().all())
        assert close(mean_slope(tilt, alpha).abs(), (tilt.slope * math.copysign(1, alpha)).amax(-1))


@pytest.mark.parametrize("kappa", [1e-4, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_strength_for_kl_inverts_kl(kappa: float, sign: int) -> None:
    tilt = make(spread=0.01)
    alpha = tilt.strength_for_kl(kappa, sign)
    assert bool((sign * alpha > 0).all())
    assert close(tilt.kl(alpha), torch.full((4,), kappa, dtype=torch.float64), 1e-12)


def test_strength_for_kl_at_the_edges() -> None:
    still = Tilt(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]))
    assert still.strength_for_kl(0.5)[0] == math.inf and still.strength_for_kl(0.5, -1)[0] < -1e9
    assert torch.equal(still.strength_for_kl(0.0), torch.zeros(2, dtype=torch.float64))
    # all mass on a token but for exp(-800), which exp() rounds to 0
    rare = Tilt(torch.tensor([[0.0, -800.0]]), torch.tensor([[0.0, 2.0]]))
    assert float(rare.kl(rare.strength_for_kl(3.0))) == pytest.approx(3.0, rel=1e-12)


def bisected_peak(tilt: Tilt, row: int, token: int) -> float:
    """Solve the token's equation in the plainest way."""
    target, low, high = float(tilt.slope[row, token]), -1e4, 1e4
    alone = Tilt(tilt.log_p0[row : row + 1], tilt.slope[row : row + 1])
    for _ in range(200):
        middle = 0.5 * (low + high)
        below = float(mean_slope(alone, middle)) < target
        low, high = (middle, high) if below else (low, middle)
    return low


def test_peaks_solve_their_equation_and_follow_the_slopes() -> None:
    tilt = make()
    found = tilt.peaks()
    for row, token in itertools.product(range(2), range(30)):
        if math.isfinite(alpha := float(found[row, token])):
            assert alpha == pytest.approx(bisected_peak(tilt, row, token), abs=1e-10, rel=1e-10)
    order = tilt.slope.argsort(dim=-1)
    sorted_peaks = found.gather(1, order)
    assert bool((sorted_peaks[:, 1:] > sorted_peaks[:, :-1]).all())
    positive = tilt.slope > mean_slope(tilt, 0.0)[:, None]
    assert torch.equal(found > 0, positive)
    assert torch.equal(found.isinf().sum(-1), torch.tensor([2, 2, 2, 2]))
    assert torch.equal(found.argmax(-1), tilt.collapse_token(1))
    assert torch.equal(found.argmin(-1), tilt.collapse_token(-1))


def test_log_probability_is_highest_at_the_peak() -> None:
    tilt = make()
    found = tilt.peaks()
    grid = torch.linspace(-20, 20, 8001, dtype=torch.float64)[:, None]
    seen = grid[:, 0][tilt.log_probs(grid).argmax(dim=0)]
    inside = found.abs() < 20
    assert int(inside.sum()) > 100
    assert float((seen - found)[inside].abs().max()) <= 0.0025 + 1e-9


def test_peaks_with_ties_single_tokens_and_constant_slopes() -> None:
    slope = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.5, 0.5], [2.0] * 6])
    found = Tilt(torch.zeros(2, 6), slope).peaks()
    expected = [-math.inf, math.inf, math.inf, -math.inf, 0.0, 0.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-15)
    assert bool(found[1].isnan().all())


def test_peak_of_a_token_that_holds_nearly_everything() -> None:
    # psi' is flat where the middle token has all but 1e-10 of the mass: only by the equation itself.
    tilt = Tilt(
        torch.tensor([[0.0, math.log(1e-10), math.log(1e-40)]], dtype=torch.float64),
        torch.tensor([[0.0, 5, 10]]),
    )
    assert float(tilt.peaks()[0, 1]) == pytest.approx(40 * math.log(10) / 10, rel=1e-12)


@pytest.mark.parametrize("kind", ["normal", "heavy", "clumps", "plateaus", "single precision"])
def test_the_table_for_large_vocabularies_agrees_with_the_equation(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    vocab = 2500
    log_p0 = torch.log_softmax(
        3 * torch.randn(vocab, generator=generator, dtype=torch.float64), dim=-1
    )
    s = torch.randn(vocab, generator=generator, dtype=torch.float64)
    if kind == "heavy":
        s = s**3
    elif kind == "clumps":
        s = 1e-3 * s + torch.arange(vocab) % 3
    elif kind == "plateaus":
        s = 0.01 * s
        s[:3] = torch.tensor([5.0, 10.0, -4.0])
        log_p0 = torch.log_softmax(log_p0.index_fill(0, torch.tensor([0, 1]), -40.0), dim=-1)
    elif kind == "single precision":
        s = (1e-2 * s.float()).double()
    from_top = s.max() - s
    rising = (from_top > 0) & (from_top < log_p0.exp() @ from_top)
    assert int(rising.sum()) * vocab > peaks.DIRECT
    ids = from_top.masked_fill(~rising, math.inf).argsort()[: int(rising.sum())]
    ids = torch.cat([ids[:40], ids[40::40]])
    found, some = Tilt(log_p0[None], s[None]).peaks()[0, ids], from_top[ids]
    low, high = torch.zeros_like(some), torch.full_like(some, 2.0**40)
    for _ in range(100):
        middle = 0.5 * (low + high)
        weights = torch.softmax(log_p0 - middle[:, None] * from_top, dim=-1)
        above = (weights * (from_top - some[:, None])).sum(-1) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    scale = high.abs().clamp_min(0.1 / float(from_top.var().sqrt()))
    assert float(((found - high).abs() / scale).max()) < 1e-6


def test_concept_log_odds_against_masses_and_the_two_cumulants() -> None:
    tilt, tokens = make(), [2, 5, 11]
    mask = torch.zeros(30, dtype=torch.bool)
    mask[tokens] = True
    p0 = tilt.log_p0.exp()

    def cumulant(inside: Tensor, alpha: float) -> Tensor:
        conditional = p0[:, inside] / p0[:, inside].sum(-1, keepdim=True)
        return (conditional * (alpha * tilt.slope[:, inside]).exp()).sum(-1).log()

    at_zero = torch.logit(p0[:, mask].sum(-1))
    for alpha in (-3.0, 0.0, 2.0):
        mass = brute(tilt, alpha)[:, mask].sum(-1)
        assert close(tilt.concept_probability(tokens, alpha), mass)
        law = at_zero + cumulant(mask, alpha) - cumulant(~mask, alpha)
        assert close(tilt.concept_log_odds(mask, alpha), law)
        step = 1e-6
        rate = tilt.concept_log_odds(tokens, alpha + step)
        rate = (rate - tilt.concept_log_odds(tokens, alpha - step)) / (2 * step)
        assert close(tilt.concept_slope(tokens, alpha), rate, 1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_concept_peak_and_window_against_a_fine_grid(sign: int, seed: int) -> None:
    tilt, tokens = make(n=6, seed=seed), [0, 1, 2]
    grid = sign * torch.linspace(0, 60, 60001, dtype=torch.float64)
    odds = torch.cat([tilt.concept_log_odds(tokens, g[:, None]) for g in grid.split(1000)])
    peak = concept_peak(tilt, tokens, sign)
    in_concept = tilt.collapse_token(sign) <= 2
    assert torch.equal(peak.isinf(), in_concept)
    seen = grid[odds.argmax(dim=0)]
    assert float((seen - peak)[~in_concept].abs().max()) <= 1e-3
    assert bool((peak * sign >= 0).all())
    target = 0.3
    low, high = window(tilt, tokens, target, 0.5, sign)
    reached = (odds >= math.log(target / (1 - target))).double()
    for row in range(6):
        if bool(reached[:, row].any()):
            first = float(grid[int(reached[:, row].argmax())])
            assert abs(first - float(low[row])) <= 1e-3
            if float(low[row]) != 0:
                assert float(tilt.concept_probability(tokens, low)[row]) == pytest.approx(
                    target, abs=1e-10
                )
        else:
            assert math.isnan(float(low[row]))
    assert torch.equal(high, tilt.strength_for_kl(0.5, sign))


def test_concept_peak_is_zero_where_steering_only_takes_away() -> None:
    tilt = Tilt(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]]))
    assert float(concept_peak(tilt, [0])) == 0.0
    assert float(concept_peak(tilt, [1])) == pytest.approx(0.0, abs=1e-12)
    assert (
        float(concept_peak(tilt, [2])) == math.inf
        and float(concept_peak(tilt, [0], -1)) == -math.inf
    )
    low, _ = window(tilt, [0], 0.5, 1.0)
    assert math.isnan(float(low))
    low, _ = window(tilt, [0, 1], 0.5, 1.0)
    assert float(low) == 0.0  # it has the target unsteered


def test_concept_that_shares_the_extreme_slope() -> None:
    # At infinity the tied tokens keep their ratio 3 : 1, so C approaches 3 / 4 from below.
    tilt = Tilt(torch.tensor([[0.75, 0.25, 1.0]]).log(), torch.tensor([[1.0, 1.0, 0.0]]))
    assert float(concept_peak(tilt, [0])) == math.inf
    low, _ = window(tilt, [0], 0.7, 1.0)
    assert float(tilt.concept_probability([0], low)) == pytest.approx(0.7, abs=1e-10)
    assert math.isnan(float(window(tilt, [0], 0.8, 1.0)[0]))


def test_two_tokens_have_a_logistic_law() -> None:
    tilt = Tilt(torch.tensor([[0.1, 0.9]], dtype=torch.float64).log(), torch.tensor([[2.0, -1.0]]))
    low, high = window(tilt, [0], 0.5, 0.3)
    assert float(low) == pytest.approx(math.log(9) / 3, rel=1e-12)
    assert float(tilt.kl(high)) == pytest.approx(0.3, rel=1e-12)
    assert float(window(tilt, [0], 1 - 1e-6, 1.0)[0]) == pytest.approx(
        (math.log(9) + math.log(1e6 - 1)) / 3, rel=1e-9
    )


def test_collapse_token_of_a_tie_is_the_likeliest() -> None:
    tilt = Tilt(torch.tensor([[0.0, 2.0, 1.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.5, 0.0]]))
    assert int(tilt.collapse_token()) == 1 and int(tilt.collapse_token(-1)) == 3
