"""Whether what the network is given fits it, and fits together.

Shapes: b samples, r rows (b unless texts are packed), m text tokens, k images of n tokens, c
numbers a token.
"""

import torch
from torch import Tensor

from mdm.config import ModelConfig


def check_inputs(config: ModelConfig, z_txt: Tensor, **others: Tensor | None) -> int:
    """How many images a sample holds.

    Args:
        config: of the network.
        z_txt: what `Decoder.forward` takes by this name.
        others: all its other arguments, by their names.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, with both values.
    """
    c, longest = config.latent_dim, config.text_length
    if z_txt.dim() != 3 or not 1 <= z_txt.shape[1] <= longest or z_txt.shape[2] != c:
        raise ValueError(
            f"z_txt has shape {tuple(z_txt.shape)}; the model reads [batch, 1 ... {longest} "
            f"tokens (model.text_length), {c} numbers (model.latent_dim)]"
        )
    r, m, _ = z_txt.shape
    b, class_ids, level_img = r, others["class_ids"], others["level_img"]
    if others["text_of"] is not None:
        assert class_ids is not None
        b = len(class_ids)
    n = config.image_height * config.image_width
    k = _images(others, b, n, c)
    given = others | {"z_txt": z_txt}
    one_level = level_img is not None and level_img.dim() == 1  # for all images of a sample
    floats: dict[str, tuple[int, ...]] = {
        "z_txt": (r, m, c),
        "estimate_txt": (r, m, c),
        "z_img": (b, k * n, c),
        "level_txt": (b,),
        "level_img": (b,) if one_level else (b, k),
    }
    integers = {"class_ids": (b,), "image_at": (b, k), "text_of": (r, m)}
    masks = {"prompt": (r, m), "keep_txt": (r, m), "keep_img": (b, k * n)}
    for kind, shapes in (("floating point", floats), ("i64", integers), ("bool", masks)):
        for name, shape in shapes.items():
            tensor = given[name]
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; z_txt {tuple(z_txt.shape)} and "
                    f"{k} images need {shape}"
                )
            if _kind(tensor.dtype) != kind:
                raise ValueError(f"{name} is {tensor.dtype}; it must be {kind}")
    for name, end in {"class_ids": config.n_classes, "image_at": longest, "text_of": b}.items():
        _check_range(name, given[name], end)
    return k


def _images(given: dict[str, Tensor | None], b: int, n: int, c: int) -> int:
    z_img, level_img = given["z_img"], given["level_img"]
    if z_img is None:
        return 0
    if given["text_of"] is not None:
        raise ValueError("text_of tells of packed texts, which have no images")
    k = z_img.shape[1] // n
    if level_img is None or z_img.shape != (b, max(k, 1) * n, c):
        levels = None if level_img is None else tuple(level_img.shape)
        raise ValueError(
            f"z_img has shape {tuple(z_img.shape)} and level_img {levels}; {b} samples on "
            f"a grid of {n} tokens need [{b}, images x {n}, {c}] and [{b}, images]"
        )
    keeps = [name for name in ("keep_txt", "keep_img") if given[name] is not None]
    if len(keeps) == 1:
        raise ValueError(f"of keep_txt and keep_img only {keeps[0]} is given; images need both")
    return k


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating point"
    return {torch.int64: "i64", torch.bool: "bool"}.get(dtype, str(dtype))


def _check_range(name: str, tensor: Tensor | None, end: int) -> None:
    """-1 ... end - 1, on the CPU: a GPU would be waited for, which `Batch.check` spares it."""
    if tensor is None or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return
    if tensor.numel() and not (tensor.min() >= -1 and tensor.max() < end):
        raise ValueError(
            f"{name} spans {int(tensor.min())} to {int(tensor.max())}; it lies in -1 ... {end - 1}"
        )
