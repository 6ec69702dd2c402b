"""Where vectors come from: decoders, mixtures, random draws, files, and the method's own vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saets.effects.pending import Pending
from saets.effects.sources import vector_items
from saets.errors import InputError
from saets.experiment.config import BASELINE, Experiment
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator
from saets.methods import formulas as methods
from saets.records import VectorItem, vector_id
from saets.sae import load_sae
from saets.vector.vector import SteeringVector

PIN = ["model.dtype=float32", "model.device=cpu"]


def listed(experiment: Experiment, d_model: int) -> list[VectorItem]:
    return list(vector_items(experiment, d_model))


def pick(kind: str, **keys: object) -> list[str]:
    """The override that makes one source the only one."""
    inside = ", ".join(f"{key} = {value}" for key, value in {"kind": f'"{kind}"', **keys}.items())
    return [f"effects.sources=[{{ {inside} }}]"]


def test_decoder_rows_become_unit_vectors_with_their_row_number_and_the_hash_of_their_bytes(tiny_experiment: Experiment) -> None:
    decoder = load_sae(tiny_experiment.sae, 32).W_dec.double().numpy()
    items = listed(tiny_experiment, 32)
    assert [item.index for item in items] == list(range(64))
    for item in items:
        row = decoder[item.index]
        assert np.allclose(item.direction, row / np.sqrt((row**2).sum()), atol=1e-6)
        assert item.direction.dtype == np.float32
        assert (item.source, item.vector_id) == ("decoder", vector_id(item.direction))
    assert len({item.vector_id for item in items}) == 64


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"start": 60}, [60, 61, 62, 63]),
        ({"stop": 3}, [0, 1, 2]),
        ({"start": 5, "stop": 7}, [5, 6]),
        ({"rows": [9, 2, 40]}, [9, 2, 40]),
        ({"rows": [9, 2, 9]}, [9, 2, 9]),
    ],
)
def test_a_source_takes_a_range_or_a_list_of_rows(keys: dict[str, object], rows: list[int]) -> None:
    items = listed(load_experiment("tiny", pick("decoder", **keys)), 32)
    assert [item.index for item in items] == rows


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"stop": 65}, "row 64"),
        ({"start": 64, "stop": 70}, "row 64"),
        ({"rows": [3, 64]}, "row 64"),
        ({"rows": [-1]}, "row -1"),
        ({"start": 7, "stop": 7}, "no rows"),
        ({"start": 64}, "no rows"),
        ({"stop": 0}, "no rows"),
        ({"rows": []}, "no rows"),
    ],
)
def test_rows_that_the_decoder_does_not_have_are_refused(keys: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=f"effects.sources asks for {named}.*the SAE has rows 0 to 63"):
        listed(load_experiment("tiny", pick("decoder", **keys)), 32)


def test_a_vector_that_two_sources_hold_is_measured_once_and_keeps_its_first_place() -> None:
    sources = '[{ rows = [4, 2, 4] }, { kind = "random", count = 2 }, { name = "more", stop = 5 }]'
    pending = Pending(load_experiment("tiny", [f"effects.sources={sources}"]), 32)
    assert pending.vectors == 7
    found = [(item.source, item.index) for item in pending if item.source != BASELINE]
    assert found == [
        *(("decoder", 4), ("decoder", 2)),
        *(("random", 0), ("random", 1)),
        *(("more", 0), ("more", 1), ("more", 3)),
    ]


def test_rows_of_another_sae_stand_beside_those_of_the_measuring_one() -> None:
    wide = '{ loader = "random", d_sae = 96 }'
    items = listed(load_experiment("tiny", pick("decoder", start=90, sae=wide)), 32)
    assert [item.index for item in items] == [90, 91, 92, 93, 94, 95]


def test_random_vectors_are_of_unit_length_and_seeded_one_by_one() -> None:
    def directions(count: int, seed: int) -> np.ndarray:
        experiment = load_experiment("tiny", [*pick("random", count=count), f"seed={seed}"])
        items = listed(experiment, 32)
        assert [(item.source, item.index) for item in items] == [("random", index) for index in range(count)]
        return np.stack([item.direction for item in items])

    many = directions(200, 0)
    assert np.allclose(np.linalg.norm(many.astype(np.float64), axis=1), 1, atol=1e-6)
    assert np.array_equal(directions(3, 0), many[:3])
    assert not np.allclose(directions(3, 1), many[:3], atol=0.01)
    between = (many @ many.T)[np.triu_indices(200, 1)]
    assert np.abs(between).max() < 0.9
    assert between.std() == pytest.approx(1 / np.sqrt(32), rel=0.1)
    assert np.abs(many.mean(axis=0)).max() < 5 / np.sqrt(32 * 200)


def file_source(path: Path) -> list[str]:
    return [f"effects.sources=[{{ kind='file', path='{path}' }}]"]


def test_mixtures_are_seeded_sums_of_decoder_rows_with_weights_from_0_to_1(tiny_experiment: Experiment) -> None:
    decoder = load_sae(tiny_experiment.sae, 32).W_dec.double()
    items = listed(load_experiment("tiny", pick("mixture", count=6)), 32)
    assert [(item.source, item.index) for item in items] == [("mixture", index) for index in range(6)]
    for item in items:
        best = max(
            (
                np.linalg.lstsq(decoder[[a, b]].T.numpy(), item.direction.astype(np.float64), rcond=None)
                for a in range(64)
                for b in range(a + 1, 64)
            ),
            key=lambda solved: -float(solved[1][0]) if len(solved[1]) else 0.0,
        )
        assert (best[0] > 0).all()
        assert float(best[1][0]) < 1e-10
    assert [item.vector_id for item in listed(load_experiment("tiny", pick("mixture", count=5)), 32)] == [
        item.vector_id for item in items[:5]
    ]
    other = listed(load_experiment("tiny", [*pick("mixture", count=5), "seed=3"]), 32)
    assert not {item.vector_id for item in other} & {item.vector_id for item in items}


def test_more_terms_than_rows_are_refused() -> None:
    with pytest.raises(InputError, match="mixes 65 rows; the SAE has 64"):
        listed(load_experiment("tiny", pick("mixture", count=1, terms=65)), 32)


def test_a_file_gives_every_vector_in_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(32), "b": 3 * torch.randn(2, 32)}
    save_file(tensors, tmp_path / "vectors.safetensors")
    items = listed(load_experiment("tiny", file_source(tmp_path / "vectors.safetensors")), 32)
    expected = [tensors["a"], tensors["b"][0], tensors["b"][1]]
    assert [item.index for item in items] == [0, 1, 2]
    for item, vector in zip(items, expected, strict=True):
        assert np.allclose(item.direction, (vector / vector.norm()).numpy(), atol=1e-6)


def test_a_saets_vector_file_is_a_source(tmp_path: Path) -> None:
    vector = SteeringVector.from_tensor(torch.randn(32), "blocks.2.hook_resid_post")
    vector.save(tmp_path / "mine.safetensors")
    (item,) = listed(load_experiment("tiny", file_source(tmp_path / "mine.safetensors")), 32)
    assert item.vector_id == vector.id


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(32), "length zero"),
        (torch.full((2, 32), torch.nan), "NaN or infinity"),
        (torch.ones(31), r"has shape \(31,\); the model's residual stream has 32"),
        (torch.ones(1, 2, 32), r"holds v \(1, 2, 32\); expected tensors"),
    ],
)
def test_vectors_that_cannot_be_steered_by_are_refused_before_anything_is_measured(
    tmp_path: Path, tensor: torch.Tensor, message: str
) -> None:
    save_file({"v": tensor}, tmp_path / "v.safetensors")
    with pytest.raises(InputError, match=message):
        listed(load_experiment("tiny", file_source(tmp_path / "v.safetensors")), 32)


def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name, message in (("none.safetensors", "which is no file"), ("text.safetensors", "is not a safetensors file")):
        with pytest.raises(InputError, match=message):
            listed(load_experiment("tiny", file_source(tmp_path / name)), 32)


def test_the_methods_own_vectors_can_be_measured_again(tmp_path: Path) -> None:
    approximator = EffectApproximator(torch.randn(32, 64), torch.randn(64))
    approximator.save(tmp_path / "approximator.safetensors")
    where = f"kind='sae_ts', approximator='{tmp_path}/approximator.safetensors'"
    items = listed(load_experiment("tiny", [f"effects.sources=[{{ {where}, features=[5, 9] }}]"]), 32)
    assert [(item.source, item.index) for item in items] == [("sae_ts", 5), ("sae_ts", 9)]
    for item in items:
        expected = methods.sae_ts(torch.eye(64)[item.index], approximator)
        assert np.allclose(item.direction, (expected / expected.norm()).numpy(), atol=1e-6)
    with pytest.raises(InputError, match="targets feature 64; the approximator has features 0 to 63"):
        listed(load_experiment("tiny", [f"effects.sources=[{{ {where}, features=[64] }}]"]), 32)


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two sources named 'decoder'; give each a name of its own"):
        load_experiment("tiny", ["effects.sources=[{ stop = 3 }, { start = 5 }]"])
    with pytest.raises(InputError, match="names a source 'baseline', which is the unsteered text"):
        load_experiment("tiny", ["effects.sources=[{ stop = 3, name = 'baseline' }]"])
    named = load_experiment("tiny", ["effects.sources=[{ stop = 3 }, { start = 60, name = 'late' }]"])
    assert [item.source for item in listed(named, 32)] == ["decoder"] * 3 + ["late"] * 4
