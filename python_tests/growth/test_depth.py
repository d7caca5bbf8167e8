"""Growth maps: what each operator copies where, and which maps are refused."""

from __future__ import annotations

import pytest

from stackbert_kernels.config import GROWTH_OPERATORS, ConfigError
from stackbert_kernels.growth.depth import IDENTITY, OPERATORS, RANDOM, check_map, layer_map

CASES = [
    ("copy_top", 3, 6, [0, 1, 2, 0, 1, 2]),
    ("copy_top", 6, 9, [0, 1, 2, 3, 4, 5, 3, 4, 5]),
    ("copy_top", 3, 4, [0, 1, 2, 2]),
    ("stack", 3, 6, [0, 1, 2, 0, 1, 2]),
    ("stack", 2, 6, [0, 1, 0, 1, 0, 1]),
    ("interleave", 3, 6, [0, 0, 1, 1, 2, 2]),
    ("interleave", 2, 6, [0, 0, 0, 1, 1, 1]),
    ("random", 2, 4, [0, 1, RANDOM, RANDOM]),
    ("identity", 2, 3, [0, 1, IDENTITY]),
]


@pytest.mark.parametrize(("operator", "old", "new", "rows"), CASES)
def test_maps(operator, old, new, rows):
    assert layer_map(operator, old, new) == rows


def test_every_operator_has_a_case_and_is_known_to_the_configuration():
    assert tuple(OPERATORS) == GROWTH_OPERATORS
    assert {operator for operator, *_ in CASES} == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_maps_can_be_applied_in_place(operator):
    """Whatever depths an operator accepts: no source above its row, so rows written last to first are never read after."""
    accepted = 0
    for old in range(1, 9):
        for new in range(old + 1, 25):
            try:
                rows = layer_map(operator, old, new)
            except ConfigError as error:
                assert "at most double" in str(error) or "needs a multiple" in str(error)
                continue
            accepted += 1
            assert len(rows) == new and all(source <= i and source < old for i, source in enumerate(rows))
    assert accepted >= 16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1], "layer map: must have 3 entries, one a layer, got 2"),
        ([0, 2, 1], "layer map: row 1 must copy one of rows 0-1 or be fresh, got 2"),
        ([0, 1, 2], "layer map: row 2 must copy one of rows 0-1 or be fresh, got 2"),
        ([0, -3, 1], "layer map: row 1 must copy one of rows 0-1 or be fresh, got -3"),
    ],
)
def test_refuses_maps(rows, message):
    with pytest.raises(ConfigError) as error:
        check_map(rows, 2, 3)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("operator", "old", "new", "message"),
    [
        ("double", 2, 4, "grow must be one of copy_top, stack, interleave, random, identity, got 'double'"),
        ("copy_top", 2, 5, "copy_top can at most double the depth, got 2 -> 5"),
        ("stack", 2, 5, "stack needs a multiple of the old depth, got 2 -> 5"),
        ("interleave", 4, 2, "interleave needs 0 < old depth < new depth, got 4 -> 2"),
    ],
)
def test_refuses_depths(operator, old, new, message):
    with pytest.raises(ConfigError) as error:
        layer_map(operator, old, new)
    assert str(error.value) == message
