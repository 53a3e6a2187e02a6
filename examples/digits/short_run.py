"""Short trainings of the preset `learn` in one process, without DeepSpeed, to measure the model."""

import dataclasses
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from examples.digits import data as digits
from mdm.config import Config
from mdm.data.batch import Batch, sample_keys
from mdm.data.loader import build_loader
from mdm.first_stage.pixel_patches import fitted
from mdm.first_stage.tokenizer import EOS, PAD, Tokenizer
from mdm.presets import LEARN
from mdm.train.engine import decay_groups
from mdm.train.loop import learning_rate
from mdm.train.pretraining import make_loss
from mdm.utils.ranks import World


def write_data(folder: Path) -> None:
    """Write the tokenizer and the encoded data set into `folder`, replacing what it holds."""
    shutil.rmtree(folder, ignore_errors=True)
    digits.write(folder)


def short_config(data: Path, model: dict[str, Any], train: dict[str, Any], **more: Any) -> Config:
    """The preset on `data`, with other fields of its model and training, in plain torch.

    Without self-conditioning, which would add a second pass to some steps.
    """
    tokenizer = data / "tokenizer.model"
    size = {"global_batch": more.pop("batch", LEARN.data.global_batch)}
    return dataclasses.replace(
        LEARN,
        model=dataclasses.replace(LEARN.model, kernel="torch", **model),
        objective=dataclasses.replace(LEARN.objective, p_self_condition=0.0),
        data=dataclasses.replace(LEARN.data, root=str(data / "encoded"), **size),
        train=dataclasses.replace(LEARN.train, **train),
        tokenizer=str(tokenizer),
        **more,
    )


class ShortRun:
    """The loss, the data and AdamW of a configuration, with the rate and clipping of the trainer.

    Close it, or use it in a `with`: its loader has threads.
    """

    def __init__(self, config: Config) -> None:
        torch.manual_seed(config.seed)
        self.config, self.step = config, 0
        self.loss = make_loss(config)
        self.loader = build_loader(config, World())
        train = config.train
        groups = decay_groups(self.loss, train.weight_decay)
        betas = train.beta1, train.beta2
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=betas, fused=True)

    def take_step(self) -> float:
        """One step on the next batch; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        total = self.loss(next(self.loader), self.step).total
        self.optimizer.zero_grad()
        total.backward()
        clip_grad_norm_(self.loss.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        self.step += 1
        return float(total.detach())

    def __enter__(self) -> "ShortRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.loader.close()


def heldout_batch(tokenizer: Tokenizer, length: int, noises: int) -> Batch:
    """Every held-out image with a caption of `length` tokens, each at `noises` fixed noises."""
    train, heldout = digits.split()
    labels = heldout.labels.tolist()
    ids = tuple(f"heldout:{i}" for i in range(len(labels)))
    tokens = torch.full((len(labels), length), PAD)
    for row, text in zip(tokens, digits.captions(labels), strict=True):
        pieces = torch.tensor([*tokenizer.encode(text), EOS])
        row[: len(pieces)] = pieces
    return Batch(
        ids=ids * noises,
        keys=sample_keys(ids).repeat(noises),
        epochs=torch.arange(noises).repeat_interleave(len(ids)),
        class_ids=heldout.labels.repeat(noises),
        tokens=tokens.repeat(noises, 1),
        prompt=torch.zeros(len(labels) * noises, length, dtype=torch.bool),
        latents=fitted(train.grey, digits.PATCH).encode(heldout.grey).repeat(noises, 1, 1),
    )
