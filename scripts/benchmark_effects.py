"""Measures the effect engine against the published algorithm, in one process, on one model, at the paper's settings.

    python scripts/benchmark_effects.py [--model smollm2|gemma-2-2b|gemma-2-9b|FOLDER] [--weights random|real] [--quick]

Needs only torch, transformers, numpy and safetensors: weights are random by default, prompts are token ids, the SAE's encoder is
random too. `--weights real` takes SmolLM2's own (needs the installed package). Both sides get the same model, precision,
vectors, number of rollouts and calibration text; the literal side decodes 64 rows of one prompt at a time, as the released code
does. The last line is one JSON object. Compare ratios of one run; absolute times depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.engine import reference
from saets.engine.batch import Row
from saets.engine.calibration import PAPER_GRID, Calibrator, ScaleRule
from saets.engine.decoder import find_blocks
from saets.engine.machine import cpu_has_bfloat16
from saets.engine.plain import share_weights
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed

SAMPLES, LENGTH, TOP_K = 64, 32, 50
PROMPT_LENGTHS = (1, 1, 1, 3, 4, 3, 3, 3, 6, 5, 5, 4, 5, 4)
"""Tokens of the paper's 14 prompts, BOS included, by SmolLM2's tokenizer."""
FEW_PROMPTS = (1, 3, 5)
"""Prompts of the small workloads; several vectors share the engine's batch, so that it is nearly as large."""
CHUNKS = {"smollm2": 128, "gemma-2-2b": 128, "gemma-2-9b": 32}
HOOKS = {"smollm2": 15, "gemma-2-2b": 12, "gemma-2-9b": 12}
CEILING_SHAPES = {
    "cpu": ((896, 576, 1536), (896, 576, 49152), (2048, 2048, 2048)),
    "cuda": ((8192, 8192, 8192), (4096, 8192, 8192)),
}


class Work(NamedTuple):
    """How much is measured."""

    prompts: tuple[tuple[int, ...], ...]
    calibration: Tensor
    vectors: int
    """Vectors that the engine rolls out together."""


class Subject(NamedTuple):
    """One model in one precision."""

    model: Any
    block: torch.nn.Module
    hook_name: str
    encode: Callable[[Tensor], Tensor]
    directions: Tensor
    grid: tuple[float, ...]


def main() -> None:
    """Measure, say what was found, and print one JSON object last."""
    options = arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load(options.model, options.weights, device)
    layer = HOOKS.get(options.model, model.config.get_text_config().num_hidden_layers // 2)
    hook_name = f"blocks.{layer}.hook_resid_post"
    wide = options.d_sae or (4096 if model.config.get_text_config().hidden_size < 1024 else 16384)
    sae = RandomSae(model.config.get_text_config().hidden_size, wide, device)
    few, real = options.quick, options.weights == "real"
    vocabulary = model.config.get_text_config().vocab_size
    full = Work(
        tuple(prompt(length, i, vocabulary) for i, length in enumerate(FEW_PROMPTS if few else PROMPT_LENGTHS)),
        calibration_text(model, tokenizer, CHUNKS.get(options.model, 128) // (4 if few else 1)),
        vectors=3 if few else 1,
    )
    subject = subject_of(model, hook_name, sae, full, real=real)
    half = torch.float16 if options.float16 else torch.bfloat16
    native = device.type == "cuda" or cpu_has_bfloat16()
    facts: dict[str, Any] = {
        "model": options.model,
        "weights": options.weights,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": options.quick,
        "half_precision": str(half).removeprefix("torch."),
        "half_precision_native": native,
    }
    say(f"{options.model}, {options.weights} weights, on {facts['device']}, float32")
    single = compare(subject, full, options.rows_of_vectors)
    facts |= {
        "vectors_per_s_literal": 1 / single["literal"],
        "vectors_per_s_engine": 1 / single["engine"],
        "ratio": single["literal"] / single["engine"],
        "scales_tried_literal": single["scales_tried"],
        "literal_parts_s": single["literal_parts"],
        "engine_parts_s": single["engine_parts"],
        "tokens_per_s_engine": single["tokens_per_s"],
        "fraction_of_ceiling": single["fraction_of_ceiling"],
        "scale_literal": single["scale_literal"],
        "scale_engine": single["scale_engine"],
    }
    facts |= throughput(subject, full)
    facts |= bridge_rate(subject, full._replace(vectors=1))
    if options.profile:
        facts["time_shares"] = time_shares(subject, full)
    facts["max_relative_difference"] = largest_difference(subject, full)
    model = model.to(half)
    mixed = full
    if not native:
        some = full.prompts[1:2] if few else full.prompts[2:5]
        mixed = Work(some, full.calibration[: 8 if few else 32], vectors=2 if few else 3)
    say(f"the same in {facts['half_precision']}" + ("" if native else ", which this machine only emulates: a small workload"))
    low = compare(subject_of(model, hook_name, sae, mixed, real=real), mixed, options.rows_of_vectors)
    facts |= {
        "vectors_per_s_literal_half": 1 / low["literal"],
        "vectors_per_s_engine_half": 1 / low["engine"],
        "ratio_bfloat16": low["literal"] / low["engine"],
        "ratio_mixed": None if mixed is not full else single["literal"] / low["engine"],
    }
    if mixed is not full:
        model = model.float()
        again = compare(subject_of(model, hook_name, sae, mixed, real=real), mixed, options.rows_of_vectors)
        facts["ratio_mixed"] = again["literal"] / low["engine"]
    else:
        facts |= {
            f"{key}_half": value for key, value in throughput(subject_of(model, hook_name, sae, full, real=real), full).items()
        }
    print(json.dumps({key: rounded(value) for key, value in facts.items()}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma-2-2b, gemma-2-9b, or a folder with a config.json")
    parser.add_argument("--weights", choices=["random", "real"], default="random")
    parser.add_argument("--device")
    parser.add_argument("--float16", action="store_true", help="float16 instead of bfloat16")
    parser.add_argument("--d-sae", type=int, help="width of the random SAE")
    parser.add_argument("--quick", action="store_true", help="3 prompts instead of 14, a quarter of the calibration text")
    parser.add_argument("--profile", action="store_true", help="also say where the engine's time goes")
    parser.add_argument(
        "--rows-of-vectors",
        type=int,
        nargs="+",
        help="numbers of vectors to roll out together, the best counts (default: 1, or 1 4 8 16 on a GPU)",
    )
    options = parser.parse_args()
    if options.weights == "real" and options.model != "smollm2":
        parser.error("--weights real is for --model smollm2; other models are measured with random weights")
    return options


class RandomSae:
    """A ReLU encoder with random weights, float32; about one feature in fifty is active.

    It costs what a JumpReLU costs and has no jump, so that differences show arithmetic and not which side of a jump it fell.
    """

    def __init__(self, d_model: int, d_sae: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.W_enc = torch.randn(d_model, d_sae, generator=generator).to(device) / d_model**0.5
        self.threshold = 1.0

    def fit(self, residual: Tensor) -> None:
        """Choose the threshold on some residual streams."""
        acts = residual.float().flatten(0, -2)[:512] @ self.W_enc
        self.threshold = acts.flatten()[: 1 << 20].float().quantile(0.98).item()

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations."""
        return torch.relu(residual @ self.W_enc - self.threshold)


def load(name: str, weights: str, device: torch.device) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer where weights are real."""
    if weights == "real":
        from saets.experiment.loading import load_experiment
        from saets.model import LOADERS

        found = LOADERS["gguf"](load_experiment(name).model, torch.float32)
        return found.model.to(device).eval().requires_grad_(False), found.tokenizer
    config = CONFIGS[name]() if name in CONFIGS else transformers.AutoConfig.from_pretrained(name)
    # Logits with a spread of about 2, so that text sampled from the model has a loss that steering raises.
    config.get_text_config().initializer_range = 2 / config.get_text_config().hidden_size ** 0.5
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.set_default_device(before)
    return model.eval().requires_grad_(False), None


CONFIGS: dict[str, Callable[[], Any]] = {
    "smollm2": lambda: transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "gemma-2-2b": lambda: transformers.Gemma2Config(),
    "gemma-2-9b": lambda: transformers.Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
}


def prompt(length: int, number: int, vocabulary: int) -> tuple[int, ...]:
    """BOS and some token ids; the prompts of one token are the same, as in the paper."""
    return (1, *((97 * (number + 1) * (i + 1)) % (vocabulary - 2) + 2 for i in range(length - 1)))


def calibration_text(model: Any, tokenizer: Any, chunks: int) -> Tensor:
    """The package's calibration text, or without a tokenizer the model's own unsteered writing."""
    if tokenizer is None:
        engine = RolloutEngine(model, "blocks.0.hook_resid_post", top_k=TOP_K)
        return engine.run([Row((1,), row_seed("calibration", i)) for i in range(chunks)], None, LENGTH).tokens
    text = (Path(__file__).parents[1] / "saets" / "presets" / "calibration.txt").read_text(encoding="utf-8")
    found = []
    for passage in text.splitlines():
        ids = tokenizer.encode(passage, add_special_tokens=False)
        found += [[tokenizer.bos_token_id, *ids[at : at + 31]] for at in range(0, len(ids) - 30, 31)]
    return torch.tensor(found[:chunks])


def subject_of(model: Any, hook_name: str, sae: RandomSae, work: Work, *, real: bool) -> Subject:
    """The model with its hook, an SAE threshold that fits its residual stream, directions, and a grid of scales."""
    layer, config = int(hook_name.split(".")[1]), model.config.get_text_config()
    block = find_blocks(model, config.num_hidden_layers)[layer]
    engine = RolloutEngine(model, hook_name, top_k=TOP_K)
    residual = engine.decoder.lower(work.calibration[:8].to(engine.device))[:, 1:]
    sae.fit(residual)
    generator = torch.Generator().manual_seed(2)
    directions = torch.nn.functional.normalize(torch.randn(64, config.hidden_size, generator=generator), dim=-1)
    grid = PAPER_GRID if real else grid_of(model, block, directions[0], work.calibration.to(engine.device), residual)
    return Subject(model, block, hook_name, sae.encode, directions, grid)


def grid_of(model: Any, block: torch.nn.Module, direction: Tensor, tokens: Tensor, residual: Tensor) -> tuple[float, ...]:
    """Eleven scales of which the fifth raises the loss by 0.5, as about 70 of 0, 20, 40, ... does on SmolLM2."""
    some = tokens[:16]
    target = reference.loss(model, block, 0 * direction, some) + 0.5
    scale = 0.2 * residual.float().norm(dim=-1).median().item()
    for _ in range(40):
        if reference.loss(model, block, scale * direction, some) >= target:
            return tuple(scale / 3.75 * step for step in range(11))
        scale *= 1.3
    sys.exit("no scale raises the loss of this random model by 0.5; try another --model")


def compare(subject: Subject, work: Work, together: Sequence[int] | None) -> dict[str, Any]:
    """Seconds a vector, literal and engine, calibration included."""
    device = subject.model.device
    engine = RolloutEngine(subject.model, subject.hook_name, top_k=TOP_K)
    tokens = work.calibration.to(device)
    unsteered = reference.loss(subject.model, subject.block, torch.zeros(subject.directions.shape[1]), tokens)
    target = unsteered + 0.5

    def literal_calibration() -> float:
        direction = subject.directions[0].to(device)
        return reference.calibrate(subject.model, subject.block, direction, tokens, target=target, grid=subject.grid)

    warm_up(subject, work)
    try:
        calibration_s, scale = timed(device, literal_calibration)
    except ValueError as error:
        sys.exit(f"the literal calibration is not defined here: {error}")

    def literal_rollouts() -> None:
        vector = scale * subject.directions[0].to(device)
        for ids in work.prompts:
            text = reference.generate(subject.model, subject.block, ids, vector, samples=SAMPLES, length=LENGTH, top_k=TOP_K)
            reference.mean_activations(subject.model, subject.block, subject.encode, text)

    rollouts_s, _ = timed(device, literal_rollouts)
    literal = calibration_s + rollouts_s
    say(f"literal: {literal:.2f} s a vector (calibration {calibration_s:.2f}, rollouts {rollouts_s:.2f})")
    calibrator = Calibrator(engine.decoder, tokens, ScaleRule(loss_increase=0.5, grid=subject.grid))
    ceiling = matmul_ceiling(device, subject.model.dtype)
    best: tuple[float, float, float, int] | None = None
    rates: dict[str, float] = {}
    found = scale
    for count in together or ([work.vectors] if device.type == "cpu" else [1, 4, 8, 16]):
        directions = list(subject.directions[:count])
        rows, vectors = batch(work, subject.directions[:count] * scale)
        try:
            for _ in range(2 if device.type == "cuda" else 0):  # the first is for buffers, the second records graphs
                engine.run(rows, vectors, LENGTH, subject.encode)
            roll_s, _ = timed(device, lambda rows=rows, vectors=vectors: engine.run(rows, vectors, LENGTH, subject.encode))
            cal_s, outcomes = timed(device, lambda directions=directions: calibrator.calibrate(directions))
        except torch.OutOfMemoryError:
            say(f"{count} vectors together do not fit into memory")
            break
        found = outcomes[0].scale
        each = (roll_s + cal_s) / count
        speed = operations(subject, rows) / roll_s / ceiling
        say(f"engine: {each:.2f} s a vector (calibration {cal_s / count:.2f}, rollouts {roll_s / count:.2f}), {count} together")
        if best is None or each < best[0]:
            best = (each, cal_s / count, roll_s / count, count)
            rates = {"tokens_per_s": len(rows) * LENGTH / roll_s, "fraction_of_ceiling": speed}
    assert best is not None
    return {
        "literal": literal,
        "engine": best[0],
        "literal_parts": {"calibration": calibration_s, "rollouts": rollouts_s},
        "engine_parts": {"calibration": best[1], "rollouts": best[2], "vectors_together": best[3]},
        "scales_tried": 1 + sum(point < scale for point in subject.grid),
        "scale_literal": scale,
        "scale_engine": found,
        **rates,
    }


def warm_up(subject: Subject, work: Work) -> None:
    """Let libraries choose their kernels before anything is timed."""
    zero = torch.zeros(subject.directions.shape[1])
    reference.generate(subject.model, subject.block, work.prompts[0], zero, samples=8, length=8, top_k=TOP_K)


def batch(work: Work, vectors: Tensor, *, distinct: bool = False) -> tuple[list[Row], Tensor]:
    """Rows of the paper's rollouts for each vector; `distinct` gives every row a vector of its own."""
    rows = [
        Row(ids, row_seed("benchmark", which, number, sample), which)
        for which in range(len(vectors))
        for number, ids in enumerate(work.prompts)
        for sample in range(SAMPLES)
    ]
    if not distinct:
        return rows, vectors
    own = torch.randn(len(rows), vectors.shape[1], generator=torch.Generator().manual_seed(3))
    own = torch.nn.functional.normalize(own, dim=-1) * vectors[0].norm()
    return [row._replace(vector=i) for i, row in enumerate(rows)], own


def throughput(subject: Subject, work: Work) -> dict[str, float]:
    """Ratios of the engine's rates: with a vector a row and with one for all, steered and unsteered, prompts shared and not."""
    device = subject.model.device
    engine = RolloutEngine(subject.model, subject.hook_name, top_k=TOP_K)
    count = 1 if device.type == "cpu" else 4
    scale = subject.grid[3]
    one = subject.directions[:1] * scale
    rows, vectors = batch(work, one.expand(count, -1))
    own_rows, own = batch(work, one.expand(count, -1), distinct=True)
    none = [row._replace(vector=None) for row in rows]

    def rate(rows: list[Row], vectors: Tensor | None, *, share: bool) -> float:
        for _ in range(2 if device.type == "cuda" else 0):
            engine.run(rows, vectors, LENGTH, subject.encode, share_prompts=share)
        seconds, _ = timed(device, lambda: engine.run(rows, vectors, LENGTH, subject.encode, share_prompts=share))
        return len(rows) * LENGTH / seconds

    rates: dict[str, list[float]] = {"single": [], "distinct": [], "steered": [], "unsteered": []}
    for _ in range(2 if device.type == "cpu" else 5):  # interleaved, so that a slow moment hits all
        rates["single"].append(rate(rows, vectors, share=False))
        rates["distinct"].append(rate(own_rows, own, share=False))
        rates["unsteered"].append(rate(none, None, share=True))
        rates["steered"].append(rate(rows, vectors, share=True))
    best = {name: max(found) for name, found in rates.items()}
    return {
        "distinct_over_single": best["distinct"] / best["single"],
        "steered_over_unsteered": best["steered"] / best["unsteered"],
        "shared_over_unshared_prompts": best["steered"] / best["single"],
    }


def operations(subject: Subject, rows: list[Row]) -> int:
    """Floating-point operations in the matrix products of rolling out and encoding these rows, prompts left out."""
    config = subject.model.config.get_text_config()
    decoded = sum(LENGTH - 1 - len(row.prompt) for row in rows)
    block = sum(p.numel() for p in subject.block.parameters() if p.ndim == 2)
    unembedding = config.hidden_size * config.vocab_size
    encoder = config.hidden_size * subject.encode(torch.zeros(1, config.hidden_size, device=subject.model.device)).shape[1]
    below = int(subject.hook_name.split(".")[1]) + 1
    return 2 * (decoded * (config.num_hidden_layers * block + unembedding + encoder) + len(rows) * (below * block + encoder))


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The most operations a second that a large matmul of this precision reaches."""
    best = 0.0
    for m, k, n in CEILING_SHAPES[device.type]:
        a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
        torch.nn.functional.linear(a, b)
        for _ in range(5):
            seconds, _ = timed(device, lambda a=a, b=b: torch.nn.functional.linear(a, b))
            best = max(best, 2 * m * k * n / seconds)
    return best


def time_shares(subject: Subject, work: Work) -> dict[str, float]:
    """Where the engine's time goes, by kind of operation, as torch's profiler sees it."""
    engine = RolloutEngine(subject.model, subject.hook_name, top_k=TOP_K)
    rows, vectors = batch(work, subject.directions[: work.vectors] * subject.grid[3])
    with torch.profiler.profile() as profile:
        engine.run(rows, vectors, LENGTH, subject.encode)
    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
        "top-k": ("aten::topk",),
        "attention": ("scaled_dot_product",),
    }
    cuda = subject.model.device.type == "cuda"
    spent = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in kinds.items() if any(name in event.key for name in names)), "the rest")
        spent[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}


def bridge_rate(subject: Subject, work: Work) -> dict[str, float]:
    """Tokens a second through a TransformerBridge's hooks, where TransformerLens is installed."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return {}
    from saets.engine.bridge import BridgeDecoder
    from saets.model import ByteTokenizer

    copied = share_weights(subject.model)
    bridge: Any = TransformerBridge.boot_transformers("benchmark", hf_model=copied, tokenizer=ByteTokenizer.build())
    engine = RolloutEngine(bridge, subject.hook_name, top_k=TOP_K)
    assert isinstance(engine.decoder, BridgeDecoder)
    rows, vectors = batch(work, subject.directions[: work.vectors] * subject.grid[3])
    seconds, _ = timed(subject.model.device, lambda: engine.run(rows, vectors, LENGTH, subject.encode))
    return {"tokens_per_s_bridge": len(rows) * LENGTH / seconds}


def largest_difference(subject: Subject, work: Work) -> float:
    """||y_engine - y_literal|| / ||y_literal|| of one vector's effect on the same tokens."""
    engine = RolloutEngine(subject.model, subject.hook_name, top_k=TOP_K)
    rows, vectors = batch(work._replace(vectors=1), subject.directions[:1] * subject.grid[3])
    none = [row._replace(vector=None) for row in rows]
    means = []
    for batch_rows, added in ((rows, vectors), (none, None)):
        found = engine.run(batch_rows, added, LENGTH, subject.encode)
        assert found.sums is not None
        literal = torch.cat(
            [
                reference.mean_activations(subject.model, subject.block, subject.encode, part.to(subject.model.device))
                for part in found.tokens.split(SAMPLES)
            ]
        )
        means.append((found.sums.double().mean(dim=0) / LENGTH, literal.mean(dim=0)))
    engine_effect, literal_effect = (means[0][i] - means[1][i] for i in (0, 1))
    return ((engine_effect - literal_effect).norm() / literal_effect.norm()).item()


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work took, and what it gave."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU by its model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
