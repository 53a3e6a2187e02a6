"""Runs killed at random and resumed at other world sizes: one order, each sample once an epoch."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from mdm.config import DataConfig, MixtureStageConfig, SourceConfig
from mdm.data.mixture import open_mixture
from mdm.data.order import SampleOrder
from mdm.data.resume import ResumeError
from mdm.utils.saved_config import to_dict
from tests.data_sets import encoded
from tests.helpers import ROOT
from tests.unit.data.elastic_job import LENGTHS, live

RANKS = (1, 2, 3, 8)
SETTINGS = tuple({"prefetch": p, "threads": t} for p, t in product((1, 8), (1, 4)))
FIRST = (SourceConfig("images", 0.5), SourceConfig("talk", 0.5))
LATER = MixtureStageConfig(
    14, (SourceConfig("images", 0.25), SourceConfig("talk", 0.4), SourceConfig("late", 0.35))
)
STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("encoded"))
    encoded(f"{folder}/images", [50, 21, 34, 8], part_shards=2)
    encoded(f"{folder}/talk", [90, 70, 33], images=False, part_shards=1)
    encoded(f"{folder}/late", [40, 60], part_shards=1)
    return folder


def data(root: str, texts_per_row: int, staged: bool = True) -> DataConfig:
    return DataConfig(
        root,
        FIRST,
        24,
        2,
        mixture_stages=(LATER,) if staged else (),
        texts_per_row=texts_per_row,
        **LENGTHS,
    )


def in_a_process(plan: dict[str, Any]) -> tuple[list[list[list[str]]], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.data.elastic_job"],
        input=json.dumps(plan), capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps, state = json.loads(done.stdout)
    return steps, state


def check(config: DataConfig, steps: list[list[list[str]]], state: dict[str, Any]) -> None:
    """The ranks' samples are the order's; each once an epoch; every source has its exact share."""
    mixture = open_mixture(config)
    order = SampleOrder(mixture, 7)
    seen: Counter[tuple[str, int]] = Counter()
    for step, parts in enumerate(steps):
        draw = order.draw(step)
        ids = [i for part in parts for i in part]
        packed = draw.task == "text" and config.texts_per_row > 1
        assert ids == draw.ids or (packed and sorted(ids) == sorted(draw.ids))
        seen.update(zip(draw.ids, draw.epochs.tolist(), strict=True))
    assert set(seen.values()) == {1}
    used = Counter(sample.partition(":")[0] for sample, _ in seen)
    assert state["step"] == len(steps)
    assert {k: v for k, v in state["cursors"].items() if v} == used
    for source in mixture.sources:
        rows = source.manifest.rows
        whole = {
            (f"{source.name}:{row}", epoch)
            for epoch in range(used[source.name] // rows)
            for row in range(rows)
        }
        assert whole <= seen.keys()


@pytest.mark.parametrize("texts_per_row", [1, 3])
def test_killed_and_resumed_runs_have_one_sample_order(root: str, texts_per_row: int) -> None:
    config = data(root, texts_per_row)
    plan = {"data": to_dict(config), "settings": {}, "ranks": 1, "lost": 0, "state": None}
    expected, final = live(plan | {"steps": STEPS})
    check(config, expected, final)
    assert {"late", "talk"} <= {i.partition(":")[0] for [ids] in expected for i in ids}
    chance = random.Random(texts_per_row)
    for first in RANKS:
        steps: list[list[list[str]]] = []
        state, ranks = None, first
        while len(steps) < STEPS:
            # Before step 14 the run's configuration lacks the mixture stage that begins there.
            room = 14 - len(steps) if len(steps) < 14 else STEPS - len(steps)
            some = min(room, chance.randint(3, 15))
            known = data(root, texts_per_row, staged=len(steps) >= 14)
            plan = {
                "data": to_dict(known), "settings": chance.choice(SETTINGS), "ranks": ranks,
                "state": state, "steps": some, "lost": chance.randint(0, 3),
            }  # fmt: skip
            # One of the runs really dies: each of its lives is a process.
            more, state = in_a_process(plan) if first == 3 else live(plan)
            state = json.loads(json.dumps(state))
            steps += more
            ranks = chance.choice([r for r in RANKS if r != ranks])
        check(config, steps, state)
        assert state == final
        for parts, [ids] in zip(steps, expected, strict=True):
            assert [i for part in parts for i in part] == ids


def test_past_mixture_stages_cannot_be_changed_and_future_ones_can(root: str) -> None:
    plan = {"settings": {}, "ranks": 1, "lost": 0, "steps": 14}
    _, state = live(plan | {"data": to_dict(data(root, 1)), "state": None})
    onward = plan | {"state": state, "steps": 1}
    live(onward | {"data": to_dict(data(root, 1, staged=False))})  # not begun, so it may be dropped
    moved = replace(data(root, 1), mixture_stages=(replace(LATER, step=13),))
    with pytest.raises(ResumeError, match=r"(?s)at step 14: .*'step': 0.*this run.*'step': 13"):
        live(onward | {"data": to_dict(moved)})
    other = replace(data(root, 1), sources=(SourceConfig("images", 0.6), FIRST[1]))
    with pytest.raises(ResumeError, match=r"(?s)'images': 0.5.*'images': 0.6"):
        live(onward | {"data": to_dict(other)})
    with pytest.raises(ResumeError, match=r"packing None, this run has .*'texts_per_row': 3"):
        live(onward | {"data": to_dict(data(root, 3))})
    with pytest.raises(ResumeError, match="version 1, this run has 2"):
        live(onward | {"data": to_dict(data(root, 1)), "state": state | {"version": 1}})
