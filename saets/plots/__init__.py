"""Pictures of a run: functions that take a polars frame and return an Altair chart, and `save` for its files.

Every chart has the theme of `saets.plots.theme` and takes one of its sizes; `saets.plots.looks` says how a method is drawn.
"""

from saets.plots.by_scale import criteria_by_scale, loss_by_scale, product_by_scale
from saets.plots.calibration import calibration_histogram
from saets.plots.files import DEFAULT_FORMATS, FORMATS, file_name, save
from saets.plots.fit import predicted_effects, r2_by_density
from saets.plots.looks import METHODS, display_names
from saets.plots.panels import Plot
from saets.plots.paper import paper_scores
from saets.plots.plane import coherence_behaviour
from saets.plots.scores import score_bars
from saets.plots.theme import COLUMN, PAGE, SCREEN, SIZES, Size

__all__ = [
    "COLUMN",
    "DEFAULT_FORMATS",
    "FORMATS",
    "METHODS",
    "PAGE",
    "SCREEN",
    "SIZES",
    "Plot",
    "Size",
    "calibration_histogram",
    "coherence_behaviour",
    "criteria_by_scale",
    "display_names",
    "file_name",
    "loss_by_scale",
    "paper_scores",
    "predicted_effects",
    "product_by_scale",
    "r2_by_density",
    "save",
    "score_bars",
]
