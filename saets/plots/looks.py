"""How each method, criterion and outcome is drawn, the same in every chart.

Colour is never alone: marker shape and dash, or a label, tell series apart in grey.
"""

from __future__ import annotations

from typing import NamedTuple

from saets.records import UNSTEERED


class Look(NamedTuple):
    """How one series is drawn."""

    name: str
    colour: str
    shape: str
    """Vega symbol or SVG path."""
    dash: tuple[int, int]
    """Pixels drawn and left out."""


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


def display_names() -> dict[str, str]:
    """Names of the methods for people, by id, in the order of legends and tables."""
    return {method: look.name for method, look in METHODS.items()}
