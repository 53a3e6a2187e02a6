"""The files of infra/ray hold what Ray and Kubernetes take, and commands that this code takes."""

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from mdm.preprocess.encode import Flags
from mdm.storage import StoreOptions
from mdm.utils.command_line import parse_cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "ray"
# The part of KubeRay's RayJob (ray.io/v1) that the file uses; unknown fields are refused, as the
# API server does.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def thing(required: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, NUMBER, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
CONTAINER = thing(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    ports=many(thing(("containerPort",), containerPort=NUMBER, name=TEXT)),
    envFrom=many(thing((), secretRef=thing(("name",), name=TEXT, optional=TRUTH))),
    resources=thing(("requests", "limits"), requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=many(thing(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=TRUTH)),
)
POD = thing(
    ("containers",),
    containers=many(CONTAINER),
    terminationGracePeriodSeconds=NUMBER,
    volumes=many(
        thing(
            ("name",),
            name=TEXT,
            persistentVolumeClaim=thing(("claimName",), claimName=TEXT, readOnly=TRUTH),
        )
    ),
)
TEMPLATE = thing(("spec",), metadata={"type": "object"}, spec=POD)
HEAD = thing(("rayStartParams", "template"), rayStartParams=TEXTS, template=TEMPLATE)
WORKERS = thing(
    ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_JOB = thing(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=thing(("name",), name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=thing(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes=TRUTH,
        ttlSecondsAfterFinished=NUMBER,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=thing(
            ("headGroupSpec",),
            rayVersion=TEXT,
            enableInTreeAutoscaling=TRUTH,
            headGroupSpec=HEAD,
            workerGroupSpecs=many(WORKERS),
        ),
    ),
)


def load(name: str) -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return plain


def test_the_cluster_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = load("cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_workers": "many"}, schema)
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all(not command.startswith("ray start") or "  " not in command for command in starts)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_the_ray_job_fits_its_structure() -> None:
    job = load("rayjob.yaml")
    jsonschema.validate(job, RAY_JOB)
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(wrong, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_ray_jobs_command_is_one_of_ours() -> None:
    job = load("rayjob.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines.encode"]
    flags = parse_cli(Flags, words[3:])
    assert flags.out.startswith("s3://")
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert StoreOptions(sse=variables["MDM_STORE_SSE"])
    assert not any("SECRET" in name for name in variables)
