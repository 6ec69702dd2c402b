"""How each method, criterion and outcome is drawn, the same in every chart.

Colour is never alone: marker shape and dash, or a label, tell series apart in grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from saets.experiment.method_id import MethodId, parse_method
from saets.records import UNSTEERED


class Look(NamedTuple):
    """How one series is drawn."""

    name: str
    colour: str
    shape: str
    """Vega symbol or SVG path."""
    dash: tuple[int, ...]
    """Pixels drawn and left out, in turn."""


SOLID, DASHED, DOTTED = (1, 0), (6, 3), (2, 2)
BLACK, GREY = "#000000", "#777777"

METHODS = {
    "caa": Look("CAA", "#332288", "square", DASHED),
    "sae": Look("SAE", "#E69F00", "triangle-up", DOTTED),
    "sae_ts": Look("SAE-TS", "#CC3311", "circle", SOLID),
    "pinverse": Look("Pseudoinverse", "#0077BB", "diamond", DASHED),
    "pinverse_raw": Look("Pseudoinverse, raw", "#A6CEE3", "M0,-1L1,0L0,0.3L-1,0Z", DOTTED),
    "rotation": Look("Rotation", "#EE6677", "cross", SOLID),
    "fgaa": Look("FGAA", "#DDCC77", "triangle-down", DASHED),
    "ridge": Look("Ridge", "#AA3377", "triangle-left", DOTTED),
    "constrained": Look("Constrained", "#661100", "triangle-right", SOLID),
    UNSTEERED: Look("Unsteered", BLACK, "M-1,-0.3L1,-0.3L1,0.3L-1,0.3Z", SOLID),
}
"""Every method's look, in the order of legends. Any two colours differ by at least 23 (CIE 1976), for full sight and as
simulated for protanopia, deuteranopia and tritanopia."""

CRITERIA_LOOKS = {
    "behaviour": Look("behaviour", "#0077BB", "square", DASHED),
    "coherence": Look("coherence", "#E69F00", "triangle-up", DOTTED),
    "product": Look("behaviour × coherence", BLACK, "circle", SOLID),
}
OUTCOMES = {"ok": "#0077BB", "capped": "#E69F00", "fixed": GREY}
"""Colours of the calibration's outcomes."""


VARIED = ((0.45, (9, 2, 2, 2)), (-0.4, (3, 3)), (0.7, (12, 4)), (-0.65, (1, 3)))
"""How variants of a method differ from it, in turn: how far the colour goes to white, or below 0 to black; and the dash."""


def method_looks(methods: Iterable[str] = ()) -> dict[str, Look]:
    """The look of every method, and of those variants that are named, which come after theirs in the order of their options.

    Raises:
        InputError: a method that is not known.
    """
    variants: dict[str, list[MethodId]] = {}
    for name in dict.fromkeys(methods):
        if name not in METHODS:
            method = parse_method(name)
            variants.setdefault(method.base, []).append(method)
    found = {}
    for base, look in METHODS.items():
        found[base] = look
        for number, method in enumerate(sorted(variants.get(base, []), key=lambda method: sorted(method.options.items()))):
            shade, dash = VARIED[number % len(VARIED)]
            found[str(method)] = Look(f"{look.name}, {method.words}", _shaded(look.colour, shade), look.shape, dash)
    return found


def _shaded(colour: str, shade: float) -> str:
    """`#rrggbb` part of the way to white, or to black."""
    end = 255 if shade > 0 else 0
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (end - part) * abs(shade)):02X}" for part in parts)


def display_names(methods: Iterable[str] = ()) -> dict[str, str]:
    """Names of the methods for people, by id, in the order of legends and tables; of all, and of the variants that are named."""
    return {method: look.name for method, look in method_looks(methods).items()}
