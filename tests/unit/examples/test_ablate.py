import dataclasses

import pytest

from examples.digits import data as learn_data
from examples.digits.ablate import ONE_SEED, VARIANTS, Flags, folder_name
from mdm.config import config_of
from mdm.data.loader import build_loader
from mdm.first_stage.tokenizer import Tokenizer
from mdm.presets import LEARN, PRESETS
from mdm.utils.command_line import parse_cli
from mdm.utils.ranks import World
from pipelines import pretrain


def test_captions_name_their_digit_in_every_template():
    for template in range(len(learn_data.TEMPLATES)):
        for digit in range(10):
            assert learn_data.NAMES.named(learn_data.caption(digit, template)) == digit


def test_held_out_images_are_a_fifth_of_every_class_and_not_trained_on():
    train, heldout = learn_data.split()
    assert len(train.labels) + len(heldout.labels) == 1797
    for c in range(10):
        held, rest = int((heldout.labels == c).sum()), int((train.labels == c).sum())
        assert 0.19 < held / (held + rest) < 0.22
    rows = {tuple(g.flatten().tolist()) for g in train.grey}
    assert not any(tuple(g.flatten().tolist()) in rows for g in heldout.grey)


def test_the_trainers_loader_reads_what_is_written(tmp_path):
    train, _, pixels = learn_data.write(tmp_path)
    data = dataclasses.replace(LEARN.data, root=str(tmp_path / "encoded"))
    with build_loader(dataclasses.replace(LEARN, data=data), World(0, 1)) as loader:
        batch = next(loader)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    known = {tuple(row.flatten().tolist()) for row in pixels.encode(train.grey).bfloat16().float()}
    assert batch.latents is not None
    for latents, tokens, label in zip(batch.latents, batch.tokens, batch.class_ids, strict=True):
        assert learn_data.NAMES.named(tokenizer.decode(tokens.tolist())) == int(label)
        assert tuple(latents.flatten().tolist()) in known
    assert batch.tokens.shape == (LEARN.data.global_batch, LEARN.data.caption_length)


def test_every_variant_is_flags_of_the_training_job():
    for name, flags in VARIANTS.items():
        argv = ["--preset", "learn", *flags.split()]
        changed = config_of(parse_cli(pretrain.Flags, argv, presets=PRESETS))
        assert (changed == LEARN) == (name == "as shipped"), name
    assert set(ONE_SEED) < set(VARIANTS)
    assert len({folder_name(name, 0) for name in VARIANTS}) == len(VARIANTS)
    with pytest.raises(ValueError, match="unknown variants nothing; choose of as shipped"):
        Flags(variants="nothing")
