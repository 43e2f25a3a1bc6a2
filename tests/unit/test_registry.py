"""The registry of plug-ins."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest

from core2_sampler.registry import Registry


def test_entries_are_found_by_name_and_imported_on_first_use():
    sys.modules.pop("colorsys", None)
    registry = Registry("number", {"fraction": "fractions:Fraction", "lazy": "colorsys:rgb_to_hsv"})

    @registry.register("zero")
    def zero() -> int:
        return 0

    assert registry.names() == ["fraction", "lazy", "zero"]
    assert "colorsys" not in sys.modules
    assert registry.get("zero") is zero
    assert registry.get("fraction") is Fraction
    assert registry.get("lazy") is sys.modules["colorsys"].rgb_to_hsv


def test_an_unknown_name_gets_the_nearest_match_and_the_list():
    registry = Registry("weak head", {"adapter": "a:b", "tap": "c:d"})
    with pytest.raises(
        ValueError, match="unknown weak head: got 'adaptor'; did you mean 'adapter'"
    ):
        registry.get("adaptor")
    with pytest.raises(ValueError, match="choose one of adapter, tap"):
        registry.get("zzz")


def test_names_are_not_taken_twice_and_lazy_entries_are_well_formed():
    registry = Registry("head", {"tap": "a:b"})
    with pytest.raises(ValueError, match="taken"):
        registry.register("tap")(object)
    with pytest.raises(ValueError, match="module:Attr"):
        Registry("head", {"tap": "nocolon"})
