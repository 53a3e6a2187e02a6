import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from mdm.checkpoint.state import RunError
from mdm.loss import Loss
from mdm.train.deepspeed_config import (
    ALLOWED,
    OWNED_BY_CONFIG,
    load_deepspeed_config,
    zero_settings,
)
from mdm.train.engine import decay_groups
from tests.helpers import ROOT, small_config

CONFIGS = sorted((ROOT / "deepspeed_configs").glob("*.json"))


def write(tmp_path, values) -> str:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_files_are_accepted(path, tmp_path):
    values = load_deepspeed_config(small_config(tmp_path, deepspeed=str(path)), 4)
    assert values["train_batch_size"] == 8
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_clipping"] == 1.0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_files_set_only_zero_and_offload(path, tmp_path):
    held = json.loads(path.read_text())
    assert held.keys() <= {"zero_optimization", "aio"}
    config = small_config(tmp_path, deepspeed=str(path))
    injected = load_deepspeed_config(config, 2).keys() - held.keys()
    assert injected.isdisjoint(held)
    assert injected.isdisjoint(ALLOWED)
    for key in injected:  # what the engine sets cannot be set in the file, with the same value
        value = load_deepspeed_config(config, 2)[key]
        with pytest.raises(RunError, match=key):
            load_deepspeed_config(
                small_config(tmp_path, deepspeed=write(tmp_path, held | {key: value})), 2
            )
    zero_settings(held)  # DeepSpeed knows every field


def test_a_misspelt_zero_field_is_refused(tmp_path):
    values = {"zero_optimization": {"stage": 3, "overlap_com": True}}
    config = small_config(tmp_path, deepspeed=write(tmp_path, values))
    with pytest.raises(RunError, match="overlap_com"):
        load_deepspeed_config(config, 2)


@pytest.mark.parametrize("key", sorted(OWNED_BY_CONFIG))
def test_each_setting_has_one_owner(key, tmp_path):
    path = write(tmp_path, {"zero_optimization": {"stage": 3}, key: 1})
    with pytest.raises(RunError, match=f"{key}.*owned by"):
        load_deepspeed_config(small_config(tmp_path, deepspeed=path), 2)
    assert key not in ALLOWED


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimization": {"stage": 3}, "zero_optimisation": {}}, "unknown key"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
        ({}, "stage is None"),
        ([], "holds a list"),
        ({"zero_optimization": None}, "zero_optimization is None, not an object"),
        ({"zero_optimization": [2]}, "not an object"),
        ({"zero_optimization": {"stage": 2}, "aio": 1}, "aio is 1, not an object"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "fp8"}, "is 'fp8'; choose"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": []}, "choose fp32"),
        ("{", "is not JSON"),
    ],
)
def test_messages_name_the_mistake(values, message, tmp_path):
    config = small_config(tmp_path, deepspeed=write(tmp_path, values))
    with pytest.raises(RunError, match=message):
        load_deepspeed_config(config, 2)


def test_a_missing_file_and_an_uneven_batch_are_refused(tmp_path):
    with pytest.raises(RunError, match="No such file"):
        load_deepspeed_config(small_config(tmp_path, deepspeed=str(tmp_path / "none.json")), 2)
    with pytest.raises(RunError, match="global_batch 8 is not a multiple of 3"):
        load_deepspeed_config(small_config(tmp_path), 3)


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_the_configuration_sets_the_precision(precision, enabled, tmp_path):
    values = load_deepspeed_config(small_config(tmp_path, precision=precision), 2)
    assert values["torch_autocast"] == {"enabled": enabled, "dtype": "bfloat16"}


# What each parameter of the real network is, by the last words of its name.
DECAYS = (
    *("image_in.weight", "text_in.weight", "mlp.0.weight", "mlp.2.weight", "summary.weight"),
    *("class_embedding.weight", "in_proj.weight", "conv1d.weight", "out_proj.weight"),
    *("skips.0.weight", "image_out.weight", "text_out.weight", "eq17_gain.weight"),
    *("image_mean.weight", "image_log_sigma.weight", "image_decoder.weight", "vocabulary.weight"),
    *("text_log_sigma.weight", "text_decoder.weight", "piece_out.weight", "modulation.weight"),
    *(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")),
)
DOES_NOT = (
    *("bias", "A_log", "D", "dt_bias", "mixer.norm.weight", "norm", "mlp_norm"),
    *("image_position", "text_position", "time_token", "pads", "modulation"),
)


@pytest.mark.parametrize("decoder", ["mamba", "transformer"])
@pytest.mark.parametrize("scan_mode", ["separate", "alternate"])
def test_weight_decay_depends_on_the_role_of_each_parameter(decoder, scan_mode, tmp_path):
    config = small_config(tmp_path)
    sizes = {"decoder": decoder, "scan_mode": scan_mode, "n_heads": 4, "n_kv_heads": 2}
    model = dataclasses.replace(config.model, long_skip=True, eq17_logits=True, **sizes)
    with torch.device("meta"):
        module = Loss(dataclasses.replace(config, model=model))
    decays = {id(p): g["weight_decay"] for g in decay_groups(module, 0.1) for p in g["params"]}
    assert len(decays) == len(list(module.parameters()))
    for name, p in module.named_parameters():
        assert name.endswith(DECAYS) != name.endswith(DOES_NOT), name
        assert decays[id(p)] == (0.1 if name.endswith(DECAYS) else 0.0), name


def test_vectors_and_marked_parameters_do_not_decay():
    module = nn.Linear(3, 2)
    marked = nn.Linear(4, 4, bias=False)
    marked.weight._no_weight_decay = True
    both = nn.ModuleList([module, marked])
    decays = {id(p): g["weight_decay"] for g in decay_groups(both, 0.1) for p in g["params"]}
    assert decays == {id(module.weight): 0.1, id(module.bias): 0.0, id(marked.weight): 0.0}
    assert [g["weight_decay"] for g in decay_groups(both, 0.0)] == [0.0]


def test_importing_the_engine_does_not_import_mlflow():
    code = "import sys, mdm.train.engine; print('mlflow' in sys.modules); import mlflow.tracking"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["False"]), done.stderr
