"""Methods are told apart, in colour or grey, whatever else is drawn."""

from __future__ import annotations

import polars as pl

from saets import plots
from saets.scores.results import results_table
from tests.plots.charts import texts


def test_no_two_methods_look_alike_in_colour_or_in_grey() -> None:
    looks = plots.METHODS.values()
    assert len(set(plots.display_names().values())) == len({look.colour for look in looks}) == len(looks)
    assert len({look.shape for look in looks}) == len(looks)
    assert len({plots.METHODS[method].dash for method in ("caa", "sae", "sae_ts")}) == 3


def test_a_variant_of_a_method_looks_like_it_but_not_the_same_and_stands_after_it() -> None:
    variants = [f"sae_ts:bias_weight={weight}" for weight in ("0.5", "0", "2")]
    frame = pl.concat(
        [texts(), *(texts().filter(pl.col("method") == "sae_ts").with_columns(method=pl.lit(one)) for one in variants)]
    )
    layer = plots.product_by_scale(results_table(frame)).to_dict()["spec"]["layer"]
    names = ["CAA", "SAE-TS", *(f"SAE-TS, bias weight {weight}" for weight in ("0", "0.5", "2"))]
    for channel, different in (("color", 5), ("shape", 2), ("strokeDash", 5)):
        scale = next(part["encoding"][channel]["scale"] for part in layer if channel in part["encoding"])
        assert scale["domain"] == names
        assert len({str(look) for look in scale["range"]}) == different


def test_a_method_has_the_same_colour_whatever_else_is_drawn() -> None:
    both, alone = results_table(texts()), results_table(texts().filter(pl.col("method") == "sae_ts"))
    for results in (both, alone):
        scale = plots.product_by_scale(results).to_dict()["spec"]["layer"][0]["encoding"]["color"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True))["SAE-TS"] == plots.METHODS["sae_ts"].colour
