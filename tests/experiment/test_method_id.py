"""One name for a method with options of its own, however it was written."""

from __future__ import annotations

import pytest

from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.experiment.method_id import METHOD_IDS, parse_method


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("caa", "caa"),
        ("sae_ts: bias_weight = 0.0", "sae_ts:bias_weight=0"),
        ("sae_ts:bias_weight=-0", "sae_ts:bias_weight=0"),
        ("ridge:ridge_penalty=1e-3", "ridge:ridge_penalty=0.001"),
        ("fgaa:fgaa_features=4.0,bias_weight=.50", "fgaa:bias_weight=0.5,fgaa_features=4"),
        ("constrained:constrained_gamma=20", "constrained:constrained_gamma=20"),
    ],
)
def test_spellings_of_one_method_are_one_id(written: str, meant: str) -> None:
    assert str(parse_method(written)) == meant
    assert parse_method(meant) == parse_method(written)
    assert str(parse_method(meant)) == meant


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sae-ts:bias_weight=0", "unknown method 'sae-ts'; known: caa, .*did you mean 'sae_ts'"),
        ("fgaa:n1=4", "unknown option of fgaa 'n1'; known: bias_weight, fgaa_features"),
        ("caa:bias_weight=0", "unknown option of caa 'bias_weight'; known: none"),
        ("sae_ts:", "expected sae_ts:option=value"),
        ("sae_ts:bias_weight", "expected sae_ts:option=value"),
        ("sae_ts:bias_weight=1,bias_weight=1", "gives bias_weight twice"),
        ("sae_ts:bias_weight=much", "bias_weight is 'much'"),
        ("sae_ts:bias_weight=nan", "bias_weight is 'nan'.*finite"),
        ("fgaa:fgaa_features=0", "fgaa_features is '0'.*greater than or equal to 1"),
        ("fgaa:fgaa_features=1.5", "fgaa_features is '1.5'.*integer"),
        ("constrained:constrained_gamma=-1", "constrained_gamma is '-1'.*greater than or equal to 0"),
    ],
)
def test_what_is_no_method_is_said_with_what_is_known(written: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_method(written)


def test_file_names_of_methods_are_plain_and_different_ones_stay_different() -> None:
    variants = [
        "sae_ts:bias_weight=0",
        "sae_ts:bias_weight=-1",
        "fgaa:bias_weight=0.5,fgaa_features=4",
        "ridge:ridge_penalty=1e-05",
    ]
    stems = [parse_method(method).file_stem for method in (*METHOD_IDS, *variants)]
    assert len(set(stems)) == len(stems)
    assert not any(set(stem) & set(":/\\, ") or "--" in stem for stem in stems)


def test_settings_hold_a_method_once_and_in_its_one_spelling() -> None:
    names = '["sae_ts", "sae_ts:bias_weight=0", "sae_ts:bias_weight=0.0", "caa"]'
    assert load_experiment("tiny", [f"steering.methods={names}"]).steering.methods == ("sae_ts", "sae_ts:bias_weight=0", "caa")
    with pytest.raises(InputError, match="unknown option of sae_ts 'penalty'"):
        load_experiment("tiny", ['steering.methods=["sae_ts:penalty=0"]'])
