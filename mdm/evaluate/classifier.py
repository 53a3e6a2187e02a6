"""An independent classifier of small images: a CNN trained on real ones, apart from the model.

Its classes are those of the data set plus one more, "none of them", learnt from other images, so
that an image of something else is not assigned to a class. Its last hidden layer (64 wide) is the
feature space of the distances.

Shapes: B images, H = W = 32.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from mdm.storage.tensor_file import save_tensors
from mdm.utils.files import DamagedFileError, load_json, write_json

FEATURES = 64
WIDTH = 32  # channels of the first convolution
LR = 2e-3


class Classifier(nn.Module):
    """Pixels f32 [B, 3, H, W] in [0, 1] → logits [B, n_classes + 1]; the last class is "none"."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        widths = (3, WIDTH, 2 * WIDTH, 2 * WIDTH)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, stride=1 if i == 3 else 2)
            for i, o in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in widths[1:])
        self.embed = nn.LazyLinear(FEATURES)
        self.head = nn.Linear(FEATURES, n_classes + 1)

    def features(self, pixels: Tensor) -> Tensor:
        """The last hidden layer, f32 [B, 64]."""
        x = pixels * 2.0 - 1.0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = F.max_pool2d(x, 2)
        return F.gelu(self.embed(x.flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, n_classes + 1]."""
        out: Tensor = self.head(self.features(pixels))
        return out

    @torch.inference_mode()
    def judge(self, pixels: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Predicted classes i64 [B] and features f64 [B, 64]; class `n_classes` means none."""
        self.eval()
        features = torch.cat([self.features(p) for p in torch.split(pixels, 500)])
        return self.head(features).argmax(1).numpy(), features.double().numpy()


def _augment(x: Tensor, rng: torch.Generator) -> Tensor:
    # Shift, rotate and scale a little, blur some and add noise: generated images come from a
    # decoder that softens strokes, and the classifier must treat them like sharp ones.
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=rng)

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (
        torch.stack([cos, -sin, uniform(-0.1, 0.1)], 1),
        torch.stack([sin, cos, uniform(-0.1, 0.1)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = (uniform(-0.6, 1.0).clamp(min=0.0))[:, None, None, None]
    x = torch.lerp(x, soft, blur)
    noise = torch.randn(x.shape, generator=rng) * uniform(0.0, 0.06)[:, None, None, None]
    return (x + noise).clamp(0.0, 1.0)


def train(
    pixels: Tensor,
    labels: Tensor,
    n_classes: int,
    *,
    epochs: int = 8,
    batch: int = 128,
    seed: int = 0,
) -> Classifier:
    """A classifier trained on `pixels` f32 [B, 3, H, W] in [0, 1] and `labels` i64 [B].

    A label of `n_classes` or below 0 means "none of the classes". The same input and number of
    threads give the same weights; the global random state does not change.
    """
    labels = torch.where(labels < 0, n_classes, labels)
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(n_classes)
        net(pixels[:2])  # sizes the embedding
    steps = epochs * (len(pixels) // batch or 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    net.train()
    with tqdm(total=steps, desc="classifier", unit="step", leave=False) as bar:
        while bar.n < steps:
            for picked in torch.split(torch.randperm(len(pixels), generator=rng), batch):
                if bar.n == steps or (len(picked) < batch <= len(pixels)):
                    continue
                logits = net(_augment(pixels[picked], rng))
                loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.05)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return net.eval()


def save(net: Classifier, folder: Path, report: dict[str, float]) -> None:
    """Write weights and `report` (accuracies) to `folder`; the report is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "classifier.safetensors", net.state_dict())
    write_json(folder / "classifier.json", {"n_classes": net.n_classes} | report)


def load(folder: Path) -> Classifier:
    """The classifier that `save` wrote.

    Raises FileNotFoundError if it is missing and ValueError if it is damaged; both name the folder.
    """
    again = "run pipelines/train_classifier.py"
    try:
        report = load_json(folder / "classifier.json", {"n_classes": int})
        weights = load_file(folder / "classifier.safetensors")
    except FileNotFoundError:
        raise FileNotFoundError(f"no classifier in {folder}: {again}") from None
    except (DamagedFileError, SafetensorError) as error:
        raise ValueError(f"the classifier in {folder} is damaged ({error}): {again}") from None
    net = Classifier(report["n_classes"])
    net.load_state_dict(weights)
    return net.eval()
