"""Which layers, how many tokens, and what is refused."""

from math import ceil

import pytest

from lightning_modules.token_pruning.schedule import Schedule, preset


def test_the_defaults_are_the_published_schedule():
    # eight points fit Qwen2-7B's 28 layers, ten fit Mistral's 32
    assert preset("keep07").resolve(28) == preset("sdtp07").resolve(28) == [4, 7, 10, 13, 16, 19, 22, 25]
    assert Schedule(first=3, step=3, count=10).resolve(32)[-1] == 30


@pytest.mark.parametrize(("depth", "layers"), [(30, [4, 7, 10, 13, 16, 19, 22, 25]), (6, [1, 2, 3, 4]), (2, [])])
def test_stages_follow_the_models_depth(depth, layers):
    if layers:
        assert Schedule().resolve(depth) == layers
    else:
        with pytest.raises(ValueError, match="2 layers"):
            Schedule().resolve(depth)
    assert Schedule(layers=[1]).resolve(56) == [1] and Schedule().resolve(56) == [8, *range(14, 51, 6)]


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7])
def test_presets_shrink_geometrically(keep):
    name, protected = f"0{10 * keep:.0f}", 4 + 409
    left = [keep ** (stage + 1) for stage in range(8)]
    budgets = [preset(f"keep{name}").budget(stage, 4096) for stage in range(8)]
    assert budgets == [protected + ceil(share * (4096 - protected)) for share in left]
    published = [preset(f"sdtp{name}").budget(stage, 4096) for stage in range(8)]
    assert published == [max(protected, ceil(share * 4096)) for share in left]
    assert preset(f"keep{name}").starved(4096, 28) == []
    below = [layer for share, layer in zip(left, range(4, 28, 3), strict=True) if ceil(share * 4096) <= protected]
    assert preset(f"sdtp{name}").starved(4096, 28) == below and bool(below) == (keep == 0.7)


def test_exact_products_are_not_rounded_up():
    assert Schedule(keep=0.7, tail=0.0, min_tail=1, sinks=0).budget(0, 11) == 8


def test_a_list_gives_shares_of_the_original():
    schedule = Schedule(layers=[1, 3], keep=[0.8, 0.4], of="prompt")
    assert [schedule.budget(stage, 1000) for stage in (0, 1)] == [800, 400]
    assert schedule.lengths(1000, 6) == [1000, 1000, 800, 800, 400, 400]
    of_the_rest = Schedule(layers=[1, 3], keep=[0.8, 0.4])  # 4 + 100 are protected
    assert [of_the_rest.budget(stage, 1000) for stage in (0, 1)] == [104 + 717, 104 + 359]


def test_absolute_budgets_do_not_grow_with_the_prompt():
    schedule = Schedule(layers=[1, 3], tokens=[300, 200], tail=0.0, of="prompt")
    assert [schedule.budget(1, length) for length in (50, 200, 10_000)] == [50, 200, 200]
    assert Schedule(layers=[1, 3], tokens=250, tail=0.0).lengths(1000, 5) == [1000, 1000, 286, 286, 286]
    assert Schedule(layers=[1], tokens=250, tail=0.0).budget(0, 100) == 100


def test_protection_is_of_the_original_length_and_raises_the_budget():
    schedule = Schedule(layers=[1, 3, 5], keep=0.2, of="prompt", min_tail=16)
    # 0.2³ of 1000 is 8, but 4 sinks and a tenth of the original prompt stay
    assert schedule.lengths(1000, 8)[-1] == 104
    protected = schedule.protected(1000)
    assert protected[:4].all() and protected[-100:].all() and int(protected.sum()) == 104
    assert int(schedule.protected(50).sum()) == 4 + 16 and int(schedule.protected(10).sum()) == 10


def test_spans_stay_and_count_towards_the_budget():
    schedule = Schedule(keep=0.1, of="prompt", min_tail=16, spans=[(40, 60), (55, 70)])
    assert schedule.protected(300)[40:70].all() and schedule.budget(0, 300) == 4 + 30 + 30
    assert int(schedule.protected(50).sum()) == 4 + 16 and schedule.budget(0, 50) == 20  # the tail begins at 34


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.1}, "keep"),
        ({"keep": []}, "keep"),
        ({"keep": [0.5, 0.9]}, "keep must not rise"),
        ({"tokens": 0}, "empty"),
        ({"tokens": [10, 0]}, "empty"),
        ({"tokens": [10, 20]}, "tokens must not rise"),
        ({"layers": []}, "layers"),
        ({"layers": [3, 3]}, "layers"),
        ({"layers": [5, 3]}, "ascending"),
        ({"step": 0}, "step"),
        ({"first": -1}, "first"),
        ({"count": 0}, "count"),
        ({"sinks": -1}, "sinks"),
        ({"tail": 1.5}, "tail"),
        ({"min_tail": 0}, "last token"),
        ({"of": "all"}, "of must be"),
        ({"pool": 0}, "pool"),
        ({"pool": 4}, "odd"),
        ({"spans": [(5, 5)]}, "spans"),
        ({"spans": [(-3, 5)]}, "spans"),
    ],
)
def test_bad_values_are_named(arguments, names):
    with pytest.raises(ValueError, match=names):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"layers": [4, 7]}, "the model has 8 layers.*1 of these stages fit"),
        ({"layers": [6, 40]}, r"\[6, 40\] are not all within 0 … 6"),
        ({"first": 9}, "not all within"),
        ({"count": 10}, "6 of these stages fit"),
        ({"layers": [1, 3], "keep": [0.5]}, "keep has 1 values for 2 stages"),
        ({"layers": [1, 3], "tokens": [9, 9, 9]}, "tokens has 3 values for 2 stages"),
    ],
)
def test_what_does_not_fit_the_model_is_named(arguments, names):
    with pytest.raises(ValueError, match=names):
        Schedule(**arguments).resolve(8)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="keep09, keep08, keep07, sdtp09"):
        preset("keep06")
