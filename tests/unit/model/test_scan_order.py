"""Scans are permutations whose inverse undoes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm.model.scan_order import image_scan, parse_scans, text_scan

sides = st.integers(1, 9)


@given(height=sides, width=sides, pattern=st.integers(1, 4))
def test_image_scan_then_inverse_is_the_identity(height, width, pattern):
    order, inverse = image_scan(height, width, pattern)
    x = torch.randn(height * width)
    assert order.dtype == inverse.dtype == torch.int64
    assert torch.equal(x[order][inverse], x)
    assert torch.equal(x[inverse][order], x)


@given(length=st.integers(1, 50), pattern=st.integers(1, 2))
def test_text_scan_then_inverse_is_the_identity(length, pattern):
    order, inverse = text_scan(length, pattern)
    x = torch.randn(length)
    assert torch.equal(x[order][inverse], x)


def test_patterns_of_a_small_grid():
    assert image_scan(2, 3, 1)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert image_scan(2, 3, 2)[0].tolist() == [5, 4, 3, 2, 1, 0]
    assert image_scan(2, 3, 3)[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert image_scan(2, 3, 4)[0].tolist() == [5, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("pattern", [0, 5])
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=f"is {pattern}"):
        image_scan(2, 2, pattern)
    with pytest.raises(ValueError, match=f"is {pattern}"):
        text_scan(2, pattern)


def test_empty_shapes_are_refused():
    with pytest.raises(ValueError, match="0 x 3"):
        image_scan(0, 3, 1)
    with pytest.raises(ValueError, match="length is 0"):
        text_scan(0, 1)


def test_scan_strings():
    assert parse_scans("1234/12") == ((1, 2, 3, 4), (1, 2))
    for bad in ("", "12", "15/1", "12/3", "/1"):
        with pytest.raises(ValueError, match="1234/12"):
            parse_scans(bad)
