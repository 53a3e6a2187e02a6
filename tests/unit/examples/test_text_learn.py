"""`make learn-text`: its stages name what they need, and its report says what was measured."""

import json

import pytest

from examples.text import report, train
from examples.text.learn import Flags, stages
from mdm.config import config_of
from mdm.presets import PRESETS
from mdm.utils.command_line import parse_cli
from pipelines import pretrain

MEASURED = {
    "rows": 7,
    "unigram": 3.0, "unigram_se": 0.01,
    "diffusion": 2.1, "diffusion_se": 0.02,
    "masked": 2.0, "masked_se": 0.03,
    "autoregressive": 1.5, "autoregressive_se": 0.04,
    "bound": {"prior": 0.01, "levels": [0.5, 1.5], "reconstruction": 0.09},
    "parameters": {"diffusion": 10, "masked": 11, "autoregressive": 9},
    "samples": {
        "begun": {"diffusion": ["One <text>."], "masked": [""], "autoregressive": ["Two."]},
        "prompts": ["Once upon"],
        "continued": {"diffusion": ["a time."], "held_out": ["a table."]},
        "ended": {"diffusion": 0.5, "masked": 1.0, "autoregressive": 0.0},
    },
}  # fmt: skip
SIDE = {"documents": 1, "characters": 1234, "characters_per_token": 3.1}
CORPUS = {
    "row": 124,
    "train": SIDE,
    "held_out": SIDE,
    "sources": [
        {"package": "a", "version": "1", "licence": "MIT", "train": SIDE, "held_out": SIDE}
    ],
}


def test_all_models_are_trained_alike():
    flags = Flags(out="here", steps=17, seed=3, train_flags="--model.n_layer 2")
    by_name = {stage.name: stage.words for stage in stages(flags)}
    assert list(by_name) == ["data", "train", "autoregressive", "masked", "measure"]
    commands = [by_name[name] for name in ("train", "autoregressive", "masked")]
    configs = []
    for command in commands:
        argv = command[next(i for i, word in enumerate(command) if word.endswith(".py")) + 1 :]
        flags_class = train.Flags if "--kind" in argv else pretrain.Flags
        configs.append(config_of(parse_cli(flags_class, argv, presets=PRESETS)))
    for config in configs:
        assert (config.train.steps, config.seed, config.model.n_layer) == (17, 3, 2)
        assert config.data == configs[0].data
        assert config.model == configs[0].model


def test_report_states_bits_errors_and_ratios(tmp_path):
    markers = {
        name: {"seconds": 2.5, "report": {"samples_seen": 320}} for name in ("train", "masked")
    }
    markers["measure"] = {"seconds": 1.0, "report": MEASURED}
    markers["data"] = {"seconds": 1.0, "report": CORPUS}
    report.write(tmp_path, markers, {"steps": 10})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["bits_per_character"] == 2.1
    assert content["bits_per_character_se"] == 0.02
    assert content["ratio_to_autoregressive"] == pytest.approx(1.4)
    assert content["bound_diffusion"] == 2.0
    assert content["ratio_to_masked"] == 1.05
    assert content["targets"] == {
        "ratio_to_unigram": True, "ratio_to_masked": True, "ratio_to_autoregressive": False,
    }  # fmt: skip
    assert content["tokens_seen"] == 10 * 32 * 124
    assert content["wall_seconds"] == 7.0
    page = (tmp_path / "report.html").read_text()
    for words in ("One &lt;text&gt;.", "a time.", "a table.", "Once upon", "(empty)", "2.100"):
        assert words in page, words
    assert report.table(content).splitlines()[1].split()[2:5] == ["2.1000", "+-", "0.0200"]
