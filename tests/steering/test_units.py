"""Strength in every unit, and the default layers."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.steering.layers import default_layers
from trimtab.steering.units import convert
from trimtab.steering.vector import VectorSteering

WIDTH = 16


def calibrated(**changes) -> VectorSteering:
    norms = {1: 8.0, 2: 12.0}
    values = {
        "directions": {layer: torch.ones(WIDTH) / math.sqrt(WIDTH) for layer in norms},
        "layers": (1, 2),
        "scales": {layer: mu / math.sqrt(WIDTH) for layer, mu in norms.items()},
        "strength": -2.0,
        "norms": norms,
        "class_gaps": {1: -4.0, 2: 3.0},
        "spreads": {1: 0.5},
        "n_layers": 4,
        "d_model": WIDTH,
    }
    return VectorSteering(**(values | changes))


def test_every_unit_by_hand():
    first, second = convert(calibrated()).rows
    assert (first.layer, first.m, first.alpha) == (1, -2.0, -4.0)
    assert (first.relative, first.class_gaps, first.spreads) == (-0.5, -1.0, -8.0)
    assert (second.alpha, second.relative, second.class_gaps) == (-6.0, -0.5, -2.0)
    assert second.spreads is None


def test_a_calibrated_strength_is_the_same_share_of_the_norm_at_every_layer():
    for m in (0.3, 1.0, 2.5):
        for row in convert(calibrated().at(m)).rows:
            assert row.relative == pytest.approx(m / math.sqrt(WIDTH), rel=1e-12)


def test_an_uncalibrated_vector_has_no_relative_units():
    row = convert(calibrated(norms={}, class_gaps={}, spreads={})).rows[0]
    assert row.alpha == -4.0
    assert (row.relative, row.class_gaps, row.spreads) == (None, None, None)


def test_an_ablation_has_no_alpha():
    row = convert(calibrated(operation="ablate", strength=1.0)).rows[0]
    assert row.m == 1.0 and row.alpha is None and row.relative is None


def test_the_table_prints_the_figures_and_the_nats():
    text = str(convert(calibrated(), nats=0.125))
    assert "-6.0000" in text and "-0.5000" in text and "-2.00" in text and "0.125 nats" in text
    assert convert(calibrated(), nats=0.125).to_dict()["nats"] == 0.125


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [
        (1, (0,)),
        (2, (0,)),
        (3, (1,)),
        (4, (1, 2)),
        (5, (1, 2, 3)),
        (8, (3, 4, 5, 6)),
        (10, (3, 4, 5, 6, 7, 8)),
        (32, tuple(range(12, 28))),
    ],
)
def test_default_layers(n_layers, expected):
    assert default_layers(n_layers) == expected


def test_default_layers_lie_between_40_and_90_percent():
    for n_layers in range(3, 130):
        for layer in default_layers(n_layers):
            assert 0.4 * n_layers <= layer + 1 + 1e-9 and layer + 1 <= 0.9 * n_layers + 1e-9
