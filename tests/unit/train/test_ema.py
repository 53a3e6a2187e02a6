import torch

from mdm.train.ema import EMA


def test_the_decay_warms_up():
    """The average equals the recurrence with decay min(d, (1 + n) / (10 + n))."""
    weights = [torch.zeros(3, dtype=torch.float32)]
    ema = EMA(weights, 0.5)
    expected = torch.zeros(3, dtype=torch.float64)
    for n in range(30):
        weights[0] += n
        ema.update(weights)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights[0].double()
        torch.testing.assert_close(ema.shadows["ema"][0].double(), expected)
    assert ema.updates == 30


def test_the_average_is_a_copy():
    weights = [torch.ones(2)]
    ema = EMA(weights, 0.9)
    weights[0].zero_()
    assert ema.shadows["ema"][0].tolist() == [1.0, 1.0]


def test_a_second_average_has_its_own_decay():
    weights = [torch.zeros(3)]
    both, alone = EMA(weights, 0.5, 0.05), EMA(weights, 0.05)
    for n in range(5):
        weights[0] += n
        both.update(weights)
        alone.update(weights)
    assert torch.equal(both.shadows["ema2"][0], alone.shadows["ema"][0])
    assert not torch.equal(both.shadows["ema"][0], alone.shadows["ema"][0])
    assert both.nbytes == 2 * alone.nbytes == 24
