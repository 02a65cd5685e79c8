"""What a sweep's file becomes: runs with names, arguments, places and keys."""

import json
import re

import pytest
import yaml

from bench.sweep.plan import located, plan, select
from common.variants import variants
from strategies.compressors import Compressor
from tests.conftest import ROOT

BASE = "configs/bench/base.yaml"
SWEEPS = [
    path for path in sorted((ROOT / "configs/bench").glob("*.yaml")) if "axes" in yaml.safe_load(path.read_text())
]
AXES = {
    "method": {
        "none": {"trainer.strategy.compressor": "NoCompression"},
        "int8": {"trainer.strategy.compressor": "Int8"},
    },
    "seed_everything": [1, 2],
}


def _names(**options):
    return [run.name for run in plan(BASE, AXES, **options)]


def test_the_last_axis_varies_fastest_and_values_become_arguments():
    runs = plan(BASE, AXES, {"trainer.max_steps": 3, "model.config": {"n_layer": 1}})
    assert [run.name for run in runs] == [
        "none/seed_everything=1", "none/seed_everything=2", "int8/seed_everything=1", "int8/seed_everything=2",
    ]  # fmt: skip
    assert runs[2].axes == {"method": "int8", "seed_everything": "seed_everything=1"}
    assert runs[2].main_arguments(emulated=False) == [
        "--config", BASE, "--trainer.max_steps=3", '--model.config={"n_layer": 1}',
        "--trainer.strategy.compressor=Int8", "--seed_everything=1",
    ]  # fmt: skip


def test_filters_take_labels_patterns_and_negations():
    assert _names(exclude=[{"method": "none"}]) == ["int8/seed_everything=1", "int8/seed_everything=2"]
    assert _names(include=[{"method": "n*", "seed_everything": "*2"}]) == ["none/seed_everything=2"]
    assert _names(exclude=[{"method": "!int8"}]) == ["int8/seed_everything=1", "int8/seed_everything=2"]
    assert _names(exclude=[{"method": ["none", "int8"], "seed_everything": "*1"}]) == [
        "none/seed_everything=2", "int8/seed_everything=2",
    ]  # fmt: skip


def test_a_key_says_what_is_run_and_not_what_it_is_called():
    first = plan(BASE, AXES)
    renamed = plan(BASE, {**AXES, "method": {"a": AXES["method"]["none"], "b": AXES["method"]["int8"]}})
    assert [run.key for run in first] == [run.key for run in renamed] and len({run.key for run in first}) == 4
    assert {run.key for run in first}.isdisjoint(run.key for run in plan(BASE, AXES, {"trainer.max_steps": 3}))
    assert {run.key for run in first}.isdisjoint(run.key for run in plan(BASE, AXES, extra=["--data.block_size=8"]))
    linked = plan(BASE, {**AXES, "link": ["1gbit", "2gbit"]})
    assert len({run.key for run in linked}) == 8


def test_ranks_are_placed_on_one_machine_or_one_a_host():
    (run,) = plan(BASE, {"link": ["100mbit"]}, {"world_size": 3})
    assert run.main_arguments(emulated=True)[2:] == ["--trainer.num_nodes=3", "--trainer.devices=1"]
    assert run.main_arguments(emulated=False)[2:] == ["--trainer.num_nodes=1", "--trainer.devices=3"]
    assert run.command(emulated=True).startswith(
        "python -m bench link --rate 100mbit --hosts 3 -- python main.py fit --config configs/bench/base.yaml"
    )
    assert run.command(emulated=False).startswith("python main.py fit")


def test_hosts_may_have_several_ranks():
    (run,) = plan(BASE, {"link": ["100mbit"]}, {"world_size": 4, "ranks_per_host": 2})
    assert run.main_arguments(emulated=True)[2:] == ["--trainer.num_nodes=2", "--trainer.devices=2"]
    assert run.main_arguments(emulated=False)[2:] == ["--trainer.num_nodes=1", "--trainer.devices=4"]
    assert run.link_arguments() == ["link", "--rate", "100mbit", "--hosts", "2", "--ranks_per_host", "2", "--"]
    (alone,) = plan(BASE, {"link": ["100mbit"]}, {"world_size": 4, "ranks_per_host": 1})
    (same,) = plan(BASE, {"link": ["100mbit"]}, {"world_size": 4})
    assert alone.key == same.key != run.key


@pytest.mark.parametrize(
    ("axes", "options", "words"),
    [
        ({"ranks_per_host": [2]}, {}, "ranks_per_host without link"),
        ({"link": ["1gbit"], "world_size": [3], "ranks_per_host": [2]}, {}, "two or more hosts"),
        ({"link": ["1gbit"], "world_size": [2], "ranks_per_host": [2]}, {}, "two or more hosts"),
        ({"link": ["fast"]}, {}, "rate 'fast'"),
        ({"world_size": [1], "link": ["1gbit"]}, {}, "at least two ranks"),
        ({"world_size": ["two"]}, {}, "whole number"),
        ({"delay": ["1ms"]}, {}, "delay without link"),
        ({"m": {"a": {"trainer.devices": 2, "world_size": 2}}}, {}, "contradict"),
        ({"m": {"a": {"x": 1}}, "k": {"b": {"x": 2}}}, {}, "another axis"),
        ({"m": {"a": {"x": 1}, "b": {"x": 1}}}, {}, "runs a and b are the same"),
        ({"m": {}}, {}, "axes.m is empty"),
        ({"m": {"a": 3}}, {}, "axes.m.a"),
        (AXES, {"exclude": [{"engine": "ddp"}]}, "no axis 'engine'"),
        (AXES, {"include": [{"method": "int9"}]}, "no label 'int9'"),
        (AXES, {"exclude": [{"method": "*"}]}, "no run"),
    ],
)
def test_what_is_impossible_is_named(axes, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(BASE, axes, **options)


def test_a_missing_configuration_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan("configs/nowhere.yaml", AXES)


def test_only_takes_patterns_of_names():
    runs = plan(BASE, AXES)
    assert [run.name for run in select(runs, "int8/*,none/*2")] == ["none/seed_everything=2", *_names()[2:]]
    with pytest.raises(ValueError, match="no run matches 'fp8'"):
        select(runs, "fp8")


def test_paths_survive_a_change_of_folder(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    arguments = ["--data.train=train.json", "--data.train", "train.json", "--data=Text", "--x=none.json", "--n=1/2"]
    there = str(tmp_path / "train.json")
    assert located(arguments, tmp_path) == [f"--data.train={there}", "--data.train", there, *arguments[3:]]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_the_repository_is_a_plan(path):
    content = yaml.safe_load(path.read_text())
    options = {name: content[name] for name in ("arguments", "include", "exclude") if name in content}
    runs = plan(content["base"], content["axes"], **options)
    counted = re.search(r"(\d+) runs", path.read_text())
    assert len(runs) == int(counted[1]) if counted else runs


def test_the_quality_sweep_names_compressors_that_there_are():
    """A new one needs no line there; it is compared once somebody adds it."""
    axes = yaml.safe_load((ROOT / "configs/bench/quality.yaml").read_text())["axes"]
    named = set(re.findall(r"\b[A-Z]\w+", json.dumps(list(axes["method"].values()))))
    assert {"Int8", "TopK", "ErrorFeedback"} <= named <= {cls.__name__ for cls in variants(Compressor)}
