"""Can the model say "one of four"? A random fixed Markov chain in which tokens have K successors.

    python -m examples.text.fork

Each of V tokens allows K others as its successor, equally often. The model sees a clean prompt up
to token i and pure noise after it: the least cross-entropy of token i + 1 is ln K. It trains with
the project's loss on rows of the chain whose prompts are of every length. Its scores must have K
equal peaks that no geometry of V latents of width 16 offers by itself.

Shapes: B rows, M tokens, V tokens of the chain, K successors.
"""

from mdm.launch.job import job

import dataclasses
import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import trange

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig, doc
from mdm.data.batch import Batch
from mdm.diffusion import schedule
from mdm.loss import Loss
from mdm.model.inputs import TextInput
from mdm.model.mdm import text_logits
from mdm.presets import LEARN_TEXT
from mdm.train.ema import EMA
from mdm.train.loop import learning_rate
from mdm.utils.command_line import parse_cli

VOCAB_SIZE, SUCCESSORS = 256, 4
FIRST = 3  # ids below are UNK, PAD and EOS, which the loss treats differently
ROWS = 2048  # to measure on


@dataclass(frozen=True)
class Flags(Config):
    """Flags of this job: a configuration, and the seed of chain and weights.

    A row is a token and its successor: with longer rows most tokens are unknowable at full noise.
    """

    model: ModelConfig = field(
        default_factory=lambda: dataclasses.replace(
            LEARN_TEXT.model,
            d_model=128,
            n_layer=2,
            vocab_size=VOCAB_SIZE + FIRST,
            text_length=2,
            chunk_size=8,
            kernel="torch",
            eq17_logits=True,
        )
    )
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(p_self_condition=0.0)
    )
    data: DataConfig = field(
        default_factory=lambda: dataclasses.replace(
            LEARN_TEXT.data, global_batch=1024, caption_length=2, dialogue_length=2
        )
    )
    train: TrainConfig = field(
        default_factory=lambda: dataclasses.replace(
            LEARN_TEXT.train, steps=1000, warmup=50, lr=4e-3, ema=0.99
        )
    )
    limit: float = doc(1.03, "cross-entropy over ln K from which the job fails")


def chain(generator: torch.Generator) -> Tensor:
    """The successors of each token, i64 [V, K], counted from 0."""
    scores = torch.rand(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
    return scores.topk(SUCCESSORS, 1).indices


def rows(successors: Tensor, b: int, m: int, generator: torch.Generator) -> Tensor:
    """Rows of the chain, i64 [B, M], counted from FIRST."""
    v, k = successors.shape
    tokens = [torch.randint(v, (b,), generator=generator)]
    for _ in range(m - 1):
        tokens.append(successors[tokens[-1], torch.randint(k, (b,), generator=generator)])
    return torch.stack(tokens, 1) + FIRST


def prompts(b: int, m: int, generator: torch.Generator) -> Tensor:
    """Bool [B, M]: the first 1 ... M - 1 tokens."""
    return torch.arange(m) < torch.randint(1, m, (b, 1), generator=generator)


def train(config: Config, successors: Tensor) -> Loss:
    """The averaged model after the steps of `config` on ever new rows of the chain."""
    torch.manual_seed(config.seed)
    loss, b, m = Loss(config), config.data.global_batch, config.model.text_length
    settings = config.train
    parameters = list(loss.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(settings.beta1, settings.beta2))
    average = EMA([p.detach() for p in parameters], settings.ema)
    generator = torch.Generator().manual_seed(config.seed + 1)
    with trange(settings.steps, desc="steps") as steps:
        for step in steps:
            batch = Batch(
                ids=("",) * b,
                keys=torch.arange(b) + b * step,
                epochs=torch.zeros(b, dtype=torch.long),
                class_ids=torch.full((b,), -1),
                tokens=rows(successors, b, m, generator),
                prompt=prompts(b, m, generator),
                latents=None,
            )
            total = loss(batch, step).total
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
                group["weight_decay"] = settings.weight_decay
            optimizer.step()
            average.update([p.detach() for p in parameters])
            steps.set_postfix_str(f"{total.detach():.3f}")
    with torch.no_grad():
        for parameter, averaged in zip(parameters, average.shadows["ema"], strict=True):
            parameter.copy_(averaged)
    return loss.eval()


@torch.no_grad()
def cross_entropy(loss: Loss, successors: Tensor, seed: int) -> float:
    """Of the token after a clean prompt, all later ones pure noise, in nats; at least ln K.

    The mean over the successors, which are equally likely, so that none has to be drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    m = loss.model.text_length
    tokens, prompt = rows(successors, ROWS, m, generator), prompts(ROWS, m, generator)
    means, bias = loss.vae.vocabulary()
    noise = torch.randn(ROWS, m, means.shape[1], generator=generator)
    z = torch.where(prompt.unsqueeze(-1), means[tokens], noise)
    level = torch.full((ROWS,), schedule.TEXT.log_snr_range()[1])
    none = torch.full((ROWS,), -1)
    log_p = text_logits(loss.network(TextInput(z, level, prompt), none), means, bias)
    each, length = torch.arange(ROWS), prompt.sum(1)
    after = log_p.log_softmax(-1)[each, length]  # [B, V]
    allowed = successors[tokens[each, length - 1] - FIRST] + FIRST
    return -float(after.gather(1, allowed).mean())


def fork(config: Config) -> float:
    """The cross-entropy of a model trained on a chain of the seed of `config`, over ln K."""
    successors = chain(torch.Generator().manual_seed(config.seed))
    loss = train(config, successors)
    return cross_entropy(loss, successors, config.seed + 2) / math.log(SUCCESSORS)


@job("fork", ValueError)
def main() -> int:
    """Print the figure; exit code 1 if it is above the limit."""
    flags = parse_cli(Flags, description=__doc__ or "")
    if flags.train.threads:
        torch.set_num_threads(flags.train.threads)
    ratio = fork(flags)
    nats, least = ratio * math.log(SUCCESSORS), math.log(SUCCESSORS)
    print(
        f"{VOCAB_SIZE} tokens, {SUCCESSORS} successors, {flags.train.steps} steps: "
        f"{nats:.4f} nats, {100 * (ratio - 1):.1f} % above ln {SUCCESSORS} = {least:.4f}"
    )
    return 0 if ratio <= flags.limit else 1


if __name__ == "__main__":
    sys.exit(main())
