"""Configuration: a round trip, and one line for every mistake."""

import dataclasses
from dataclasses import dataclass

import pytest

from mdm.config import Config, ModelConfig, doc, fingerprint, from_dict, to_dict
from mdm.presets import PRESETS
from mdm.utils.command_line import parse_cli


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name]
    assert from_dict(Config, to_dict(config)) == config
    assert fingerprint(from_dict(Config, to_dict(config))) == fingerprint(config)


def test_flags_change_nested_fields_of_a_preset():
    argv = ["--preset", "demo", "--train.lr", "0.5", "--data.sources", "a:1,b:2.5"]
    config = parse_cli(Config, argv, presets=PRESETS)
    assert config.train.lr == 0.5
    assert [(s.name, s.weight) for s in config.data.sources] == [("a", 1.0), ("b", 2.5)]
    assert config.model == PRESETS["demo"].model


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--preset", "demo2"], "unknown preset 'demo2'; did you mean 'demo'?"),
        (["--preset", "demo", "--train.lrr", "1"], "unknown flag --train.lrr; did you mean"),
        (["--preset", "demo", "--train.steps", "many"], "--train.steps 'many' is not valid"),
        (["--preset", "demo", "--train.steps", "0"], "train.steps is 0; it must be positive"),
        (["--preset", "demo", "--model.headdim", "7"], "model.headdim 7 does not divide"),
        (["--preset", "demo", "--model.headdim", "0"], "model.headdim is 0; it must be positive"),
        (["--preset", "demo", "--model.scans", "123/12"], "'123/12'; choose one of 1234/12, 12/1"),
        (["--preset", "demo", "--model.decoder", "rnn"], "choose one of mamba, transformer"),
        (
            ["--preset", "demo", "--model.decoder", "transformer", "--model.n_heads", "7"],
            "model.n_heads 7 does not divide model.d_model 192",
        ),
        (
            ["--preset", "demo", "--model.decoder", "transformer", "--model.n_kv_heads", "5"],
            "model.n_kv_heads 5 does not divide model.n_heads 32",
        ),
        (["--preset", "demo", "--objective.target", "eq5"], "choose one of one_hot, theorem1"),
        (["--preset", "demo", "--objective.beta_kl", "-1"], "objective.beta_kl is -1.0"),
        (["--preset", "demo", "--train.lr", "0"], "train.lr is 0.0; it must be positive"),
        (["--preset", "demo", "--model.kernel", "cuda"], "choose one of torch, compiled, fused"),
        (["--preset", "demo", "--data.dialogue_length", "999"], "texts of 999 tokens"),
        (["--preset", "demo", "--data.sources", "a"], "is not name:weight"),
        (
            ["--preset", "demo", "--train.images", "8", "--train.snapshots", "0"],
            "train.images is 8, to be drawn with every snapshot, but train.snapshots is 0",
        ),
        (
            ["--preset", "demo", "--train.images", "8", "--autoencoder", ""],
            "train.images is 8, but --autoencoder is missing to draw them",
        ),
        ([], "--preset"),
    ],
)
def test_mistakes_end_with_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli(Config, argv, presets=PRESETS)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@dataclass(frozen=True)
class Job:
    data: tuple[str, ...] = doc(("default, of one",), "repeat it")
    root: str = doc("", "a folder")


def test_a_flag_of_several_is_repeated_and_its_items_keep_their_commas():
    assert parse_cli(Job, []).data == ("default, of one",)
    assert parse_cli(Job, ["--data", "a,b", "--data=c d"]).data == ("a,b", "c d")
    assert parse_cli(Job, ["--data", ""]).data == ()


def test_file_uris_are_folders_in_every_flag(tmp_path, capsys):
    odd = tmp_path / "a b#c?d,é%41"
    flags = ["--data", odd.as_uri(), "--root", odd.as_uri()]
    assert parse_cli(Job, flags) == Job((str(odd),), str(odd))
    config = parse_cli(Config, ["--preset", "demo", "--run_dir", odd.as_uri()], presets=PRESETS)
    assert config.run_dir == str(odd)
    with pytest.raises(SystemExit) as ended:
        parse_cli(Job, ["--data", "file://nas/x"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "names the host 'nas'" in err
    assert err.count("\n") == 1


def test_names_of_sources_may_hold_commas_colons_and_semicolons():
    argv = ["--preset", "demo", "--data.sources", "a,b:0.5,c;d=e:f:1.5"]
    config = parse_cli(Config, [*argv, "--data.stages", "5=x;y:1,a,b:2;9=c:1"], presets=PRESETS)
    assert [(s.name, s.weight) for s in config.data.sources] == [("a,b", 0.5), ("c;d=e:f", 1.5)]
    assert [(s.step, [d.name for d in s.sources]) for s in config.data.stages] == [
        (5, ["x;y", "a,b"]),
        (9, ["c"]),
    ]


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli(Config, ["--help"], presets=PRESETS, description="What it does.")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(ModelConfig):
        assert f"--model.{field.name}" in out


def test_stages_are_read_shown_and_kept():
    argv = ["--preset", "demo", "--data.sources", "a:1"]
    argv += ["--data.stages", "100=a:1,b:0.5;250=b:1"]
    config = parse_cli(Config, argv, presets=PRESETS)
    assert [(s.step, [(d.name, d.weight) for d in s.sources]) for s in config.data.stages] == [
        (100, [("a", 1.0), ("b", 0.5)]),
        (250, [("b", 1.0)]),
    ]
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("0=a:1", "begins at step 0; data.sources is the mixture of step 0"),
        ("200=a:1;100=b:1", "data.stages begin at steps [200, 100]; they must go up"),
        ("100", "is not step=name:weight"),
        ("x=a:1", "is not step=name:weight"),
        ("100=", "the stage from step 100 on names no data set"),
        ("100=a:1,a:2", "the stage from step 100 on names one twice"),
    ],
)
def test_stages_that_make_no_sense_end_with_one_line(stages, says, capsys):
    argv = ["--preset", "demo", "--data.sources", "a:1", "--data.stages", stages]
    with pytest.raises(SystemExit):
        parse_cli(Config, argv, presets=PRESETS)
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_unknown_keys_are_refused():
    values = to_dict(PRESETS["demo"])
    values["train"]["learning_rate"] = 1
    with pytest.raises(ValueError, match=r"unknown key 'train\.learning_rate'"):
        from_dict(Config, values)
