"""Configuration: a round trip, and one line for every mistake."""

import dataclasses
from dataclasses import dataclass

import pytest

from mdm.checkpoint.state import TrainState, check_resumable
from mdm.config import Config, DataConfig, GuardConfig, ModelConfig, TrainConfig, config_of, doc
from mdm.presets import PRESETS
from mdm.utils.command_line import parse_cli
from mdm.utils.saved_config import FORMER_VALUES, RENAMED, fingerprint, from_dict, to_dict


@dataclass(frozen=True)
class Flags(Config):
    preset: str = doc("", "which preset")
    plan: bool = doc(False, "plan only")


def parse(*argv: str) -> Flags:
    return parse_cli(Flags, ["--preset", "demo", *argv], presets=PRESETS)


def mistake(capsys, *argv: str) -> str:
    """The one line that ends a job with these flags."""
    with pytest.raises(SystemExit) as ended:
        parse_cli(Flags, argv, presets=PRESETS)
    assert ended.value.code == 2
    err: str = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name]
    assert from_dict(Config, to_dict(config)) == config
    assert fingerprint(from_dict(Config, to_dict(config))) == fingerprint(config)


def test_flags_change_nested_fields_of_a_preset():
    config = parse("--train.lr", "0.5", "--data.sources", "a:1,b:2.5")
    assert config.train.lr == 0.5
    assert [(s.name, s.weight) for s in config.data.sources] == [("a", 1.0), ("b", 2.5)]
    assert config.model == PRESETS["demo"].model
    assert type(config.model) is ModelConfig
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.d_model = 1  # type: ignore[misc]
    assert config_of(parse()) == PRESETS["demo"]
    assert parse_cli(Flags, ["--preset=learn"], presets=PRESETS).model == PRESETS["learn"].model


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--plan", (True, False)),
        ("--plan --no_plan --train.keep-best", (False, True)),
        ("--train.keep_best --train.no_keep_best --plan", (True, False)),
        ("--plan True --train.keep_best=true", (True, True)),
        ("--plan --plan false --train.keep_best --train.keep_best=false", (False, False)),
    ],
)
def test_booleans_need_no_value_and_take_the_former_spelling(flags, values):
    config = parse(*flags.split())
    assert (config.plan, config.train.keep_best) == values


def test_hyphens_stand_for_underscores_and_the_flag_of_deepspeed_is_ignored():
    config = parse("--local_rank=3", "--run-dir", "a-b_c", "--train.log-every=7")
    assert (config.run_dir, config.train.log_every) == ("a-b_c", 7)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--preset", "demo2"], "unknown preset 'demo2'; did you mean 'demo'?"),
        (["--preset", "demo", "--train.lrr", "1"], "unknown flag --train.lrr; did you mean"),
        (["--preset", "demo", "--train.steps", "many"], "--train.steps takes INT: invalid literal"),
        (["--preset", "demo", "--train.steps"], "needs a value; write --train.steps=VALUE if"),
        (["--preset", "demo", "--plan", "maybe"], "unexpected argument 'maybe'"),
        (["--preset", "demo", "stray"], "unexpected argument 'stray'"),
        (["--preset", "demo", "--train.steps", "0"], "train.steps is 0; it must be positive"),
        (["--preset", "demo", "--model.headdim", "7"], "model.headdim 7 does not divide"),
        (["--preset", "demo", "--model.headdim", "0"], "model.headdim is 0; it must be positive"),
        (["--preset", "demo", "--model.scans", "123/12"], "'123/12'; choose one of 1234/12, 12/1"),
        (["--preset", "demo", "--model.decoder", "rnn"], "choose one of mamba, transformer"),
        (
            ["--preset", "demo", "--model.decoder", "transformer", "--model.n_heads", "7"],
            "model.n_heads 7 does not divide model.d_model 128",
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
        (["--preset", "demo", "--data.images_per_row", "0"], "images_per_row is 0; it must be"),
        (
            [
                *("--preset", "demo", "--data.images_per_row", "2"),
                *("--objective.image_candidates", "latents"),
            ],
            "data.images_per_row 2 packs samples, of which ranks hold different numbers, but "
            "objective.image_candidates latents compares them",
        ),
        (["--preset", "demo", "--data.sources", "a"], "is not name:weight"),
        (
            ["--preset", "demo", "--train.images", "8", "--train.snapshots", "0"],
            "train.images is 8, to be drawn with every snapshot, but train.snapshots is 0",
        ),
        (
            ["--preset", "demo", "--train.images", "8", "--autoencoder", ""],
            "train.images is 8, but --autoencoder is missing to draw them",
        ),
        ([], "no --preset (presets: demo, learn"),
    ],
)
def test_mistakes_end_with_one_line(argv, says, capsys):
    assert says in mistake(capsys, *argv)


@dataclass(frozen=True)
class Job:
    data: tuple[str, ...] = doc(("default, of one",), "repeat it")
    root: str = doc("", "a folder")


@dataclass(frozen=True)
class Required:
    root: str
    out: str
    n: float | None = doc(None, "a number")


def test_missing_flags_are_named(capsys):
    assert parse_cli(Required, ["--root", "r", "--out=o", "--n", "2"]) == Required("r", "o", 2.0)
    with pytest.raises(SystemExit) as ended:
        parse_cli(Required, ["--n", "1"])
    assert ended.value.code == 2
    assert "required: --root, --out" in capsys.readouterr().err


def test_a_flag_with_several_values_is_repeated_and_keeps_commas():
    assert parse_cli(Job, []).data == ("default, of one",)
    assert parse_cli(Job, ["--data", "a,b", "--data=c d"]).data == ("a,b", "c d")
    assert parse_cli(Job, ["--data", "a", "b", "--root", "r", "--data", "c"]).data == tuple("abc")
    assert parse_cli(Job, ["--data", ""]).data == ()


def test_file_uris_are_folders_in_every_flag(tmp_path, capsys):
    odd = tmp_path / "a b#c?d,é%41"
    flags = ["--data", odd.as_uri(), "--root", odd.as_uri()]
    assert parse_cli(Job, flags) == Job((str(odd),), str(odd))
    assert parse("--run_dir", odd.as_uri()).run_dir == str(odd)
    with pytest.raises(SystemExit) as ended:
        parse_cli(Job, ["--data", "file://nas/x"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "names the host 'nas'" in err
    assert err.count("\n") == 1


def test_names_of_sources_may_hold_commas_colons_and_semicolons():
    sources = ("--data.sources", "a,b:0.5,c;d=e:f:1.5")
    config = parse(*sources, "--data.mixture_stages", "5=x;y:1,a,b:2;9=c:1")
    assert [(s.name, s.weight) for s in config.data.sources] == [("a,b", 0.5), ("c;d=e:f", 1.5)]
    assert [(s.step, [d.name for d in s.sources]) for s in config.data.mixture_stages] == [
        (5, ["x;y", "a,b"]),
        (9, ["c"]),
    ]


def test_help_names_every_field_with_its_type_text_and_value(capsys):
    demo = PRESETS["demo"].train.steps
    for argv, steps in ((["--help"], TrainConfig().steps), (["--help", "--preset", "demo"], demo)):
        with pytest.raises(SystemExit) as ended:
            parse_cli(Flags, argv, presets=PRESETS, description="What it does.")
        assert ended.value.code == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "What it does." in out
        for field in dataclasses.fields(ModelConfig):
            assert f"--model.{field.name}" in out
            assert field.metadata["help"].split(":")[0] in out
        assert f"--train.steps INT optimizer steps (default: {steps})" in out
        assert "--plan, --no_plan plan only (default: False)" in out


def test_mixture_stages_are_read_and_kept():
    config = parse("--data.sources", "a:1", "--data.mixture_stages", "100=a:1,b:0.5;250=b:1")
    assert [
        (s.step, [(d.name, d.weight) for d in s.sources]) for s in config.data.mixture_stages
    ] == [
        (100, [("a", 1.0), ("b", 0.5)]),
        (250, [("b", 1.0)]),
    ]
    assert from_dict(Config, to_dict(config_of(config))) == config_of(config)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("0=a:1", "begins at step 0; data.sources is the mixture of step 0"),
        ("200=a:1;100=b:1", "data.mixture_stages begin at steps [200, 100]; they must increase"),
        ("100", "is not step=name:weight"),
        ("x=a:1", "is not step=name:weight"),
        ("100=", "the mixture stage from step 100 on names no data set"),
        ("100=a:1,a:2", "the mixture stage from step 100 on names one twice"),
    ],
)
def test_invalid_mixture_stages_end_with_one_line(stages, says, capsys):
    argv = ("--preset", "demo", "--data.sources", "a:1", "--data.mixture_stages", stages)
    assert says in mistake(capsys, *argv)


def test_unknown_keys_are_refused():
    values = to_dict(PRESETS["demo"])
    values["train"]["learning_rate"] = 1
    with pytest.raises(ValueError, match=r"unknown key 'train\.learning_rate'"):
        from_dict(Config, values)


def formerly_written(config: Config) -> dict:
    """The config as a version before the renaming wrote it."""
    values = to_dict(config)
    for former, present in RENAMED.items():
        section, _, name = former.partition(".")
        if name:
            values[section][name] = values[section].pop(present.partition(".")[2])
    return values


def test_configs_with_former_keys_are_read():
    plain = PRESETS["demo"]
    stages = parse("--data.mixture_stages", "5=a:1").data.mixture_stages
    config = dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, shuffle_window=9, mixture_stages=stages),
        guard=GuardConfig(window=50, replay_boxes=7),
        train=dataclasses.replace(plain.train, snapshots=1, images=3),
    )
    former = formerly_written(config)
    assert former["data"]["window"] == 9
    assert former["guard"] | {"window": 50, "black_boxes": 7} == former["guard"]
    assert former["train"]["pictures"] == 3
    assert from_dict(Config, former) == config
    assert from_dict(DataConfig, former["data"]) == config.data
    assert from_dict(GuardConfig, {"window": 50}) == GuardConfig(window=50)


def test_a_checkpoint_with_former_keys_continues_and_its_changes_are_found():
    config = PRESETS["demo"]
    state = TrainState.from_json({"config": formerly_written(config)})
    assert state.config == to_dict(config)
    assert check_resumable(state, config, "step-1") == []
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_window=9))
    with pytest.raises(ValueError, match=r"data\.shuffle_window was 4 and is 9"):
        check_resumable(state, other, "step-1")


def without_new_keys(config: Config) -> dict:
    """The config as a version before `FORMER_VALUES` wrote it."""
    values = formerly_written(config)
    for key in FORMER_VALUES:
        section, _, name = key.partition(".")
        del values[section][name]
    return values


def test_what_a_former_version_did_without_saving_it_is_filled_in():
    plain = PRESETS["demo"]
    former = from_dict(Config, without_new_keys(plain))
    assert not former.model.adaln
    assert not former.model.silent
    assert former.model.text_head == "latent"
    assert former.objective.image_candidates == "latents"
    assert former.train.precision == "bf16"
    state = TrainState.from_json({"config": without_new_keys(plain)})
    assert state.config == to_dict(former)
    assert check_resumable(state, former, "step-1") == []
    with pytest.raises(ValueError, match=r"model\.text_head was 'latent' and is 'full'"):
        check_resumable(state, plain, "step-1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scan_mode": "separate"}, r"model\.scan_mode separate: two of its six mixers"),
        ({"decoder": "transformer", "n_heads": 4}, r"model\.decoder transformer: .* rotary"),
        ({"long_skip": True}, r"model\.long_skip True: long skips read normalised streams now"),
    ],
)
def test_weights_that_mean_something_else_now_are_refused(changes, reason):
    plain = PRESETS["demo"]
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, **changes))
    assert from_dict(Config, to_dict(config)) == config
    with pytest.raises(ValueError, match=reason):
        from_dict(Config, without_new_keys(config))
    with pytest.raises(ValueError, match=reason):
        TrainState.from_json({"config": without_new_keys(config)})
