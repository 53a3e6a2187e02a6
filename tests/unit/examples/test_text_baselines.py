"""The baselines of `make learn-text`: exact likelihoods, an unbiased bound, exact resumption."""

import dataclasses
import itertools
import math

import pytest
import torch

from examples.text import baselines, fork, train
from examples.text.baselines import Autoregressive, Masked, parameters
from mdm.config import Config, DataConfig, ModelConfig, TrainConfig

V, M = 3, 4
MODEL = ModelConfig(
    d_model=32, n_layer=2, d_state=8, headdim=16, expand=1, chunk_size=8, vocab_size=V,
    n_classes=1, image_height=1, image_width=1, text_length=M,
)  # fmt: skip


def every_row() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=M)))


def test_autoregressive_probabilities_of_all_rows_add_up_to_one():
    torch.manual_seed(0)
    model = Autoregressive.of_size(MODEL, 8_000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
        p = (-model.nats(every_row()).double()).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert float(p.max() / p.min()) > 2


def test_masked_bound_of_pairs_is_their_joint_entropy():
    """Rows (v, v, v, v): one visible token tells the rest."""
    model = Masked(MODEL, 4)

    def exact(tokens):
        seen = tokens.masked_fill(tokens == model.mask, -1).amax(1)  # -1: nothing is visible
        known = torch.nn.functional.one_hot(seen.clamp(min=0), V).float().log()
        free = torch.full((V,), 1 / V).log()
        return torch.where((seen < 0)[:, None], free, known).unsqueeze(1).expand(-1, M, -1)

    model.forward = exact
    rows = torch.arange(V).repeat(400)[:, None].expand(-1, M)
    nats = model.nats(rows, torch.Generator().manual_seed(0))
    # All M masked, in one of M cases, costs M ln V; every other case nothing.
    assert float(nats.mean()) == pytest.approx(math.log(V), rel=0.01)
    assert sorted(set(nats.tolist())) == pytest.approx([0, M * math.log(V)])


def test_masked_tokens_are_read_from_both_sides_and_the_target_is_not():
    torch.manual_seed(0)
    model = Masked.of_size(MODEL, 12_000)
    rows = torch.tensor([[0, V, 1, 2], [0, V, 2, 2], [1, V, 1, 2]])
    with torch.no_grad():
        log_p = model(rows)[:, 1]
        one, other = model(rows[:1]), model(rows[:1])
    assert torch.equal(one, other)
    assert not torch.allclose(log_p[0], log_p[1])  # what follows counts
    assert not torch.allclose(log_p[0], log_p[2])  # and what precedes


@pytest.mark.parametrize("kind", [Autoregressive, Masked])
def test_baselines_are_of_the_size_that_is_asked_for(kind):
    assert parameters(kind.of_size(MODEL, 30_000)) == pytest.approx(30_000, rel=0.02)


@pytest.mark.parametrize("kind", [Autoregressive, Masked])
def test_samples_begin_with_their_prompts_and_hold_no_mask(kind):
    torch.manual_seed(0)
    prompt = torch.tensor([[1, 2], [2, 0]])
    rows = kind.of_size(MODEL, 12_000).sample(prompt, M, torch.Generator().manual_seed(0))
    assert rows.shape == (2, M)
    assert torch.equal(rows[:, :2], prompt)
    assert int(rows.max()) < V


def test_unigram_of_rows_is_their_cross_entropy():
    rows = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]).numpy()
    (nats,) = baselines.unigram(rows, rows[:1], V)
    assert float(nats) == pytest.approx(-2 * math.log(6 / 11) - 2 * math.log(4 / 11))


def test_every_row_is_seen_once_an_epoch():
    steps = [train.batch_indices(10, 4, step, seed=0) for step in range(5)]
    seen = torch.cat(steps)
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_an_interrupted_run_gives_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    settings = TrainConfig(steps=5, lr=1e-2, checkpoint_every=2, precision="fp32")
    data = DataConfig(global_batch=4, caption_length=M, dialogue_length=M)
    config = Config(model=MODEL, train=settings, data=data)
    rows = every_row()

    def new_run(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return train.Run(train.make("masked", config), config, tmp_path / name)

    whole = new_run("whole")
    whole.train(rows)
    take_step = train.Run._take_step

    def interrupted(self, tokens, step):
        if step == 3:
            raise KeyboardInterrupt
        return take_step(self, tokens, step)

    monkeypatch.setattr(train.Run, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_run("parts").train(rows)
    monkeypatch.setattr(train.Run, "_take_step", take_step)
    again = new_run("parts")
    assert again.step == 2
    again.train(rows)
    for one, other in zip(whole.averages, again.averages, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole.averages[0], new_run("new").averages[0])


def test_fork_measures_ln_k_for_a_model_that_knows_the_chain():
    flags = fork.Flags()
    successors = fork.chain(torch.Generator().manual_seed(0))
    assert successors.shape == (fork.VOCAB_SIZE, fork.SUCCESSORS)
    rows = fork.rows(successors, 50, 28, torch.Generator().manual_seed(1)) - fork.FIRST
    for a, b in itertools.pairwise(rows.T):
        assert (successors[a] == b[:, None]).any(1).all()

    loss = fork.Loss(flags)
    means, bias = loss.vae.vocabulary()
    token_of = torch.cdist
    table = torch.full((len(bias), len(bias)), -30.0)
    table[fork.FIRST :].scatter_(1, successors + fork.FIRST, 0.0)

    def logits(text, class_ids):
        """Scores from the token before each, which the prompt gives."""
        tokens = token_of(text.z_t, means).argmin(-1)
        return table[tokens].roll(1, 1)

    loss.network.forward = logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork, "text_logits", lambda prediction, means, bias: prediction)
        assert fork.cross_entropy(loss, successors, 2) == pytest.approx(math.log(4), rel=1e-5)
        table[fork.FIRST :, fork.FIRST] = 0.0  # a fifth successor
        assert fork.cross_entropy(loss, successors, 2) > math.log(4) * 1.1


def test_fork_returns_averaged_weights():
    """After two steps by hand: w0 / 10 + 9 w1 / 10, then 2 / 11 of that and 9 / 11 of w2."""
    flags = fork.Flags()
    model = dataclasses.replace(flags.model, d_model=32)
    data = dataclasses.replace(flags.data, global_batch=8)
    successors = fork.chain(torch.Generator().manual_seed(0))

    def weights(steps: int, ema: float) -> torch.Tensor:
        settings = dataclasses.replace(flags.train, steps=steps, ema=ema, decay="constant")
        config = dataclasses.replace(flags, model=model, data=data, train=settings)
        return fork.train(config, successors).network.embed.text_in.weight.detach()

    one, two = weights(1, 0.0), weights(2, 0.0)  # an average that forgets at once
    torch.manual_seed(flags.seed)
    untrained = fork.Loss(dataclasses.replace(flags, model=model))
    start = untrained.network.embed.text_in.weight.detach()
    expected = 2 / 11 * (start / 10 + 9 / 10 * one) + 9 / 11 * two
    torch.testing.assert_close(weights(2, 0.99), expected)
    assert not torch.allclose(expected, two)
