import dataclasses
import json

import pytest
import torch

from mdm.checkpoint.state import TrainState
from mdm.diffusion.levels import CONDITIONINGS
from mdm.loss import LossTerms
from mdm.train.loop import learning_rate, snapshot_steps
from mdm.train.metrics import PARTS, Clock, Reporter, Window
from mdm.train.throughput import Throughput
from mdm.utils.ranks import World
from tests.helpers import small_config


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path):
    config = small_config(tmp_path, steps=103, warmup=3, decay="cosine", lr=1.0)
    rates = [learning_rate(s, config) for s in range(104)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert rates[53] == pytest.approx(0.55)
    assert rates[103] == pytest.approx(0.1)
    constant = dataclasses.replace(config.train, decay="constant")
    assert learning_rate(90, dataclasses.replace(config, train=constant)) == 1.0


def test_snapshots_are_evenly_spaced_and_include_the_last_step():
    assert snapshot_steps(4000, 5) == {800, 1600, 2400, 3200, 4000}
    assert snapshot_steps(10, 3) == {3, 7, 10}
    assert snapshot_steps(2, 5) == {1, 2}
    assert snapshot_steps(10, 0) == set()


def loss_terms(total: float, rec_img: float, **sums: tuple[float, ...]) -> LossTerms:
    """Terms of a step; `sums` are the samples and sums of losses of a conditioning."""
    conditioning, per_sample = [], []
    for name, (samples, *losses) in sums.items():
        conditioning += [CONDITIONINGS.index(name)] * samples
        per_sample += [losses, *([[0.0] * 3] * (samples - 1))]
    scalars = [torch.tensor(v) for v in (total, rec_img, 0.0, 0.0, 0.0, 0.0, 0.0)]
    return LossTerms(
        *scalars,
        torch.tensor(conditioning, dtype=torch.long),
        torch.tensor(per_sample, dtype=torch.float64).reshape(-1, 3),
    )


def test_means_are_by_task_and_conditioning(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        window = Window(World())
        window.add("image_text", loss_terms(1.0, 0.5, both=(3, 1.0, 0.0, 2.0)))
        window.add("image_text", loss_terms(3.0, 1.5, both=(1, 3.0, 0.0, 2.0), image=(1, 7, 0, 0)))
        window.add("text", loss_terms(8.0, 0.0))
        assert window.mean() == {
            "loss": 4.0,
            "image_text/total": 2.0,
            "image_text/rec_img": 1.0,
            "text/total": 8.0,
            "both/eps_img": 1.0,
            "both/se_txt": 1.0,
            "image/eps_img": 7.0,
        }
        assert window.mean() == {}
    finally:
        dist.destroy_process_group()


def test_a_restored_window_gives_the_same_means(tmp_path):
    import torch.distributed as dist

    draw = torch.Generator().manual_seed(0)
    values = (10 ** torch.randn(9, 6, generator=draw)).tolist()
    steps = [loss_terms(*v[:2], both=(1 + i % 3, *v[2:5])) for i, v in enumerate(values)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        whole, first = Window(World()), Window(World())
        for i, terms in enumerate(steps):
            whole.add("text" if i % 4 == 0 else "image_text", terms)
        for i, terms in enumerate(steps[:5]):
            first.add("text" if i % 4 == 0 else "image_text", terms)
        saved = json.loads(json.dumps(first.state()))
        second = Window(World(), saved)
        for i, terms in enumerate(steps[5:], 5):
            second.add("text" if i % 4 == 0 else "image_text", terms)
        assert second.mean() == whole.mean()
        assert not Window(World(rank=1, size=2), saved)._sums["text"].any()
    finally:
        dist.destroy_process_group()


def test_the_clock_covers_all_time():
    clock = Clock({"data": 1.0}, str)
    with clock.part("forward"):
        torch.ones(200, 200) @ torch.ones(200, 200)
    clock.tick("other")
    assert set(clock.seconds) == set(PARTS)
    assert clock.seconds["data"] == 1.0
    assert clock.seconds["forward"] > 0
    assert clock.seconds["other"] > 0


def test_the_wait_for_data_is_a_metric(tmp_path):
    reporter = Reporter(tmp_path, 10, World())
    state, clock = TrainState(), Clock({}, str)
    reporter.start(state, fresh=True)
    clock.seconds |= {"data": 10.0, "forward": 30.0}
    state.step, state.samples_seen = 1, 8
    reporter.log(state, clock, Throughput(small_config(tmp_path), World()), {"loss": 0.5})
    reporter.close()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["share/data"] == pytest.approx(0.25, rel=1e-3)


def test_metrics_of_steps_that_will_be_repeated_are_dropped(tmp_path):
    """Also a line that a kill cut short."""
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    reporter = Reporter(tmp_path, 10, World())
    state = TrainState(step=4, samples_seen=32)
    reporter.start(state, fresh=False)
    state.step, state.samples_seen = 6, 48
    clock = Clock({}, str)
    clock.tick("forward")
    work = Throughput(small_config(tmp_path), World())
    reporter.log(state, clock, work, {"loss": 0.5})
    reporter.close()
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(2, 1.0), (4, 1.0), (6, 0.5)]
    assert rows[-1]["samples_seen"] == 48
    assert rows[-1]["share/forward"] == pytest.approx(1.0)
    assert rows[-1]["share_outside_model"] == pytest.approx(0.0)


def attempts(reporter: Reporter) -> int:
    """The attempts in the totals of a run."""
    import torch.distributed as dist

    store = reporter.run_dir / f"rendezvous-{id(reporter)}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        seconds = dict.fromkeys(PARTS, 0.1)
        return reporter.totals(TrainState(seconds=seconds), 0.0)["attempts"]
    finally:
        dist.destroy_process_group()


def test_each_start_is_an_event_that_counts_as_an_attempt(tmp_path):
    for number in (1, 2, 3):
        reporter = Reporter(tmp_path, 10, World())
        reporter.start(TrainState(step=number), fresh=number == 1)
        reporter.note("ended", TrainState(step=number), status="KILLED")
        reporter.close()
        assert attempts(reporter) == number
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["event"] == "started"]
    assert ["former_ended" in event for event in started] == [False, True, True]
    assert started[1]["former_ended"] == pytest.approx(events[1]["time"], abs=5.0)


def test_attempts_of_a_run_that_an_earlier_version_began_count(tmp_path):
    lines = [{"started": 1e9, "step": 0}, {"started": 2e9, "step": 4, "former_ended": 1.5e9}]
    old = tmp_path / "attempts.jsonl"
    old.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"event": "started", "step": 1, "time": 1.0, "seconds": 3.0}
    (tmp_path / "events.jsonl").write_text(json.dumps(row) + "\n")
    reporter = Reporter(tmp_path, 10, World())
    reporter.start(TrainState(step=4), fresh=False)
    reporter.close()
    assert attempts(reporter) == 3
