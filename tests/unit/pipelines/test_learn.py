import dataclasses

from mdm.data.loader import build_loader
from mdm.data.tokenizer import Tokenizer
from mdm.dist import World
from mdm.presets import LEARN
from pipelines import learn_data
from pipelines.learn_ablate import VARIANTS, table


def test_captions_name_their_digit_in_every_template():
    for template in range(len(learn_data.TEMPLATES)):
        for digit in range(10):
            assert learn_data.NAMES.named(learn_data.caption(digit, template)) == digit


def test_held_out_pictures_are_a_fifth_of_every_class_and_not_trained_on():
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


def test_ablation_table_has_mean_and_deviation():
    row = dict.fromkeys(
        ("t2i_accuracy_unguided", "i2t_accuracy", "joint_agreement", "recall", "fid64"), 0.5
    )
    text = table({"as shipped": [row | {"t2i_accuracy": a} for a in (0.8, 1.0)]})
    assert "| as shipped | 0.90 ± 0.14 | 0.50 ± 0.00 |" in text
    assert "as shipped" in VARIANTS
