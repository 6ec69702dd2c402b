"""Makes what the package ships for SmolLM2: a calibration text, an SAE, and the effects of a few hundred vectors.

    python scripts/build_assets.py [--work build/assets] [--only STEP]

Steps: own (the model's own writing), activations (of it and of passages from Debian packages), sae (SAELens), measure (effects),
and shipping. Each writes its result whole into the work folder and is skipped when that is there, so a stopped build goes on
where it was. Passages need `apt-get install dict-gcide dict-wn fortunes debian-reference-fr`; of text only the model's own
writing is shipped. Between sae and measure a person chooses the goals' features (`[features.smollm2]` in the goal files).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saets.config import PRESETS
from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.experiment import load_experiment
from saets.goal import Features, goal_names, load_goal
from saets.model import load_model
from saets.stages.effects import measure_effects
from saets.stages.session import Session
from saets.storage import locate
from saets.store import RunFolder, read_shard
from saets.tokens import encode

ASSETS = PRESETS / "smollm2"
SEED = 7
CHUNK = 64
"""Tokens of a training chunk, BOS included; the BOS position (whose norm is 150 times the others') is left out."""
TOKENS = {"own": 170_000, "passages": 260_000}
SAE = {"d_sae": 4096, "k": 32, "lr": 8e-4, "batch": 512, "epochs": 3}

MAX_NORM = 400.0
"""One token in a thousand has a residual stream 100 times longer than the others; it would be all that the SAE learns."""
VECTORS = 304
"""Decoder rows whose effects are shipped."""
LIVE_DENSITY = 0.0005
"""A feature that fires less often on held-out tokens is not drawn."""
PASSAGES = 160
"""Texts of the shipped calibration text."""

TOPICS = """
London; the British royal family; the Tower of London; a trip to England; Scotland and Wales; Paris; New York; Tokyo; India;
China; Africa; Australia; Mexico; Germany; Russia; a wedding; a bride and groom; marriage; divorce; a birthday party; a family
dinner; childhood; parents and children; grandparents; friendship; falling in love; a broken heart; a love letter; jealousy;
anger; a furious quarrel; hatred and revenge; sadness; grief; death and dying; a funeral; depression and despair; suicide
prevention; fear; a nightmare; ghosts; joy; laughter; praise for a friend; a glowing review; a terrible review; pride; shame;
Jesus Christ; the Bible; a church service; prayer; the pope; Islam; Buddhism; Hindu festivals; Jewish holidays; atheism;
a conspiracy theory; secret government plans; aliens and UFOs; the moon landing; vaccines; propaganda; spies; an election;
democracy; a president; parliament; taxes; war; soldiers; peace talks; the Roman empire; ancient Egypt; medieval knights; the
second world war; the French revolution; the cold war; slavery; kings and queens; pirates; mathematics; algebra; geometry;
probability; physics; gravity; electricity; chemistry; atoms; biology; cells; evolution; dinosaurs; birds; dogs; cats; horses;
fish; insects; snakes; trees; flowers; gardening; farming; food; baking bread; a recipe for soup; coffee; wine; chocolate;
vegetarian cooking; restaurants; health; exercise; sleep; cancer; the heart; the brain; medicine; hospitals; dentists; babies;
school; teachers; university; exams; reading books; poetry; a short story; Shakespeare; newspapers; films; music; the piano;
guitar; dance; painting; museums; photography; architecture; football; tennis; cricket; basketball; the Olympics; chess; video
games; computers; programming in Python; databases; the internet; artificial intelligence; robots; phones; cars; trains;
aeroplanes; ships; bicycles; traffic; space travel; stars and planets; the sun; weather; storms; snow; floods; earthquakes;
volcanoes; the ocean; rivers; mountains; deserts; forests; climate change; recycling; energy; oil; money; banks; the stock
market; a job interview; a meeting at work; a business letter; advertising; shopping; houses; furniture; clothes; fashion;
shoes; jewellery; crime; police; a murder case; prison; judges and courts; law; human rights; philosophy; ethics; happiness;
time; memory; dreams; language; grammar; French words; learning Spanish; numbers; colours; a telephone call; an email
""".replace("\n", " ")

OPENINGS = (
    ("Here is a short text about {}.\n\n", "I think that {} ", "Everything you need to know about {}: ", "Last year, {} "),
    (
        "The history of {} began",
        "In this lesson we learn about {}. ",
        "Question: what about {}?\nAnswer:",
        "Once upon a time, {} ",
    ),
)
FRENCH = (
    "Bonjour, je m'appelle",
    "La France est",
    "Je pense que",
    "Il était une fois",
    "Le chat est",
    "Nous avons",
    "Merci pour",
)


def own_writing(work: Path) -> None:
    """The model's own writing on many topics, unsteered, one JSON line a text."""
    experiment = load_experiment("smollm2")
    model = load_model(experiment.model)
    engine = RolloutEngine(model, experiment.hook_name, top_k=50, temperature=0.9)
    topics = [topic.strip() for topic in TOPICS.split(";") if topic.strip()]
    prompts = [opening.format(topic) for topic in topics for opening in itertools.chain(*OPENINGS)]
    random.Random(SEED).shuffle(prompts)
    prompts = [*itertools.islice(itertools.cycle(prompts), TOKENS["own"] // CHUNK - 20 * len(FRENCH))] + list(FRENCH) * 20
    rows = [Row(prompt, row_seed(SEED, "own", i)) for i, prompt in enumerate(prompts)]
    started, batch = time.monotonic(), 336
    with _WholeFile(work / "own.jsonl") as file:
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            tokens = engine.run(part, None, CHUNK).tokens
            for ids in tokens.tolist():
                file.write(json.dumps(model.tokenizer.decode(ids[1:], skip_special_tokens=True)) + "\n")
            _progress("own writing", at + len(part), len(rows), started)


def passages() -> Iterator[str]:
    """Passages of a few sentences from installed dictionaries, fortunes and French reference text, mixed."""
    dictionaries = [_entries(Path("/usr/share/dictd") / name) for name in ("gcide.dict.dz", "wn.dict.dz")]
    fortunes = Path("/usr/share/games/fortunes")
    sayings = [
        saying
        for path in sorted(fortunes.glob("*.u8"))
        for saying in path.read_text(errors="ignore").split("\n%\n")
        if "art" not in path.name
    ]
    french = _paragraphs(Path("/usr/share/debian-reference/debian-reference.fr.txt.gz"))
    pools = [list(dict.fromkeys(_tidy(text) for text in pool)) for pool in (*dictionaries, sayings, french)]
    if not all(pools):
        sys.exit("passages are missing: apt-get install dict-gcide dict-wn fortunes debian-reference-fr")
    shuffle = random.Random(SEED)
    for pool in pools:
        shuffle.shuffle(pool)
    for texts in itertools.zip_longest(*(pool[: max(map(len, pools)) // 2] for pool in pools)):
        yield from (text for text in texts if text and len(text) > 80)


def activations(work: Path) -> None:
    """Residual streams at the SAE's hook, float16 [tokens, d_model], shuffled."""
    experiment = load_experiment("smollm2")
    model = load_model(experiment.model)
    own = [json.loads(line) for line in (work / "own.jsonl").read_text().splitlines()]
    budget = TOKENS["passages"]
    chunks: list[list[int]] = []
    for text in own:
        chunks.append(encode(model.tokenizer, text)[:CHUNK])
    for text in passages():
        ids = encode(model.tokenizer, text)[:CHUNK]
        budget -= len(ids) - 1
        chunks.append(ids)
        if budget < 0:
            break
    chunks = sorted((chunk for chunk in chunks if len(chunk) > 8), key=len)
    layer = int(experiment.hook_name.split(".")[1])
    kept: list[torch.Tensor] = []
    started = time.monotonic()
    with torch.no_grad():
        for length, group in itertools.groupby(chunks, key=len):
            ids = torch.tensor(list(group))
            for part in ids.split(max(1, 4096 // length)):
                _, cache = model.run_with_cache(part, names_filter=experiment.hook_name, stop_at_layer=layer + 1)
                kept.append(cache[experiment.hook_name][:, 1:].reshape(-1, model.cfg.d_model).half())
            done = sum(map(len, kept))
            _progress("activations", done, sum(len(chunk) - 1 for chunk in chunks), started)
    everything = torch.cat(kept)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SEED))
    np.save(work / "activations.tmp.npy", everything[order].numpy())
    (work / "activations.tmp.npy").rename(work / "activations.npy")


def train_sae(work: Path) -> None:
    """A TopK SAE by SAELens, saved as SAELens reads it, in float16, with its held-out fit beside it."""
    from sae_lens import SAE as LoadedSAE
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from safetensors.torch import load_file, save_file

    experiment = load_experiment("smollm2")
    data = torch.from_numpy(np.load(work / "activations.npy"))
    data = data[data.float().norm(dim=1) < MAX_NORM]
    held_out, train = data[:16384].float(), data[16384:]
    batch, epochs = SAE["batch"], SAE["epochs"]
    total = len(train) // batch * batch * epochs

    def batches() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        while True:
            for part in torch.randperm(len(train), generator=generator).split(batch):
                if len(part) == batch:
                    yield train[part].float()

    torch.manual_seed(SEED)
    config = TopKTrainingSAEConfig(
        d_in=train.shape[1],
        d_sae=SAE["d_sae"],
        k=SAE["k"],
        device="cpu",
        normalize_activations="expected_average_only_in",
    )
    config.metadata.hook_name = experiment.hook_name
    config.metadata.model_name = "SmolLM2-135M-Instruct"
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=batch,
            device="cpu",
            lr=SAE["lr"],
            lr_end=SAE["lr"] / 10,
            lr_decay_steps=total // batch // 4,
            lr_warm_up_steps=100,
            n_checkpoints=0,
            autocast=False,
        ),
        sae=TopKTrainingSAE(config),
        data_provider=batches(),
    )
    sae = trainer.fit()
    making = work / "sae.tmp"
    shutil.rmtree(making, ignore_errors=True)
    sae.save_inference_model(str(making))
    weights = {name: tensor.half() for name, tensor in load_file(making / "sae_weights.safetensors").items()}
    save_file(weights, making / "sae_weights.safetensors")
    (making / "sparsity.safetensors").unlink(missing_ok=True)
    loaded = LoadedSAE.load_from_disk(str(making), device="cpu").float()
    with torch.no_grad():
        acts = loaded.encode(held_out)
        error = (loaded.decode(acts) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    facts = {
        "tokens": len(train),
        "fraction_of_variance_unexplained": round(error.item(), 4),
        "l0": round((acts > 0).sum(-1).float().mean().item(), 2),
        "dead_features": int((acts.amax(0) <= 0).sum()),
        **SAE,
    }
    (making / "quality.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts, file=sys.stderr)
    np.save(work / "live.npy", np.flatnonzero(((acts > 0).float().mean(0) > LIVE_DENSITY).numpy()))
    making.rename(work / "sae")


def ship_sae(work: Path) -> None:
    """The SAE and the calibration text into the package."""
    shutil.copytree(work / "sae", ASSETS / "sae", dirs_exist_ok=True)
    texts = [" ".join(json.loads(line).split()) for line in (work / "own.jsonl").read_text().splitlines()]
    long = [text for text in texts if len(text.split()) >= 42 and text.isprintable()]
    locate(PRESETS / "calibration.txt").write_text("\n".join(long[:: len(long) // PASSAGES][:PASSAGES]) + "\n")


def measure(work: Path) -> None:
    """Effects of decoder rows: the goals' features, and live features drawn at random; a run folder, so it resumes."""
    experiment = load_experiment("smollm2")
    live = np.load(work / "live.npy")
    mine = {feature for name in goal_names() for feature, _ in _target(name)}
    drawn = np.random.default_rng(SEED).permutation(np.setdiff1d(live, sorted(mine)))
    rows = [*sorted(mine), *drawn[: VECTORS - len(mine)].tolist()]
    overrides = [f"effects.sources=[{{kind='decoder', rows={rows}}}]"]
    experiment = load_experiment("smollm2", overrides)
    with Session.open(experiment, work / "measured", measure=True) as session:
        measure_effects(session)


def ship_effects(work: Path) -> None:
    """The measured effects as one shard each of rows and baseline, with the manifest that says how they were made."""
    measured, shipped = RunFolder(work / "measured"), ASSETS / "measured"
    shutil.rmtree(shipped, ignore_errors=True)
    for table, name in ((measured.effects, "effects"), (measured.baseline, "effects/baseline")):
        (shipped / name).mkdir(parents=True)
        rows = pa.concat_tables([read_shard(shard) for shard in table.shards()]).sort_by("vector_id")
        pq.write_table(rows, shipped / name / "rows.parquet", compression="zstd", compression_level=19, use_dictionary=False)
    locate(shipped / "manifest.json").write_text((measured.path / "manifest.json").read_text())


STEPS = {
    "own": (own_writing, "own.jsonl"),
    "activations": (activations, "activations.npy"),
    "sae": (train_sae, "sae"),
    "ship-sae": (ship_sae, None),
    "measure": (measure, None),
    "ship-effects": (ship_effects, None),
}
"""Each step and what shows that it is done; those with None are quick or resume by themselves."""


def _target(goal: str) -> Features:
    features = load_goal(goal).features.get("smollm2")
    return features.target if features else ()


class _WholeFile:
    """A text file that gets its name only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")

    def __enter__(self):
        self.file = self.temporary.open("w", encoding="utf-8")
        return self.file

    def __exit__(self, kind, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.temporary.rename(self.path)


def _entries(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "ignore"))


def _paragraphs(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8", "ignore").split("\n\n") if path.is_file() else []


def _tidy(text: str) -> str:
    text = re.sub(r"\[1913 Webster\]|\[PJC\]|[{}\\]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _progress(what: str, done: int, total: int, started: float) -> None:
    rate = done / (time.monotonic() - started)
    print(f"{what}: {done:,}/{total:,}, {rate:,.0f}/s, {max(0, total - done) / rate:,.0f} s left", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--only", choices=STEPS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, (step, result) in STEPS.items():
        if arguments.only in (None, name) and (result is None or not (arguments.work / result).exists()):
            step(arguments.work)


if __name__ == "__main__":
    main()
