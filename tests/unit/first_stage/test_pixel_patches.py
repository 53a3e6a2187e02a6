import pytest
import torch

from mdm.first_stage.pixel_patches import PixelPatches, fitted


def test_patches_are_normalised_and_decode_to_the_image():
    grey = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = fitted(grey, 4)
    tokens = pixels.encode(grey)
    assert tokens.shape == (6, 4, 16)
    assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
    assert tokens.std().item() == pytest.approx(1, abs=1e-5)
    same_size = PixelPatches(8, 4, pixels.mean, pixels.std, shown=8)
    back = same_size.decode(tokens)
    assert back.shape == (6, 3, 8, 8)
    torch.testing.assert_close(back[:, 0], grey)


def test_each_token_is_one_patch_of_the_image():
    grey = torch.zeros(1, 8, 8)
    grey[0, 0:4, 4:8] = 1.0
    tokens = PixelPatches(8, 4, 0.0, 1.0).encode(grey)
    assert tokens[0].sum(1).tolist() == [0, 16, 0, 0]


def test_sizes_that_do_not_fit_are_errors_with_both_numbers():
    with pytest.raises(ValueError, match="8 pixels cannot be divided into patches of 3"):
        PixelPatches(8, 3, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"\(1, 3, 16\), not \[B, 2 x 2, 16\]"):
        PixelPatches(8, 4, 0.0, 1.0).decode(torch.zeros(1, 3, 16))
