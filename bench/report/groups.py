"""Runs grouped over seeds: what ran (method), under which circumstances (setting), and what came out."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bench.report.link import link_label, link_rate, modelled, step_ms
from bench.report.values import Record, Spread, number, per_step, quantity, ratio, spread, text, total
from common.tables import NOT_RECORDED

# Methods that send what they would have sent anyway; the first that ran in a setting is its baseline.
UNCOMPRESSED = ("none", "native", "none_a2a")
_METHOD = ("compress_method", "compress_config", "parameter_compress_method", "parameter_compress_config")
_RATE = re.compile(r"^ +learning_rate: ([-+.\deE]+)$", re.M)
_WAYS = ("backward_within", "parameter_differences")
_REPLICAS = ("replica_compress_method", "replica_compress_config", "local_steps")


def _model(record: Record) -> str:
    parameters = number(record, "model_parameters")
    size = f" {quantity(parameters, '')}" if parameters is not None else ""
    return text(record.get("model")) + size


def _engine(record: Record) -> str:
    return (
        " ".join(text(record[name]) for name in ("strategy", "sharding_strategy") if record.get(name)) or NOT_RECORDED
    )


def machine(record: Record) -> str:
    """The hardware that a record was made on."""
    found = record.get("machine")
    if not isinstance(found, dict):
        return NOT_RECORDED
    gpus = found.get("gpus")
    names = [str(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    hardware = [f"{len(names)} × {' / '.join(sorted(set(names)))}"] if names else []
    return ", ".join([*hardware, text(found.get("cpu")), f"{text(found.get('cores_usable'))} cores"])


def _learning_rate(record: Record) -> str:
    found = _RATE.search(str(record.get("config") or ""))  # the configuration is long: it is not read as a whole
    return f"{float(found[1]):g}" if found else NOT_RECORDED


# What must be equal for two runs to be compared; the names are table headers.
SETTING: dict[str, Callable[[Record], str]] = {
    "model": _model,
    "data": lambda r: text(r.get("dataset")),
    "engine": _engine,
    "ranks": lambda r: text(r.get("world_size")),
    "replicas": lambda r: text(r.get("replicas")),
    "link": link_label,
    "ranks a host": lambda r: text(r.get("ranks_per_host") or 1),
    "tokens": lambda r: text(r.get("max_length")),
    "validation stride": lambda r: text(r.get("val_stride")),
    "batch": lambda r: text(r.get("batch_size")),
    "accumulated": lambda r: text(r.get("accumulate_grad_batches")),
    "precision": lambda r: text(r.get("precision")),
    "steps": lambda r: text(r.get("steps")),
    "learning rate": _learning_rate,
    "machine": machine,
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        method: Short name of the compression, unique among the methods of the report.
        setting: Everything else that decides the outcome, by name of `SETTING`.
        records: The runs.
        uncompressed: Whether the method sends gradients and parameters as they are.
    """

    method: str
    setting: dict[str, str]
    records: list[Record] = field(repr=False)
    uncompressed: bool

    def spread(self, value: str | Callable[[Record], float | None]) -> Spread | None:
        """Spread over the runs of a field, or of what a function makes of a run."""
        read = value if callable(value) else lambda record: number(record, value)
        return spread(map(read, self.records))

    @cached_property
    def seeds(self) -> int:
        """Number of distinct seeds."""
        return len({text(record.get("seed")) for record in self.records})

    @cached_property
    def step_ms(self) -> Spread | None:
        """Median optimizer step time (ms) over the runs."""
        return self.spread(lambda run: step_ms(run, "p50"))

    @cached_property
    def ppl(self) -> Spread | None:
        """Validation perplexity over the runs."""
        return self.spread("val_ppl")

    @cached_property
    def bytes_per_step(self) -> Spread | None:
        """Bytes that a rank sends in an optimizer step, gradients and parameters."""
        return self.spread(bytes_per_step)

    @cached_property
    def rate(self) -> float | None:
        """Link rate in bit/s, when the runs had a known one."""
        return link_rate(self.records[0])

    def where(self, names: Iterable[str]) -> str:
        """The named parts of the setting as one label; those that were not recorded are left out."""
        return ", ".join(filter(None, (_named(name, self.setting[name]) for name in names)))


def _named(name: str, value: str) -> str:
    """Such as "2 ranks", "100 Mbit/s" or "batch 4"; "" for what was not recorded."""
    if value == NOT_RECORDED:
        return ""
    if name == "link" and value == "none":
        return "no link"
    if name in ("ranks", "replicas", "tokens", "steps"):
        return f"{value} {name.removesuffix('s') if value == '1' else name}"
    return value if name in ("model", "data", "engine", "link", "precision", "machine") else f"{name} {value}"


def bytes_per_step(record: Record) -> float | None:
    """All bytes a rank sends in an optimizer step; gradients alone where parameters are not sent (no such field)."""
    gradients = per_step(record, "bytes_compressed_total")
    if record.get("bytes_parameters_total") is None:
        return gradients
    return total([gradients, per_step(record, "bytes_parameters_total")])


def train_seconds(record: Record) -> float | None:
    """Seconds of training: of the last validation's clock, else steps times mean step time."""
    curve = record.get("val_curve") if not modelled(record) else None
    if isinstance(curve, list) and curve and isinstance(curve[-1], dict):
        return number(curve[-1], "train_s")
    steps, each = number(record, "steps"), step_ms(record, "mean")
    return steps * each / 1e3 if steps is not None and each is not None else None


def group(records: Sequence[Record]) -> list[Group]:
    """Runs grouped over seeds, in order of first appearance."""
    methods = method_labels(records)
    found: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    settings: dict[tuple[str, ...], dict[str, str]] = {}
    for record, method in zip(records, methods, strict=True):
        setting = {name: read(record) for name, read in SETTING.items()}
        key = (method, *setting.values())
        found[key].append(record)
        settings[key] = setting
    return [Group(key[0], settings[key], runs, _uncompressed(runs[0])) for key, runs in found.items()]


def _uncompressed(record: Record) -> bool:
    others = ("parameter_compress_method", "replica_compress_method")
    plain = record.get("compress_method") in UNCOMPRESSED and all(record.get(n) in (None, "none") for n in others)
    return plain and not record.get("local_steps")


Named = tuple[str, str, str, bool]  # compression of gradients, of parameters, between replicas; whether steps are local


def method_labels(records: Sequence[Record]) -> list[str]:
    """Short method names: arguments appear only where the same method ran with others."""
    variants: dict[Named, list[dict[str, str]]] = defaultdict(list)
    split = [_flat_method(record) for record in records]
    for name, arguments in split:
        variants[name].append(arguments)
    varying = {
        name: [key for key in sorted({k for a in found for k in a}) if len({a.get(key) for a in found}) > 1]
        for name, found in variants.items()
    }
    return [_label(name, arguments, varying[name]) for name, arguments in split]


def _flat_method(record: Record) -> tuple[Named, dict[str, str]]:
    method, config, parameter, parameter_config = (record.get(name) for name in _METHOD)
    replica, replica_config, local = (record.get(name) for name in _REPLICAS)
    configs = {"": config, "parameters.": parameter_config, "replicas.": replica_config, "local.": local}
    arguments = {f"{prefix}{key}": value for prefix, c in configs.items() for key, value in _flatten(c)}
    arguments |= {name: text(record[name]) for name in _WAYS if record.get(name)}
    others = ["" if one in (None, "none") else text(one) for one in (parameter, replica)]
    return (text(method), others[0], others[1], isinstance(local, dict)), arguments


def _flatten(config: object, prefix: str = "") -> Iterable[tuple[str, str]]:
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _label(name: Named, arguments: dict[str, str], varying: Sequence[str]) -> str:
    method, parameter, replica, local = name
    shown = [f"{key.rpartition('.')[2]}={arguments[key]}" for key in varying if key in arguments]
    parts = [f"{parameter} parameters"] if parameter else []
    parts += [f"{replica} between replicas"] if replica else []
    parts += ["local steps"] if local else []
    return " + ".join([" ".join([method, *shown]), *parts])


@dataclass(frozen=True)
class Panel:
    """Groups that may be compared: one setting, several methods.

    Attributes:
        title: The parts of the setting that distinguish this panel from the others.
        groups: One group a method, the uncompressed ones first.
    """

    title: str
    groups: list[Group]

    @cached_property
    def baseline(self) -> Group | None:
        """The uncompressed group that speed-ups are relative to; None when there is none."""
        return self.baseline_of(lambda one: one.step_ms)

    def baseline_of(self, measured: Callable[[Group], object]) -> Group | None:
        """The uncompressed group that others are compared with, of those for which something was measured."""
        plain = [g for g in self.groups if g.uncompressed and measured(g)]
        return min(plain, key=lambda g: UNCOMPRESSED.index(g.records[0]["compress_method"]), default=None)

    def speedup(self, group: Group) -> Spread | None:
        """Step time of the baseline over that of the group."""
        return ratio(self.baseline.step_ms, group.step_ms) if self.baseline else None


def varying(groups: Sequence[Group]) -> list[str]:
    """Names of the parts of the setting in which the groups differ."""
    return [name for name in SETTING if len({g.setting[name] for g in groups}) > 1]


def panels(groups: Sequence[Group], across: Iterable[str] = ()) -> list[Panel]:
    """Groups by setting, the largest comparison first, single ranks (which send nothing) last.

    Args:
        groups: See `group`.
        across: Parts of the setting that may differ within a panel.
    """
    across = set(across)
    shown = [name for name in varying(groups) if name not in across]
    found: dict[tuple[str, ...], list[Group]] = defaultdict(list)
    for one in groups:
        found[tuple(value for name, value in one.setting.items() if name not in across)].append(one)
    made = [Panel(some[0].where(shown), sorted(some, key=lambda g: not g.uncompressed)) for some in found.values()]
    return sorted(made, key=lambda p: (p.groups[0].setting["ranks"] == "1", -len(p.groups)))


def representatives(panel: Panel) -> list[Group]:
    """One group a method, that with most runs: for what the parts in which the panel's groups differ cannot change."""
    best: dict[str, Group] = {}
    for one in panel.groups:
        if one.method not in best or len(one.records) > len(best[one.method].records):
            best[one.method] = one
    return list(best.values())
