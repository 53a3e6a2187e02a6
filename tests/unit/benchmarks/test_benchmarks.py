"""The figures that benchmarks derive from their timings, and that their peers compute the same."""

import dataclasses
import json

import pytest
import torch

import benchmarks.__main__ as runner
from benchmarks import checkpoint, decoder_scaling, engine_overhead, loading, ssd_cpu
from benchmarks.timing import Result, milliseconds, worst
from mdm.kernels.ssd import ssd_reference


def test_a_ratio_above_one_means_that_we_are_better():
    quick = Result("x", "ms", 2.0, {"a": 5.0, "b": 3.0}, "here")
    assert quick.ratio == 1.5
    good = Result("x", "accuracy", 0.9, {"a": 0.6, "b": 0.45}, "here", lower_is_better=False)
    assert good.ratio == pytest.approx(1.5)


def test_the_headline_is_the_worst_case_and_keeps_them_all():
    cases = [Result("x", "ms", 1.0, {"a": value}, f"case {value}") for value in (3.0, 0.5, 2.0)]
    plain = json.loads(json.dumps(worst("x", cases).to_dict()))
    assert plain["ratio"] == 0.5
    assert plain["peers"] == {"a": 0.5}
    assert "case 0.5" in plain["setting"]
    assert [case["ratio"] for case in plain["cases"]] == [3.0, 0.5, 2.0]


def test_the_files_that_benchmarks_start_or_read_are_where_they_look():
    jobs = (checkpoint.JOB, engine_overhead.JOB, loading.JOB)
    assert all(path.is_file() for path in (*jobs, loading.REQUIREMENTS)), jobs
    assert {path.stem for path in jobs} == {name for name in runner.HELPERS if "_job" in name}


def test_help_names_the_benchmarks(capsys):
    runner.main(["--help"])
    assert "loader_s3, order_scale, sampler, ssd_cpu." in capsys.readouterr().out


def test_contestants_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(milliseconds(calls, seconds=0, least=3)) == {"a", "b"}
    assert order == list("aabb") + list("ab") * 3


def test_the_papers_listing_is_the_recurrence():
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, 12, 3, 4), torch.rand(2, 12, 3), -torch.rand(3)
    B, C = torch.randn(2, 12, 1, 5), torch.randn(2, 12, 1, 5)
    expected = ssd_reference(x, dt, A, B, C, chunk_size=4)
    B, C = (t.expand(-1, -1, 3, -1) for t in (B, C))
    listing = ssd_cpu.ssd_minimal(x * dt.unsqueeze(-1), dt * A, B, C, block=4)
    torch.testing.assert_close(listing, expected, rtol=1e-4, atol=1e-5)


def test_slope_is_the_exponent_of_growth():
    lengths = [256, 512, 1024]
    assert decoder_scaling.slope(lengths, [1.0, 4.0, 16.0]) == pytest.approx(2)
    assert decoder_scaling.slope(lengths, [1.0, 2.0, 4.0]) == pytest.approx(1)


def test_crossing_is_where_ours_becomes_less():
    lengths = [256, 512, 1024]
    assert decoder_scaling.crossing(lengths, [2, 2, 2], [1, 2, 4]) == pytest.approx(512)
    assert decoder_scaling.crossing(lengths, [2, 2, 2], [1, 1.5, 3]) == pytest.approx(
        512 * 2 ** (0.2876821 / 0.6931472), rel=1e-4
    )
    assert decoder_scaling.crossing(lengths, [1, 1, 1], [2, 2, 2]) == 256
    assert decoder_scaling.crossing(lengths, [3, 3, 3], [1, 1, 2]) is None


def test_grids_have_the_length_asked_for():
    for length in decoder_scaling.LENGTHS:
        config = decoder_scaling.sized(decoder_scaling.MAMBA, length)
        assert config.image_height * config.image_width == length


@pytest.mark.parametrize("name", ["mamba", "transformer"])
def test_a_denoising_step_of_both_decoders_is_measured(name, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    small = {"d_model": 32, "n_layer": 1, "d_state": 8, "headdim": 16, "chunk_size": 8}
    config = dataclasses.replace(decoder_scaling.decoders()[name], **small)
    assert decoder_scaling.point(config, 4)["ms"] > 0
