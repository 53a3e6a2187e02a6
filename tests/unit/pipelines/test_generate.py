"""The flags of the generation job."""

import pytest

from mdm.report.drawing import Flags


def test_a_map_needs_selection():
    with pytest.raises(
        ValueError, match=r"--selection_map a\.png shows nothing with --selection 0"
    ):
        Flags(selection_map="a.png")
    assert Flags(selection_map="a.png", selection=0.1).selection == 0.1


def test_a_task_needs_its_input():
    with pytest.raises(ValueError, match="--task reply needs --input"):
        Flags(task="reply")


def test_images_belong_to_a_dialogue():
    with pytest.raises(ValueError, match="--images belong to --task reply, not to joint"):
        Flags(task="joint", images=("a.png",))
