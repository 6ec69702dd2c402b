"""Vector files of other tools: read back by their own readers, told apart, and refused with what is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saets.cli import main
from saets.errors import InputError
from saets.vector.formats import Choice, export_vector, import_vector
from saets.vector.vector import ScaledVector, SteeringVector

HOOK = "blocks.2.hook_resid_post"


def vector(hook_name: str = HOOK, seed: int = 0, **provenance: Any) -> SteeringVector:
    return SteeringVector.from_tensor(torch.randn(32, generator=torch.Generator().manual_seed(seed)), hook_name, **provenance)


def control_vector(path: Path, layers: dict[int, np.ndarray], hint: str = "llama", architecture: str = "controlvector") -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(layers))
    for layer, direction in layers.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(seed: int, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


@pytest.mark.parametrize(("hook_name", "layer"), [(HOOK, 2), ("blocks.1.hook_resid_post", 1), ("blocks.3.hook_resid_pre", 2)])
def test_a_gguf_control_vector_is_what_ggufs_own_reader_finds(tmp_path: Path, hook_name: str, layer: int) -> None:
    path = tmp_path / "vector.gguf"
    export_vector(60 * vector(hook_name), "gguf", path, model_hint="gemma2")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "gemma2"
    assert reader.fields["controlvector.layer_count"].contents() == 1
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type) == (f"direction.{layer}", gguf.GGMLQuantizationType.F32)
    assert np.array_equal(tensor.data, 60 * vector().direction.numpy())


def test_a_plain_safetensors_file_holds_one_tensor_under_its_hooks_name(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    export_vector(60 * vector(), "safetensors", path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == [HOOK]
        assert torch.equal(file.get_tensor(HOOK), 60 * vector().direction)


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_an_exported_vector_comes_back_with_hook_scale_and_provenance(tmp_path: Path, ending: str) -> None:
    made = vector("blocks.2.hook_resid_pre", model="tiny", goal="ünï", features=[[3, 1.0]]).at("prompt", bos=False)
    path = tmp_path / f"vector.{ending}"
    export_vector(60 * made, ending, path, force=True)
    back = import_vector(path)
    assert back.scale == pytest.approx(60, rel=1e-6)
    assert torch.allclose(back.vector.direction, made.direction, atol=1e-7)
    assert (back.vector.hook_name, back.vector.positions) == (made.hook_name, made.positions)
    assert back.vector.provenance.pop("imported")["file"] == path.name
    assert back.vector.provenance == made.provenance


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_what_lies_before_block_1_does_not_go_into_a_control_vector(tmp_path: Path, hook_name: str) -> None:
    with pytest.raises(InputError, match=f"cannot carry {hook_name}.*refuses N = 0.*export safetensors"):
        export_vector(60 * vector(hook_name), "gguf", tmp_path / "vector.gguf", force=True)
    export_vector(60 * vector(hook_name), "safetensors", tmp_path / "vector.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["vector.safetensors"]


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_positions_that_would_be_lost_are_named_unless_forced(tmp_path: Path, to: str) -> None:
    path = tmp_path / "vector"
    with pytest.raises(InputError, match="cannot say that only generated tokens may be steered.*every position.*--force"):
        export_vector(60 * vector().at("generated"), to, path)
    assert not path.exists()
    export_vector(60 * vector().at("generated"), to, path, force=True)
    assert path.exists()


def test_nothing_is_replaced_and_a_scale_of_zero_or_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        export_vector(60 * vector(), "gguf", path)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="steers nothing"):
        export_vector(0 * vector(), "gguf", tmp_path / "other.gguf")
    with pytest.raises(InputError, match="unknown format 'ggfu'.*did you mean 'gguf'"):
        export_vector(60 * vector(), "ggfu", tmp_path / "other.gguf")


def test_a_control_vector_of_several_layers_needs_a_choice(tmp_path: Path) -> None:
    layers = {layer: numbers(layer) for layer in (1, 2, 3)}
    path = control_vector(tmp_path / "vector.gguf", layers)
    with pytest.raises(InputError, match="vector.gguf: it holds a vector for each of the layers 1, 2, 3; choose one by --layer"):
        import_vector(path)
    for hook_name, layer in ((HOOK, 2), ("blocks.3.hook_resid_pre", 2), ("blocks.1.hook_resid_post", 1)):
        found = import_vector(path, Choice(hook_name))
        assert found.vector.hook_name == hook_name
        assert np.allclose(found.added.numpy(), layers[layer], atol=1e-5)
        assert found.vector.provenance["imported"] == {"file": path.name, "key": f"direction.{layer}", "model_hint": "llama"}
    with pytest.raises(InputError, match=r"no vector for blocks.9.hook_resid_post; its layers are 1, 2, 3"):
        import_vector(path, Choice("blocks.9.hook_resid_post"))


def test_a_control_vector_of_one_layer_says_where_it_belongs(tmp_path: Path) -> None:
    found = import_vector(control_vector(tmp_path / "vector.gguf", {3: numbers(0)}))
    assert found.vector.hook_name == "blocks.3.hook_resid_post"
    assert found.scale == pytest.approx(float(np.linalg.norm(numbers(0))), rel=1e-6)


def test_gguf_files_that_are_damaged_or_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "vector.gguf", {3: numbers(0)})
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", whole[:60], whole[:-64], b"no gguf at all, but long enough to be one"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="vector.gguf: it cannot be read as GGUF"):
            import_vector(path)
    path.unlink()
    with pytest.raises(InputError, match="no control vector"):
        import_vector(control_vector(path, {3: numbers(0)}, architecture="llama"))
    path.unlink()
    with pytest.raises(InputError, match=r"direction.3 is not float32"):
        import_vector(control_vector(path, {3: numbers(0).astype(np.float16)}))


@pytest.mark.parametrize("bad", [np.zeros(32, np.float32), np.full(32, np.nan, np.float32), np.full(32, np.inf, np.float32)])
def test_numbers_without_a_direction_are_refused_with_the_files_name(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="vector.gguf: .*finite numbers that are not all zero"):
        import_vector(control_vector(tmp_path / "vector.gguf", {3: bad}))
    torch.save(torch.from_numpy(bad), tmp_path / "vector.pt")
    with pytest.raises(InputError, match="vector.pt: .*finite numbers that are not all zero"):
        import_vector(tmp_path / "vector.pt", Choice(HOOK))


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_pt_file_may_be_one_tensor(tmp_path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(numbers(4)).to(dtype)
    torch.save(tensor.reshape(*shape), tmp_path / "vector.pt")
    found = import_vector(tmp_path / "vector.pt", Choice(HOOK))
    assert torch.allclose(found.added, tensor.float(), atol=1e-5)
    with pytest.raises(InputError, match="does not say where the vector is added; give --layer or --hook-name"):
        import_vector(tmp_path / "vector.pt")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_one_of_several_tensors_and_one_of_several_rows_are_chosen(tmp_path: Path, ending: str) -> None:
    tensors = {"happy": torch.from_numpy(numbers(1)), "layers": torch.randn(4, 32), "count": torch.arange(3)}
    path = tmp_path / f"vectors.{ending}"
    torch.save(tensors, path) if ending == "pt" else save_file(tensors, path)
    with pytest.raises(InputError, match=r"it holds 3 tensors \(count, happy, layers\); choose one by --key"):
        import_vector(path, Choice(HOOK))
    assert torch.allclose(import_vector(path, Choice(HOOK, "happy")).added, tensors["happy"], atol=1e-5)
    assert torch.allclose(import_vector(path, Choice(HOOK, "layers", 2)).added, tensors["layers"][2], atol=1e-5)
    with pytest.raises(InputError, match="unknown key 'hapy'.*did you mean 'happy'"):
        import_vector(path, Choice(HOOK, "hapy"))
    with pytest.raises(InputError, match=r"the tensor is \[4, 32\].*choose one of its rows by --row"):
        import_vector(path, Choice(HOOK, "layers"))
    with pytest.raises(InputError, match="row 4 of a tensor with 4 rows; expected 0 to 3"):
        import_vector(path, Choice(HOOK, "layers", 4))
    with pytest.raises(InputError, match="has no rows to choose from"):
        import_vector(path, Choice(HOOK, "happy", 0))
    with pytest.raises(InputError, match="int64; expected floating-point numbers"):
        import_vector(path, Choice(HOOK, "count"))


def test_a_key_that_is_a_hooks_name_says_where_the_vector_belongs(tmp_path: Path) -> None:
    tensors = {HOOK: torch.from_numpy(numbers(1)), "blocks.1.hook_resid_post": torch.from_numpy(numbers(2))}
    save_file(tensors, tmp_path / "vectors.safetensors")
    assert import_vector(tmp_path / "vectors.safetensors", Choice(key=HOOK)).vector.hook_name == HOOK
    chosen = import_vector(tmp_path / "vectors.safetensors", Choice("blocks.1.hook_resid_post"))
    assert torch.allclose(chosen.added, tensors["blocks.1.hook_resid_post"], atol=1e-5)


class Runs:
    """Pickled, it calls something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_pt_files_that_run_code_are_damaged_or_hold_no_tensors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vector.pt"
    path.write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(InputError, match="vector.pt is refused: it holds more than tensors and would run code"):
        import_vector(path, Choice(HOOK))
    assert capsys.readouterr().out == ""
    torch.save(torch.ones(32), path)
    whole = path.read_bytes()
    for damaged in (b"", b"no tensors", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="vector.pt (is damaged|cannot be read)"):
            import_vector(path, Choice(HOOK))
    for other in ([1.0, 2.0], {"a": "text"}):
        torch.save(other, path)
        with pytest.raises(InputError, match="expected a tensor, or a dict of tensors"):
            import_vector(path, Choice(HOOK))


def test_a_file_that_is_missing_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        import_vector(tmp_path / "none.gguf")
    (tmp_path / "vector.bin").write_bytes(b"1")
    with pytest.raises(InputError, match="unknown kind of vector file '.bin'; known: .gguf, .pt, .pth, .safetensors"):
        import_vector(tmp_path / "vector.bin")
    (tmp_path / "vector.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        import_vector(tmp_path / "vector.safetensors")


def test_files_in_a_bucket_are_written_and_read(remote: Any) -> None:
    for ending in ("gguf", "safetensors"):
        export_vector(60 * vector(), ending, remote / f"vector.{ending}")
        assert torch.allclose(import_vector(remote / f"vector.{ending}").added, 60 * vector().direction, atol=1e-4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A vector of the tiny experiment."""
    vector(model="tiny").save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_the_commands_export_and_import_a_vector(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "tiny", "--vector", str(file), "--to", "gguf", "--scale", "-60"]) == 0
    assert "mine.gguf: blocks.2.hook_resid_post, length 60" in (printed := capsys.readouterr().out)
    assert "--control-vector mine.gguf" in printed
    (tensor,) = gguf.GGUFReader(tmp_path / "mine.gguf").tensors
    assert np.allclose(tensor.data, -60 * vector().direction.numpy())
    assert main(["import", "tiny", "mine.gguf", "--file", "back.safetensors"]) == 0
    back = ScaledVector.load("back.safetensors")
    assert torch.allclose(back.added, -60 * vector().direction, atol=1e-5)
    assert main(["export", "tiny", "--vector", "back.safetensors", "--to", "safetensors"]) == 0
    assert import_vector("back.plain.safetensors").scale == pytest.approx(60)


def test_an_imported_vector_steers(file: Path, tmp_path: Path, tiny: Any) -> None:
    path = control_vector(tmp_path / "vector.gguf", {layer: 8 * numbers(layer) for layer in (1, 2, 3)})
    assert main(["import", "tiny", str(path), "--layer", "2", "--file", str(tmp_path / "in.safetensors")]) == 0
    tokens = torch.tensor([[256, 40, 83]])
    with tiny.hooks(fwd_hooks=[(HOOK, lambda residual, hook: residual + torch.from_numpy(8 * numbers(2)))]):
        expected = tiny(tokens)
    with ScaledVector.load(tmp_path / "in.safetensors").applied(tiny):
        assert torch.allclose(tiny(tokens), expected, atol=1e-3)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a command says on its one line, which ends with exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_vectors_of_another_model_or_hook_are_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "v.safetensors", tmp_path / "out.gguf"
    vector(model="google/gemma-2-2b").save(path)
    export = ("export", "tiny", "--vector", path, "--to", "gguf", "--file", out)
    assert "made for google/gemma-2-2b and this experiment steers tiny" in refused(capsys, *export)
    read = ("import", "tiny", path, "--file", tmp_path / "taken.safetensors")
    assert "made for google/gemma-2-2b" in refused(capsys, *read)
    assert main([str(word) for word in (*read, "--force")]) == 0
    assert SteeringVector.load(tmp_path / "taken.safetensors").model == "tiny"
    vector("blocks.1.hook_resid_post", model="tiny").save(path)
    assert "is for blocks.1.hook_resid_post, and this experiment steers at blocks.2.hook_resid_post" in refused(capsys, *export)
    assert not out.exists()
    assert main([*map(str, export), "--force"]) == 0
    assert out.exists()


def test_a_place_that_the_file_gainsays_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, ours = tmp_path / "plain.safetensors", tmp_path / "ours.safetensors"
    save_file({HOOK: torch.ones(32)}, plain)
    vector().save(ours)
    for path in (plain, ours):
        said = refused(capsys, "import", "tiny", path, "--layer", "1", "--file", tmp_path / "new.safetensors")
        assert f"its vector is for {HOOK}, and blocks.1.hook_resid_post was asked for" in said


def test_what_no_force_can_make_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = tmp_path / "v.safetensors", tmp_path / "new"
    SteeringVector.from_tensor(torch.ones(31), HOOK).save(path)
    assert "has 31 numbers, the residual stream of tiny has 32" in refused(
        capsys, "export", "tiny", "--vector", path, "--to", "gguf", "--file", file, "--force"
    )
    vector("blocks.4.hook_resid_post").save(path)
    assert "blocks 0 to 3" in refused(capsys, "import", "tiny", path, "--file", file, "--force")
    other = control_vector(tmp_path / "v.gguf", {2: numbers(0)}, hint="gemma2")
    assert "kind 'gemma2' and tiny is of kind 'llama'" in refused(capsys, "import", "tiny", other, "--file", file)
    assert not file.exists()
    assert main(["import", "tiny", str(other), "--file", str(file), "--force"]) == 0
    assert "is there already" in refused(capsys, "import", "tiny", other, "--file", file)
    assert json.loads(json.dumps(SteeringVector.load(file).provenance))["imported"]["model_hint"] == "gemma2"
