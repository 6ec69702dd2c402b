"""The entry points in scripts/ start, and the benchmark measures what its last line says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SCRIPTS = Path(__file__).parents[1] / "scripts"

PROMISED = {
    "vectors_per_s_literal",
    "vectors_per_s_engine",
    "ratio",
    "ratio_bfloat16",
    "ratio_mixed",
    "distinct_over_single",
    "steered_over_unsteered",
    "fraction_of_ceiling",
    "max_relative_difference",
}


BARE = """
import runpy, sys
for name in ("pydantic", "jaxtyping", "transformer_lens", "sae_lens", "ray", "polars", "pyarrow", "psutil"):
    sys.modules[name] = None
runpy.run_path(SCRIPT, run_name="__main__")
"""
"""Runs a script as on a machine that has torch and transformers and nothing else of ours."""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, cwd=SCRIPTS.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


HELP = """
import runpy, sys
_, sys.path[0], *scripts = sys.argv
for script in scripts:
    print(f"# {script}")
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, script
"""
"""Asks scripts of a folder for their help in one process, so that what they import is imported once."""


def test_every_script_says_what_it_is_for() -> None:
    scripts = sorted(str(path) for path in SCRIPTS.glob("*.py"))
    said = run("-c", HELP, str(SCRIPTS), *scripts)
    assert [script for script in scripts if "usage: " not in said.partition(f"# {script}\n")[2].partition("\n# ")[0]] == []


@pytest.mark.parametrize("bare", [False, True])
def test_the_effects_benchmark_compares_both_algorithms_on_any_config(tmp_path: Path, bare: bool) -> None:
    transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True
    ).save_pretrained(tmp_path)
    script = SCRIPTS / "benchmark_effects.py"
    start = ["-c", BARE.replace("SCRIPT", repr(str(script)))] if bare else [str(script)]
    printed = run(*start, "--model", str(tmp_path), "--quick", "--d-sae", "64")
    facts = json.loads(printed.splitlines()[-1])
    assert facts.keys() >= PROMISED
    assert all(facts[name] > 0 for name in PROMISED - {"max_relative_difference"})
    assert facts["max_relative_difference"] < 1e-4
    assert ("tokens_per_s_bridge" in facts) is not bare
    assert facts["scale_engine"] == pytest.approx(facts["scale_literal"], rel=1e-2)
    assert facts["vectors_per_s_engine"] / facts["vectors_per_s_literal"] == pytest.approx(facts["ratio"], rel=1e-2)


@pytest.mark.ray
def test_the_scaling_benchmark_measures_the_real_path() -> None:
    facts = json.loads(run(str(SCRIPTS / "benchmark_scaling.py"), "--quick").splitlines()[-1])
    assert 0 < facts["overhead_fraction"] < 1
    assert facts["driver_mb_small"] > 0
    waiting = (
        2 * 640 * 16384 * 4 / 1e6
    )  # so few rows may all wait for the first flush, once as they came and once as they are written
    assert facts["driver_mb_large"] < facts["driver_mb_small"] + 200 + waiting
    assert set(facts["rows_per_second"]) == {"1", "2"}
    assert all(rate > 0 for rate in facts["rows_per_second"].values())
    ideal = facts["vectors_per_batch"] / facts["sleep_seconds"]
    assert facts["rows_per_second"]["1"] <= 1.05 * ideal
    assert facts["extrapolated_actors"] > 1


@pytest.mark.ray
def test_the_fit_benchmark_runs_both_solvers_on_the_same_rows() -> None:
    facts = json.loads(run(str(SCRIPTS / "benchmark_fit.py"), "--quick", "--rows", "400").splitlines()[-1])
    assert (facts["rows"], facts["d_model"], facts["d_sae"]) == (400, 16, 32)
    assert facts["speedup"] == pytest.approx(facts["seconds_adam"] / facts["seconds_ridge"])
    assert 0 < facts["mse_ridge"] < facts["mse_adam"], "Adam has not come to rest after so few steps"
    assert facts["peak_mb_ridge"] > 0


def test_the_grading_benchmark_measures_both_halves_and_the_whole() -> None:
    facts = json.loads(run(str(SCRIPTS / "benchmark_grading.py"), "--quick", "--latency", "0.05").splitlines()[-1])
    assert 0 < facts["calls_over_ideal"] <= 1.02
    assert facts["total_over_max"] >= 1
    assert facts["calls_per_second"] == pytest.approx(facts["calls_over_ideal"] * facts["concurrency"] / facts["latency"])
    assert facts["both_seconds"] >= facts["writing_seconds"] == facts["grading_seconds"]
