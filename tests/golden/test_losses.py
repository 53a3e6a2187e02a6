"""Twenty small training steps give the recorded losses.

If they change, the model or the objective has changed: explain this in the commit. Rewrite the
record with `python -m tests.golden.test_losses`.
"""

import json
from pathlib import Path

import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from mdm.data.batch import Batch
from mdm.loss import Loss

RECORD = Path(__file__).with_name("losses.json")
STEPS = 20

CONFIG = Config(
    model=ModelConfig(
        d_model=32,
        n_layer=4,
        d_state=8,
        headdim=16,
        chunk_size=8,
        vocab_size=40,
        n_classes=4,
        image_height=2,
        image_width=2,
        text_length=10,
    ),
    objective=ObjectiveConfig(p_self_condition=0.5),
    data=DataConfig(caption_length=6, dialogue_length=10),
    seed=3,
)


def batch(step: int) -> Batch:
    """Images that show their class, with captions that name it; every fourth batch is text-only."""
    text_only = step % 4 == 3
    generator = torch.Generator().manual_seed(step)
    b, m = 8, 10 if text_only else 6
    classes = torch.randint(4, (b,), generator=generator)
    tokens = torch.ones(b, m, dtype=torch.long)
    tokens[:, 0], tokens[:, 1] = 10 + classes, 2
    prompt = torch.zeros(b, m, dtype=torch.bool)
    prompt[:, 0] = text_only
    means = torch.linspace(-2, 2, 4)[classes].view(b, 1, 1)
    noise = 0.1 * torch.randn(b, 4, 16, generator=generator)
    return Batch(
        ids=tuple(f"{step}/{i}" for i in range(b)),
        keys=torch.arange(b) + 100 * step,
        epochs=torch.full((b,), step // 5),
        class_ids=torch.full((b,), -1) if text_only else classes,
        tokens=tokens,
        prompt=prompt,
        latents=None if text_only else means + noise,
    )


def run() -> list[dict[str, float]]:
    """The loss terms of every step."""
    torch.manual_seed(0)
    objective = Loss(CONFIG)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, weight_decay=0)
    rows = []
    for step in range(STEPS):
        terms = objective(batch(step), step)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        scalars = {k: v for k, v in terms._asdict().items() if v.dim() == 0}
        rows.append({k: round(float(v.detach()), 5) for k, v in scalars.items()})
    return rows


def test_twenty_steps_give_the_recorded_losses():
    recorded = json.loads(RECORD.read_text())
    for step, (ours, golden) in enumerate(zip(run(), recorded, strict=True)):
        # Processors sum in different orders, so the losses are not compared bit for bit.
        assert ours == pytest.approx(golden, rel=2e-3, abs=2e-4), f"step {step}"


if __name__ == "__main__":
    RECORD.write_text(json.dumps(run(), indent=1) + "\n")
