"""The files in cluster/ are what the programs that read them expect, name one image, and hold no key."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from jsonschema import ValidationError
from pydantic import ValidationError as FieldError

from saets.cli import parser
from saets.keys import looks_like_key
from tests.cluster.launcher import check_launcher_file
from tests.cluster.manifests import RayCluster, RayJob

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
LAUNCHERS = ("aws.yaml", "local.yaml")
MANIFESTS: dict[str, type[RayCluster] | type[RayJob]] = {"raycluster.yaml": RayCluster, "rayjob.yaml": RayJob}
BIN = Path(sys.executable).parent


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def launcher(name: str) -> dict[str, Any]:
    return documents(CLUSTER / name)[0]


def manifest(name: str) -> RayCluster | RayJob:
    return MANIFESTS[name].model_validate(documents(CLUSTER / "kuberay" / name)[0])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_up_accepts_the_launcher_file(name: str) -> None:
    check_launcher_file(launcher(name))


@pytest.mark.parametrize(("name", "break_it"), [("aws.yaml", {"max_worker": 3}), ("aws.yaml", {"head_node_type": "boss"})])
def test_ray_up_would_refuse_a_misspelt_one(name: str, break_it: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ValidationError)):
        check_launcher_file({**launcher(name), **break_it})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_starting_a_node_ends_nobody_elses_ray(name: str) -> None:
    prepared = check_launcher_file(launcher(name))
    commands = [command for kind in ("head", "worker") for command in prepared[f"{kind}_start_ray_commands"]]
    assert commands
    assert not any("ray stop" in command for command in commands)
    assert any("--autoscaling-config=" in command for command in prepared["head_start_ray_commands"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_the_pods(name: str) -> None:
    for group in manifest(name).cluster().groups():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-a-group"}, **group.template}
        kubernetes_validate.validate(pod, "1.34", strict=True)
        wrong = copy.deepcopy(pod)
        wrong["spec"]["containers"][0]["imagee"] = "saets"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.34", strict=True)


@pytest.mark.parametrize("name", ["storage.yaml", "secrets.example.yaml"])
def test_kubernetes_accepts_what_the_pods_need(name: str) -> None:
    found = documents(CLUSTER / "kuberay" / name)
    assert found
    for document in found:
        kubernetes_validate.validate(document, "1.34", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**document, "metadataa": {}}, "1.34", strict=True)


def test_a_misspelt_field_of_kuberay_is_refused() -> None:
    job = documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]
    job["spec"]["entryPoint"] = job["spec"].pop("entrypoint")
    with pytest.raises(FieldError, match="entryPoint"):
        RayJob.model_validate(job)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_find_what_they_name(name: str) -> None:
    """Volumes, claims and Secrets; the judge's key goes to the head alone."""
    there = {
        (document["kind"], document["metadata"]["name"])
        for other in ("storage.yaml", "secrets.example.yaml")
        for document in documents(CLUSTER / "kuberay" / other)
    }
    with_key = []
    for group in manifest(name).cluster().groups():
        spec = group.template["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume}
        (container,) = spec["containers"]
        secrets = {entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"] if "valueFrom" in entry}
        whole = {entry["secretRef"]["name"] for entry in container.get("envFrom", [])}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {("PersistentVolumeClaim", claim) for claim in claims} | {("Secret", name) for name in secrets | whole} <= there
        with_key += [container["name"]] * ("saets-judge" in secrets | whole)
    assert with_key == ["ray-head"]


def test_every_file_runs_the_pinned_ray() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert pinned[1] == ray.__version__
    images = {
        found for path in FILES for found in re.findall(r"registry\.example\.com/[\w./:-]+", path.read_text(encoding="utf-8"))
    }
    version = re.search(r'^version = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert images == {f"registry.example.com/saets:{version[1]}-ray{pinned[1]}"}
    assert {manifest(name).cluster().rayVersion for name in MANIFESTS} == {pinned[1]}


def commands() -> list[list[str]]:
    """What follows `python -m saets` or `scripts/pipeline.py --` in the files and the pages about them."""
    found = []
    for path in [*FILES, ROOT / "README.md", ROOT / "scripts" / "pipeline.py"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:python -m saets|scripts/pipeline\.py --) (.+)", text):
            found.append(shlex.split(line.replace('"$@"', "tiny").partition("`")[0], comments=True))
    return found


def test_every_entry_point_parses() -> None:
    assert len(commands()) >= 5
    for command in commands():
        assert parser().parse_args(command).command


def test_no_file_holds_a_key() -> None:
    for path in FILES:
        words = re.split(r"[\s\"'`=,{}\[\]]+", path.read_text(encoding="utf-8"))
        assert not [word for word in words if looks_like_key(word)], path


def test_cluster_holds_no_python() -> None:
    assert not [path for path in FILES if path.suffix == ".py"]


def test_shell_scripts_are_sound() -> None:
    scripts = [ROOT / "scripts" / name for name in ("run", "test", "setup", "try_ray_up")]
    checked = [*scripts, ROOT / ".ci" / "run", CLUSTER / "slurm.sbatch"]
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", *checked], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_files_of_the_launcher_lie_where_the_image_and_its_variables_say(name: str) -> None:
    """`ray up` takes `~` for the HOME of the image's variables, and that of root where there is none."""
    home = re.search(r"^ENV HOME=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert home
    found = launcher(name)
    mounts = {path.replace("~", home[1]) for path in found["file_mounts"]}
    (token,) = (option.partition("HF_TOKEN_PATH=")[2] for option in found["docker"]["run_options"] if "HF_TOKEN_PATH" in option)
    assert mounts == {f"{home[1]}/.ray/auth_token", token}


def test_the_dockerfile_is_sound() -> None:
    done = subprocess.run([BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
