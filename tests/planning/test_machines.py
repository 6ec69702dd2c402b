"""Times from speeds: the bound that decides, and the one measurement on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.planning.left import what_is_left
from saets.planning.machines import Cost, gpu_kinds, machine
from saets.planning.plan import make_plan
from saets.planning.sizes import PromptSizes, model_size, sae_size
from saets.planning.workload import Sizes, workload
from saets.stages.session import Session


def test_the_larger_of_operations_and_traffic_decides() -> None:
    h100 = machine("h100")
    computing, moving = Cost(989e12, 0, 0, 0), Cost(1, 0, 3350e9, 0)
    assert h100.seconds("decode", 4096, computing, "bfloat16") == pytest.approx(1 / 0.3)
    assert h100.seconds("decode", 4096, moving, "bfloat16") == pytest.approx(1 / 0.3)
    both = Cost(2 * 989e12, 0, 3350e9, 0)
    assert h100.seconds("decode", 4096, both, "bfloat16") == pytest.approx(2 / 0.3)
    assert h100.seconds("decode", 4096, Cost(0, 67e12, 0, 0), "bfloat16") == pytest.approx(1 / 0.3), "encoders in float32"


def test_narrow_models_use_less_of_a_gpu() -> None:
    h100 = machine("h100")
    shares = [h100.share("decode", width) for width in (256, 576, 1152, 2304, 8192)]
    assert shares[0] == shares[1] < shares[2] < shares[3] == shares[4]
    assert shares[2] == pytest.approx((shares[1] * shares[3]) ** 0.5), "half-way along the logarithm"


def test_what_one_h100_was_measured_to_do_comes_out_again(tmp_path: Path) -> None:
    paper = ["effects.rollouts=64", "effects.length=32"]
    experiment = load_experiment("smollm2", paper)
    model = model_size(experiment.model)
    sizes = Sizes(model, sae_size(experiment.sae, model.d_model), PromptSizes(experiment.model), torch.bfloat16)
    left = what_is_left(Session.looking(load_experiment("smollm2", paper), tmp_path / "none", measure=True), model.d_model)
    part = next(part for part in workload(experiment, left, sizes, 8064) if part.what == "rollouts")
    rows = part.items / 896
    seconds = machine("h100").seconds("decode", model.d_model, part.job._replace(blocks=0), "bfloat16")
    assert 9 * part.tokens / rows / seconds == pytest.approx(255_000, rel=0.1), "nine vectors are decoded together"


def test_every_kind_of_gpu_says_where_its_figures_come_from() -> None:
    for kind in gpu_kinds():
        found = machine(kind)
        assert "data sheet" in found.origin and found.memory and found.flops["bfloat16"] > found.flops["float32"] > 0
        assert found.measured is (kind == "h100")
    assert "benchmark_speeds.py" in machine("cpu").origin


def test_a_kind_that_is_unknown_is_refused_with_those_that_are(tmp_path: Path) -> None:
    session = Session.looking(load_experiment("gemma-2-2b"), tmp_path / "none")
    with pytest.raises(InputError, match=r"unknown GPU 'h1000'; known: a100-40gb, .*; did you mean 'h100'"):
        make_plan(session, gpu="h1000")
