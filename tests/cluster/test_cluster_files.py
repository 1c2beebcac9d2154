"""`scripts/cluster/`: every file against what will read it: Ray's launcher, Kubernetes, KubeRay, bash, and fedsim."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "cluster"
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "ray.io_v1.schema.json").read_text())


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
    return found


def check_kuberay(document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMA)


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = cluster_spec(document)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}


def check_pods(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e .[dev]")
    for pod in pods(document):
        validator.validate(pod, "1.31", strict=True)


class TestAutoscaler:
    """Ray's own validation of a cluster file."""

    def test_ray_takes_it(self):
        from ray.autoscaler._private.util import prepare_config, validate_config

        prepared = prepare_config(manifest("autoscaler.yaml"))
        validate_config(prepared)
        assert prepared["available_node_types"]["head"]["resources"]["GPU"] == 1
        workers = [t for name, t in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
        assert sum(worker["max_workers"] for worker in workers) <= prepared["max_workers"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config.update(head_nod_type=config.pop("head_node_type")),
            lambda config: config.update(head_node_type="heads"),
            lambda config: config["available_node_types"]["cpu_worker"].update(max_worker=3),
            lambda config: config["provider"].pop("type"),
        ],
    )
    def test_a_wrong_name_would_be_found(self, change):
        from ray.autoscaler._private.util import prepare_config, validate_config

        config = manifest("autoscaler.yaml")
        change(config)
        with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
            validate_config(prepare_config(config))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_kuberays(name):
    check_kuberay(manifest(name))


@pytest.mark.parametrize("name", MANIFESTS)
def test_pod_templates_are_kubernetes_own(name):
    check_pods(manifest(name))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], object]]] = {
    "job field": (check_kuberay, lambda d: d["spec"].update(entryPoint=d["spec"].pop("entrypoint"))),
    "mode": (check_kuberay, lambda d: d["spec"].update(submissionMode="K8sJob")),
    "cluster field": (check_kuberay, lambda d: cluster_spec(d).update(workerGroupSpec=[])),
    "group without replicas": (check_kuberay, lambda d: cluster_spec(d)["workerGroupSpecs"][0].pop("minReplicas")),
    "start parameter that is a number": (
        check_kuberay,
        lambda d: cluster_spec(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 1}),
    ),
    "version": (check_kuberay, lambda d: d.update(apiVersion="ray.io/v1beta1")),
    "container field": (
        check_pods,
        lambda d: cluster_spec(d)["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumeMount=[]),
    ),
    "volume": (
        check_pods,
        lambda d: cluster_spec(d)["headGroupSpec"]["template"]["spec"]["volumes"][0].update(
            persistentVolumeClaim={"claim": "fedsim"}
        ),
    ),
}


@pytest.mark.parametrize(("check", "change"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_would_be_found(check, change):
    document = copy.deepcopy(manifest("rayjob.yaml"))
    check(document)
    change(document)
    with pytest.raises(Exception, match=r".+") as caught:
        check(document)
    assert "alid" in type(caught.value).__name__, "a validator's error"


@pytest.mark.parametrize("name", MANIFESTS)
def test_volumes_and_start_parameters_belong_together(name):
    for pod in pods(manifest(name)):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounted == volumes
    assert cluster_spec(manifest(name))["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"


def command_lines() -> list[tuple[str, str]]:
    """Every `fedsim ...` of the folder's files with what shells put in place of variables."""
    found = []
    for path in sorted(FOLDER.iterdir()):
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        for line in re.findall(r"\bfedsim ((?:run|resume) [^\n;'&`()]+)", text):
            words = re.sub(r'"?\$\{?@\}?"?|\[[^]]*\]|\$more', " --set federation.alpha=0.1", line)
            words = re.sub(r"\"?\$\{?\w+\}?\"?", "value", words)
            if "--address" in words:
                found.append((path.name, words))
    return found


def test_command_lines_were_found():
    assert {name for name, _ in command_lines()} >= {"autoscaler.yaml", "rayjob.yaml", "slurm.sh", "submit.sh"}


@pytest.mark.parametrize(("name", "line"), command_lines())
def test_fedsim_understands_the_command_lines(name, line):
    import typer

    from fedsim.cli.app import app

    group = typer.main.get_command(app)
    command, *words = shlex.split(line)
    context = group.make_context("fedsim", [command, *words])
    found = group.get_command(context, command)
    parameters = found.make_context(command, list(words), parent=context).params
    assert parameters["address"] in ("auto", "value")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o111, "executable"
    usage = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert usage.returncode != 0
    assert "usage:" in usage.stderr


def test_every_file_is_in_the_table():
    table = (FOLDER / "README.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or f"| `{path.name}` |" in table, path.name


def test_a_job_needs_an_absolute_run_directory():
    done = subprocess.run(["bash", str(FOLDER / "submit.sh"), "c.yaml", "runs/x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be absolute" in done.stderr
