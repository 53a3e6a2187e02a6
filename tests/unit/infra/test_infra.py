"""Scripts, manifests and image are linted; the batch script's signals and exit codes run for real.

SLURM itself is not at hand: `srun` and `scontrol` are stand-ins that do what their manuals say.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.helpers import ROOT

SCRIPTS = sorted([*ROOT.glob("infra/**/*.sh"), *ROOT.glob("infra/**/*.sbatch"), ROOT / ".ci/run"])
BATCH = ROOT / "infra/slurm/pretrain.sbatch"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_are_clean(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def documents() -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "infra/k8s/pretrain.yaml").read_text()))


def test_kubernetes_knows_every_field():
    for document in documents():
        kubernetes_validate.validate(document, "1.37", strict=True)
    broken = documents()[-1]
    broken["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_the_manifest_fits_together():
    service, hosts, job = documents()
    name, spec = job["metadata"]["name"], job["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    lines = [line.split() for line in hosts["data"]["hosts"].splitlines()]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert lines == [
        [f"{name}-{i}.{pod['subdomain']}", f"slots={gpus}"] for i in range(spec["completions"])
    ]
    assert (ROOT / container["command"][0]).exists()
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {2: "FailJob", 3: "FailJob", 75: "Ignore"}


def test_the_image_copies_what_exists(tmp_path):
    shutil.copy(ROOT / "infra/docker/Dockerfile", tmp_path)
    parser = DockerfileParser(str(tmp_path))
    steps = [(s["instruction"], s["value"]) for s in parser.structure]
    assert sum(name == "FROM" for name, _ in steps) == 2
    copied = [value.split() for name, value in steps if name == "COPY" and "--from" not in value]
    sources = [w for words in copied for w in words[:-1] if not w.startswith("--")]
    assert {"mdm", "pipelines", "deepspeed_configs", "infra"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    assert ("USER", "mdm") in steps
    versions = (ROOT / "pyproject.toml").read_text()
    assert any("torch==2.13.0" in value for name, value in steps if name == "RUN")
    assert "torch==2.13.0" in versions


SRUN = """#!/bin/bash
trap 'echo terminated >> "$LOG"; exit 75' TERM
echo "$@" >> "$LOG"
cat "$HOSTS" >> "$LOG"
[ "$CODE" = wait ] || exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >> "$LOG"; fi
"""


def start_batch(tmp_path: Path, code: str) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "CODE": code,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    return subprocess.Popen([shutil.which("bash") or "bash", BATCH, "--preset", "demo"], env=env)


def test_a_batch_job_that_is_told_to_stop_saves_and_is_queued_again(tmp_path):
    job = start_batch(tmp_path, "wait")
    log = tmp_path / "log"
    while not log.exists() or "node2" not in log.read_text():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 75
    lines = log.read_text().splitlines()
    assert lines == [
        "--kill-on-bad-exit=0 infra/node.sh --preset demo",
        "node1 slots=8",
        "node2 slots=8",
        "terminated",
        "requeue 7",
    ]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_batch_job_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    assert start_batch(tmp_path, str(code)).wait() == code
    assert "requeue" not in (tmp_path / "log").read_text()
