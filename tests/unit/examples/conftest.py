"""A judge of scenes, trained once for all tests."""

import pytest

from examples.scenes import judge
from examples.scenes.data import Flags, scenes
from examples.scenes.judge import Judge


@pytest.fixture(scope="session")
def scene_judge() -> Judge:
    return judge.train((s for _, s in scenes(Flags(), "journeydb", False, 700)), epochs=4)
