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


def test_images_and_classes_belong_to_their_tasks():
    with pytest.raises(ValueError, match="--images belong to --task reply or joint, not to text-"):
        Flags(task="text-to-image", input=("a",), images=("a.png",))
    with pytest.raises(ValueError, match="--classes belong to --task joint; reply takes --input"):
        Flags(task="reply", input=("a",), classes=(1,))


def test_joint_samples_begin_with_as_many_of_each():
    with pytest.raises(ValueError, match="with 1 dialogues, 0 images and 2 classes; give as many"):
        Flags(task="joint", input=("a",), classes=(1, 2))
    assert Flags(task="joint", images=("a.png",), classes=(1,)).classes == (1,)
