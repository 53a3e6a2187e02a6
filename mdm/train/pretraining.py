"""One rank's part of a pretraining job: its data, its training, its memory errors."""

import torch

from mdm.checkpoint.state import RunError
from mdm.config import Config
from mdm.data.loader import Loader, build_loader
from mdm.data.provenance import check_fit
from mdm.first_stage.tokenizer import Tokenizer
from mdm.loss import Loss
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block, Trunk
from mdm.planning.memory_plan import explain_out_of_memory
from mdm.storage import StoreError
from mdm.train.loop import train
from mdm.train.run import Draw
from mdm.utils.ranks import World

# `train.gather` -> the modules that ZeRO-3 gathers as one.
GATHERED = {"block": (Block, AttentionBlock), "trunk": (Trunk,)}


class RankError(RuntimeError):
    """A mistake that shows on this rank alone: one line."""


def make_loader(config: Config, world: World) -> Loader:
    """The run's loader; RunError if data is missing or does not fit the configuration."""
    try:
        loader = build_loader(config, world)
        # Once per node: any of its ranks may write the exports, which hold the tokenizer.
        if world.local_rank == 0:
            check_fit(loader.mixture, config)
        return loader
    except (ValueError, StoreError) as error:
        raise RunError(str(error)) from error


def make_loss(config: Config) -> Loss:
    """The run's loss, whose text bias may begin as the log unigram of the tokenizer's corpus."""
    begins = config.objective.unigram_bias and config.tokenizer
    return Loss(config, Tokenizer(config.tokenizer).log_unigram() if begins else None)


def pretrain(
    config: Config, world: World, *, resume: str, track: bool, profiled: range, draw: Draw | None
) -> int:
    """Train to the last step; all ranks call, after `start_ranks`. Returns the exit code.

    The arguments are those of `mdm.train.loop.train`. Raises RunError, the same on every rank, for
    what the user can fix, and RankError if this rank ran out of GPU memory.
    """
    try:
        return train(
            config,
            world,
            make_loss,
            make_loader,
            resume=resume,
            leaf_classes=GATHERED[config.train.gather],
            track=track,
            profiled=profiled,
            draw=draw,
        )
    except torch.OutOfMemoryError as error:
        raise RankError(explain_out_of_memory(error, config, world)) from error
