"""Colours and markers: told apart without full colour vision, on white and on black, and the same in every chart."""

import zlib
from collections.abc import Iterable, Sequence

from bench.report.groups import UNCOMPRESSED

# Okabe–Ito (jfly.uni-koeln.de/color), darkened where white needs it, then colours found one after the other as those
# farthest (in OKLab, with and without red-green vision) from all before; each with a contrast of 3 to the paper and,
# on dark backgrounds, with a stand-in chosen alike.
HUES = {
    "#0072b2": "#5ab4f0",
    "#d55e00": "#ff9447",
    "#008f68": "#3ccf9f",
    "#b0589a": "#e8a0cf",
    "#b58900": "#f0c541",
    "#3b9fd1": "#9adcff",
    "#7a4a2b": "#d3a583",
    "#600090": "#f000fc",
    "#0000fc": "#546ccc",
    "#b400fc": "#a80cfc",
    "#004800": "#9cfc9c",
    "#fc0c78": "#d80060",
    "#840048": "#9c6000",
    "#30486c": "#c0d8a8",
    "#6c3cd8": "#a86cc0",
    "#9c78fc": "#007890",
    "#c0000c": "#e46c84",
    "#2400b4": "#0090fc",
    "#fc48cc": "#fc00a8",
    "#a80084": "#906078",
    "#482448": "#f0f000",
    "#cc24c0": "#fc84fc",
    "#006c54": "#00c000",
    "#b4849c": "#6c9c00",
}
NEUTRAL = {"#6b7280": "#a3abb8"}
INK = {"#1c2024": "#e6e8eb"}
FAINT = {"#c9ced6": "#3c434d"}
DARK = {**HUES, **NEUTRAL, **INK, **FAINT}  # light colour -> its stand-in on a dark background

_HUES, GREY, TEXT, GRID = list(HUES), next(iter(NEUTRAL)), next(iter(INK)), next(iter(FAINT))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Sequence[float] | None, ...] = (None, (4, 2), (1, 1.5), (6, 2, 1, 2))

PHASES = {"compute": GREY, "encode": "#b58900", "wire": "#0072b2", "decode": "#b0589a"}
TIERS = ("#0072b2", "#b58900", "#c9ced6")  # dense, 2:4, top-k


def hue(index: int) -> str:
    """Colour of the index-th of several things that have no identity elsewhere in the report."""
    return _HUES[index % len(_HUES)]


def dashes(index: int) -> Sequence[float] | None:
    """Line pattern that changes once all colours have been used; None is a full line."""
    return _DASHES[index // len(_HUES) % len(_DASHES)]


class Colours:
    """Colour and marker of every method of a report.

    A method starts from the place its name hashes to, so it keeps its colour from report to report unless two methods
    of one report collide; then the next free one is taken, so that no two of up to 24 methods share a colour. Beyond,
    colours repeat with another marker. Uncompressed methods are grey, each with a marker of its own.

    Args:
        methods: Labels of all methods of the report.
    """

    def __init__(self, methods: Iterable[str]) -> None:
        self._slots: dict[str, int] = {}
        taken: set[int] = set()
        for name in sorted(set(methods) - set(UNCOMPRESSED)):
            round_, first = len(self._slots) // len(_HUES), zlib.crc32(name.encode())
            slots = (round_ * len(_HUES) + (first + i) % len(_HUES) for i in range(len(_HUES)))
            self._slots[name] = next(slot for slot in slots if slot not in taken)
            taken.add(self._slots[name])

    def colour(self, method: str) -> str:
        """Hexadecimal colour (its light form)."""
        slot = self._slots.get(method)
        return GREY if slot is None else _HUES[slot % len(_HUES)]

    def marker(self, method: str) -> str:
        """Matplotlib marker; neighbours of one colour's rank have different ones."""
        slot = self._slots.get(method)
        if slot is None:
            return _MARKERS[UNCOMPRESSED.index(method)] if method in UNCOMPRESSED else "o"
        return _MARKERS[(slot + slot // len(_HUES)) % len(_MARKERS)]
