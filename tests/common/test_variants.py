"""One registry for every family of exchangeable parts."""

import json
from abc import abstractmethod

import pytest

import lightning_modules  # noqa: F401 - registers the families
import strategies  # noqa: F401
from common.variants import Variant, families, variants


class _Spice(Variant):
    @abstractmethod
    def taste(self) -> str: ...


class _Plain(_Spice):
    def __init__(self, amount: int = 2) -> None:
        self.amount = amount
        self.hidden = "no argument"

    def taste(self):
        return "plain"


class _Mixed(_Plain):
    def __init__(self, inner: _Spice, parts: list[_Spice] = [], sizes: tuple[int, ...] = (1,)) -> None:  # noqa: B006
        self.inner, self.parts, self.sizes = inner, parts, sizes

    @classmethod
    def examples(cls):
        return [cls(_Plain(3), [_Plain()])]


def test_concrete_subclasses_are_found_at_any_depth_each_once_by_name():
    class Other(_Plain): ...

    class Below(Other, _Mixed): ...

    assert variants(_Spice) == [Below, Other, _Mixed, _Plain]


def test_a_variant_describes_its_arguments_and_those_of_variants_inside():
    mixed = _Mixed.examples()[0]
    inner = {"class": "_Plain", "amount": 3}
    assert mixed.config() == {"inner": inner, "parts": [{"class": "_Plain", "amount": 2}], "sizes": [1]}
    assert mixed.describe() == {"class": "_Mixed", **mixed.config()}
    assert repr(mixed) == "_Mixed(inner=_Plain(amount=3), parts=[_Plain(amount=2)], sizes=(1,))"


def test_the_name_is_the_file_s_with_those_of_variants_inside():
    assert _Plain().name == "test_variants"
    assert _Mixed.examples()[0].name == "test_variants(test_variants)"


def test_the_law_tests_run_the_defaults_unless_a_variant_says_otherwise():
    assert [repr(one) for one in _Plain.examples()] == ["_Plain(amount=2)"]


@pytest.mark.parametrize("family", [one for one in families() if one is not _Spice], ids=lambda one: one.__name__)
def test_every_variant_of_every_family_has_examples_that_describe_themselves(family):
    found = variants(family)
    assert found
    for variant in found:
        for example in variant.examples():
            assert type(example) is variant and example.name
            assert example.describe() == {"class": variant.__name__, **example.config()}
            assert json.loads(json.dumps(example.describe())) == example.describe()
            assert repr(example).startswith(f"{variant.__name__}(")
