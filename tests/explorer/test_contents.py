"""What the page shows of a run is what its rows, its approximator and its decoder say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from saets.errors import InputError
from saets.experiment.config import PRESETS, Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.explorer.contents import Contents, gather
from saets.explorer.sources import HERE, PREDICTED, SUMMED, Sources
from saets.methods import formulas as methods
from saets.records import vector_id
from saets.run_folder.store import RunFolder
from saets.sae import load_sae
from saets.terminal.progress import Silent
from saets.vector.vector import SteeringVector
from tests.explorer.conftest import MEASURED, approximator, planted, write


def explored(experiment: Experiment, run: RunFolder, top: int = 5) -> Contents:
    return gather(Sources.of(experiment, run), top, Silent())


def place(contents: Contents, vector: np.ndarray) -> int:
    return next(i for i, facts in enumerate(contents.vectors) if facts["vector_id"] == vector_id(vector))


def strongest(values: np.ndarray, top: int = 5) -> list[int]:
    return [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:top]]


def test_effects_of_each_vector_and_causes_of_each_feature_are_the_largest_in_size(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    contents = explored(tiny_experiment, run)
    vectors, effects = planted(tiny_experiment)
    at = [place(contents, vector) for vector in vectors]
    assert len(contents.vectors) == 10
    for vector, effect in enumerate(effects):
        lists = contents.lists["effects"]
        assert lists.which[at[vector]].tolist() == strongest(effect)
        assert lists.value[at[vector]].tolist() == effect[strongest(effect)].tolist()
    for feature in range(64):
        lists = contents.lists["causes"]
        assert lists.which[feature].tolist() == [at[vector] for vector in strongest(effects[:, feature])]
        assert lists.value[feature].tolist() == effects[strongest(effects[:, feature]), feature].tolist()


def test_a_vector_that_is_a_decoder_row_is_known_as_its_features_and_keeps_what_was_found(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    contents = explored(tiny_experiment, run)
    vectors, effects = planted(tiny_experiment)
    own = {facts["feature"]: facts for facts in contents.vectors if facts["feature"] is not None}
    assert own.keys() == set(MEASURED)
    assert own[3]["where"] == HERE
    assert (own[3]["scale"], own[3]["calibration"], own[3]["standard_error"]) == (10, "capped", 0.1)
    known = {feature: effects[i, feature] for i, feature in enumerate(MEASURED)}
    on_itself = contents.on_itself["on_itself"]
    assert {i: on_itself[i].item() for i in range(64) if not on_itself[i].isnan()} == known


def test_a_vector_measured_anew_counts_once_with_its_newest_row(run: RunFolder, tiny_experiment: Experiment) -> None:
    vectors, effects = planted(tiny_experiment)
    write(run, vectors[:1], -3 * effects[:1])
    contents = explored(tiny_experiment, run)
    assert len(contents.vectors) == 10
    assert contents.on_itself["on_itself"][3].item() == pytest.approx(-3 * effects[0, 3], rel=1e-3)
    assert contents.lists["causes"].which.max() < 10


def test_standard_errors_of_each_feature_go_with_the_effects(run: RunFolder, tiny_experiment: Experiment) -> None:
    vectors, effects = planted(tiny_experiment)
    write(run, vectors[:1], effects[:1], errors=True)
    contents = explored(tiny_experiment, run)
    lists = contents.lists["effects"]
    assert lists.error is not None
    at = place(contents, vectors[0])
    assert lists.error[at].tolist() == pytest.approx((lists.value[at].abs() / 8).tolist(), rel=1e-3)
    assert lists.error[[i for i in range(10) if i != at]].isnan().all()


def test_vectors_with_like_effects_are_those_of_the_largest_cosine_of_centred_effects(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    contents = explored(tiny_experiment, run, top=3)
    vectors, effects = planted(tiny_experiment)
    centred = torch.tensor(effects - effects.mean(0))
    at = [place(contents, vector) for vector in vectors]
    for vector in range(10):
        cosines = cosine_similarity(centred[vector], centred, dim=1)
        cosines[vector] = -2
        expected = cosines.sort(descending=True).values[:3]
        assert contents.lists["effects_alike"].value[at[vector]].tolist() == pytest.approx(expected.tolist(), abs=0.01)
    assert (contents.compared, contents.variance_share) == (64, pytest.approx(1))


def test_predictions_are_those_of_the_approximator_for_decoder_rows_sae_ts_and_other_vectors(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    made = approximator(run)
    contents = explored(tiny_experiment, run)
    decoder = load_sae(tiny_experiment.sae, 32).W_dec
    for feature in (0, 3, 63):
        target = torch.zeros(64)
        target[feature] = 1
        wanted = {"predicted": decoder[feature], "targeted": methods.sae_ts(target, made)}
        for name, direction in wanted.items():
            effect = normalize(direction, dim=0) @ made.M + made.b
            lists = contents.lists[name]
            assert lists.which[feature].tolist() == strongest(effect.numpy())
            assert lists.value[feature].tolist() == pytest.approx(effect[lists.which[feature]].tolist(), rel=1e-4, abs=1e-5)
            assert contents.on_itself[f"{name}_on_itself"][feature].item() == pytest.approx(effect[feature].item(), abs=1e-5)
    vectors, _ = planted(tiny_experiment)
    others = [facts for facts in contents.vectors if facts["feature"] is None]
    for row, facts in enumerate(others):
        vector = next(vector for vector in vectors if vector_id(vector) == facts["vector_id"])
        effect = torch.tensor(vector) @ made.M + made.b
        assert contents.lists["vector_predicted"].which[row].tolist() == strongest(effect.numpy())
        cosines = normalize(decoder, dim=1) @ torch.tensor(vector)
        nearest = contents.lists["nearest"].value[row].abs().tolist()
        assert nearest == pytest.approx(cosines.abs().sort(descending=True).values[:5].tolist(), abs=0.01)


def test_features_are_neighbours_by_their_decoder_rows_and_by_what_these_are_predicted_to_do_beyond_b(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    made = approximator(run)
    contents = explored(tiny_experiment, run)
    decoder = load_sae(tiny_experiment.sae, 32).W_dec
    for name, of in (("decoder_alike", decoder), ("predicted_alike", normalize(decoder, dim=1) @ made.M)):
        for feature in (0, 17):
            cosines = cosine_similarity(of[feature], of, dim=1)
            cosines[feature] = -2
            expected = cosines.sort(descending=True).values[:5].tolist()
            assert contents.lists[name].value[feature].tolist() == pytest.approx(expected, abs=0.01)


def test_a_feature_that_no_vector_changes_cannot_be_targeted(run: RunFolder, tiny_experiment: Experiment) -> None:
    made = approximator(run)
    made.M[:, 9] = 0
    made.save(run.approximator)
    contents = explored(tiny_experiment, run)
    assert contents.lists["targeted"].value[9].isnan().all()
    assert not contents.lists["targeted"].value[8].isnan().any()


def test_the_runs_own_vectors_have_their_names_and_are_predicted_where_they_were_not_measured(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    made = approximator(run)
    vectors, _ = planted(tiny_experiment)
    new = SteeringVector.from_tensor(torch.ones(32), tiny_experiment.hook_name)
    for name, vector in (("known", torch.tensor(vectors[5])), ("a--b", new.direction)):
        SteeringVector(vector, tiny_experiment.hook_name).save(run.vector(name, "sae_ts"))
    contents = explored(tiny_experiment, run)
    assert contents.vectors[place(contents, vectors[5])]["names"] == [["known", "sae_ts"]]
    last = contents.vectors[-1]
    assert (last["vector_id"], last["names"], last["where"]) == (new.id, [["a--b", "sae_ts"]], PREDICTED)
    effect = new.direction @ made.M + made.b
    assert contents.lists["vector_predicted"].which[-1].tolist() == strongest(effect.numpy())
    assert len(contents.lists["effects"].which) == 10


def test_an_approximator_alone_is_enough(tmp_path: Path, tiny_experiment: Experiment) -> None:
    run = RunFolder(tmp_path / "pulled")
    approximator(run)
    sources = Sources.of(tiny_experiment, run)
    contents = gather(sources, 5, Silent())
    assert contents.lists.keys() == {"predicted", "targeted", "decoder_alike", "predicted_alike"}
    assert contents.vectors == []
    assert "saets effects" in sources.missing["measured effects"]
    assert str(tmp_path) not in "".join(sources.missing.values())


def test_effects_alone_are_enough_and_without_the_sae_every_vector_is_one_of_its_own(
    run: RunFolder, tiny_experiment: Experiment, tmp_path: Path
) -> None:
    gone = tiny_experiment.sae.model_copy(update={"loader": "folder", "path": str(tmp_path / "gone")})
    experiment = tiny_experiment.model_copy(update={"sae": gone})
    run.update_stage("effects", {"settings": None})
    sources = Sources.of(experiment, run)
    contents = gather(sources, 5, Silent())
    assert contents.lists.keys() == {"effects", "causes", "effects_alike"}
    assert all(facts["feature"] is None for facts in contents.vectors)
    assert sources.missing.keys() == {"predictions", "decoder", "cards"}
    assert "gone has no cfg.json" in sources.missing["decoder"]


def test_a_run_with_neither_effects_nor_an_approximator_says_which_stages_are_missing(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    with pytest.raises(InputError, match=r"no measured effects and no approximator; run `saets effects` and `saets fit` first"):
        Sources.of(tiny_experiment, RunFolder(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()


def test_effects_by_other_settings_and_parts_of_other_shapes_are_refused(run: RunFolder, tiny_experiment: Experiment) -> None:
    other = tiny_experiment.model_copy(update={"hook_name": "blocks.1.hook_resid_post"})
    with pytest.raises(InputError, match="by other settings .*hook_name"):
        Sources.of(other, run)
    made = approximator(run)
    type(made)(made.M[:, :8].contiguous(), made.b[:8].contiguous()).save(run.approximator)
    with pytest.raises(InputError, match="do not belong together: d_model 32 and 8 features, d_model 32 and 64 features"):
        Sources.of(tiny_experiment, run)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, Contents]:
    """The preset with what is shipped and no run."""
    sources = Sources.of(load_experiment("smollm2"), RunFolder(tmp_path_factory.mktemp("smollm2") / "none"))
    return sources, gather(sources, 12, Silent())


def test_shipped_sums_are_shown_by_their_links_and_causes_end_where_one_might_be_missing(
    smollm2: tuple[Sources, Contents],
) -> None:
    _, contents = smollm2
    links = pl.read_parquet(PRESETS / "smollm2" / "links.parquet").sort("feature")
    where = {facts["feature"]: (number, facts["where"]) for number, facts in enumerate(contents.vectors)}
    summed = [feature for feature in range(4096) if where.get(feature, (0, ""))[1] == SUMMED]
    rows = pl.read_parquet(PRESETS / "smollm2" / "measured" / "effects" / "summed" / "rows.parquet")
    assert summed == sorted(rows.filter(source="decoder")["index"].to_list())
    for feature in summed[::300]:
        number = where[feature][0]
        linked = [(one["feature"], pytest.approx(one["effect"], rel=1e-3)) for one in links["effects"][feature]]
        lists = contents.lists["effects"]
        assert list(zip(lists.which[number].tolist(), lists.value[number].tolist(), strict=True))[:10] == linked
        assert lists.value[number][10:].isnan().all()
    for feature in range(0, 4096, 300):
        causes = contents.lists["causes"]
        kept = {i: v for i, v in zip(causes.which[feature].tolist(), causes.value[feature].tolist(), strict=True) if v == v}
        linked = {where[one["feature"]][0]: one["effect"] for one in links["causes"][feature]}
        weakest = min(abs(value) for value in linked.values())
        assert all(abs(value) >= weakest for value in kept.values())
        assert len(kept) == 12 or kept.keys() >= linked.keys()


def test_an_experiment_with_cards_says_what_features_fire_on(smollm2: tuple[Sources, Contents]) -> None:
    sources, contents = smollm2
    assert sources.cards is not None
    ((wedding, _),) = load_goal("wedding").features["smollm2"].target
    assert sources.cards["contexts"][wedding][0]["token"].strip() == "married"
    assert sources.missing == {}
    assert {facts["where"] for facts in contents.vectors} == {"shipped", SUMMED}
