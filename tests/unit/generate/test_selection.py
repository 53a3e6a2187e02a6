"""Selection: its score entropy, and the map of selected tokens."""

import torch

from mdm.diffusion.score_entropy import energy, log_score_ratio, score_entropy
from mdm.generate.selection import (
    CELL,
    GAP,
    MOVING,
    SETTLED,
    Selected,
    Selection,
    draw_map,
    image_score_entropy,
    text_score_entropy,
)


def test_image_score_entropy_is_the_drop_of_eq_17():
    torch.manual_seed(0)
    z_0, last, eps = torch.randn(3, 2, 5, 16, dtype=torch.float64).unbind()
    log_snr = 1.3
    abar = torch.tensor(log_snr, dtype=torch.float64).sigmoid().expand(2, 5)
    a = abar.unsqueeze(-1)
    z_t = a.sqrt() * z_0 + (1 - a).sqrt() * eps
    f = energy(z_t, torch.stack([z_0, last], 2), abar, eps)
    entropy = image_score_entropy(z_0, last, log_snr)
    torch.testing.assert_close(entropy, f[..., 0] - f[..., 1], rtol=1e-4, atol=1e-3)


def test_image_score_entropy_is_eq_4_over_dense_candidates():
    log_snr = 0.8
    z_0, last = torch.tensor([[[0.3]]]), torch.tensor([[[-0.2]]])
    abar = torch.tensor(log_snr).sigmoid().view(1, 1)
    y = torch.linspace(-12, 12, 20_001).view(1, 1, -1, 1)

    def log_s(estimate):
        z_t = torch.zeros(1, 1, 1)
        eps = (z_t - abar.sqrt() * estimate) / (1 - abar).sqrt()
        return log_score_ratio(energy(z_t, y, abar, eps))

    expected = score_entropy(log_s(z_0), log_s(last))
    entropy = image_score_entropy(z_0, last, log_snr)
    torch.testing.assert_close(entropy, expected, rtol=1e-3, atol=1e-4)


def test_nothing_settles_while_noise_outweighs_the_signal():
    z_0 = torch.ones(1, 2, 4)
    assert image_score_entropy(z_0, z_0, -0.1).isinf().all()
    assert (image_score_entropy(z_0, z_0, 0.1) == 0).all()
    logits, last = torch.tensor([[[90.0, 0.0]]]), torch.tensor([[0]])
    assert text_score_entropy(logits, last, -0.1).isinf().all()
    assert (text_score_entropy(logits, last, 0.1) == 0).all()


def test_text_score_entropy_vanishes_for_a_certain_and_unchanged_token():
    logits = torch.tensor([[[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.1, 0.0, 0.0]]])
    entropy = text_score_entropy(logits, torch.tensor([[0, 1, 0]]), 1.0)[0]
    assert entropy[0] < 0.001
    assert entropy[1] > 8
    assert entropy[2] > 1
    one_hot = torch.full((1, 3, 3), -torch.inf)
    one_hot[0, torch.arange(3), torch.tensor([0, 1, 0])] = 0
    torch.testing.assert_close(entropy, score_entropy(logits.log_softmax(-1), one_hot)[0])


def test_a_settled_token_stays_settled():
    selection = Selection(0.5, 1, 3)
    assert selection.update(4, torch.tensor([[0.1, 0.9, 0.9]])).tolist() == [[True, False, False]]
    assert selection.update(5, torch.tensor([[0.9, 0.1, 0.9]])).tolist() == [[False, True, False]]
    assert selection.when.tolist() == [[4, 5, -1]]
    assert selection.settled.tolist() == [[True, True, False]]


def test_the_map_has_a_row_for_each_sample_and_a_column_for_each_evaluation():
    image = torch.tensor([[0, -1, -1, 2], [-1, -1, -1, -1]])
    text = torch.tensor([[-1, 1, -1], [-1, -1, -1]])
    image_map = draw_map(Selected(image, text, 3), (2, 2))
    side = 2 * CELL + GAP
    assert image_map.shape == (2 * 2 * side, 3 * side, 3)

    def colour(sample, evaluation, row, column, below=0):
        y = sample * 2 * side + below * side + row * CELL
        return tuple(image_map[y + 1, evaluation * side + column * CELL + 1].tolist())

    assert colour(0, 0, 0, 0) == SETTLED
    assert colour(0, 1, 1, 1) == MOVING
    assert colour(0, 2, 1, 1) == SETTLED
    assert colour(0, 0, 0, 1, below=1) == MOVING
    assert colour(0, 1, 0, 1, below=1) == SETTLED
    assert colour(0, 2, 1, 1, below=1) == (255, 255, 255)  # a text of three tokens
    assert colour(1, 2, 0, 0) == MOVING
