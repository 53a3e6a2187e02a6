"""Measures what `make learn-text` trained on the held-out rows, and draws samples of each model.

Every model pays for the same tokens of the same rows, each row by itself. What the diffusions pay
is a bound of their -log p, what the others pay is exact. A row's characters are those of the text
that its tokens decode to, with its spaces and line breaks.

Shapes: R rows, M tokens.
"""

from mdm.launch.job import job

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from examples.text import train
from examples.text.baselines import Autoregressive, Masked, parameters, unigram
from examples.text.data import ROW, Rows
from mdm.config import Config, doc
from mdm.evaluate.likelihood import (
    TextBound,
    latents_of,
    network_denoiser,
    per_character,
    text_bound,
)
from mdm.first_stage.tokenizer import EOS, PAD, Tokenizer
from mdm.generate.denoise import denoise
from mdm.generate.loading import load_model
from mdm.generate.request import ABSENT, GENERATED, Request, Sampling
from mdm.model.mdm import MDM
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields
from mdm.utils.files import load_json, write_json
from mdm.utils.saved_config import from_dict

BATCH = 31  # rows evaluated together

# Rows [B, M] that begin with the prompts [B, P].
Sampler = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    run: str = doc("runs/learn-text", "folder of the data and of the trained models")
    levels: int = doc(16, "noise levels at which each row's bound is evaluated", POSITIVE)
    rows: int = doc(0, "held-out rows; 0: all")
    samples: int = doc(6, "texts that each model begins, and continues", POSITIVE)
    prompt: int = doc(40, "tokens of a held-out row that a model continues", POSITIVE)
    steps: int = doc(200, "solver steps of the diffusion's samples", POSITIVE)
    threads: int = doc(0, "CPU threads; 0: all cores")
    seed: int = doc(0, "of everything drawn")

    def __post_init__(self) -> None:
        check_fields(self)


def run(flags: Flags) -> dict[str, Any]:
    """All measurements and samples, as `measure.json` holds them."""
    folder = Path(flags.run)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    held_out = Rows.load(folder / "data" / "held_out.npz").take(flags.rows)
    seen = Rows.load(folder / "data" / "train.npz").tokens
    tokenizer = Tokenizer(folder / "data" / "tokenizer.model")
    export = folder / "train" / "export"
    config = from_dict(Config, load_json(export / "config.json"))
    model = load_model(export, config).eval()
    self_conditions = config.objective.p_self_condition > 0
    baselines = {kind: train.load(kind, config, folder / kind) for kind in train.KINDS}

    bound = diffusion_bound(model, held_out.tokens, self_conditions, flags)
    paid = {"diffusion": bound.total.numpy()}
    paid["unigram"] = unigram(seen, held_out.tokens, config.model.vocab_size).numpy()
    for kind, baseline in baselines.items():
        draws = flags.levels if kind == "masked" else 1
        paid[kind] = baseline_nats(baseline, held_out.tokens, draws, flags.seed)
    report: dict[str, Any] = {"rows": len(held_out.tokens)}
    for name, values in paid.items():
        value, error = per_character(values, held_out.characters, held_out.files)
        report |= {name: value, f"{name}_se": error}
    parts = [bound.prior, *bound.levels.unbind(1), bound.reconstruction]
    prior, *levels, reconstruction = (
        per_character(part.numpy(), held_out.characters, held_out.files)[0] for part in parts
    )
    report["bound"] = {"prior": prior, "levels": levels, "reconstruction": reconstruction}
    samplers: dict[str, Sampler] = {"diffusion": diffusion_sampler(model, self_conditions, flags)}
    for kind, baseline in baselines.items():
        samplers[kind] = baseline_sampler(baseline, flags.seed)
    report["parameters"] = {
        "diffusion": train.text_parameters(config),
        **{kind: parameters(baseline) for kind, baseline in baselines.items()},
    }
    report["samples"] = samples(samplers, held_out, tokenizer, flags)
    return report


@torch.no_grad()
def diffusion_bound(
    model: MDM, tokens: NDArray[np.int64], self_conditions: bool, flags: Flags
) -> TextBound:
    """The bound of each row, [R], f64."""
    generator = torch.Generator().manual_seed(flags.seed)
    denoiser, latents = network_denoiser(model, self_conditions), latents_of(model)
    bounds = [
        text_bound(denoiser, latents, part, generator, flags.levels)
        for part in tqdm(torch.from_numpy(tokens).split(BATCH), desc="diffusion", leave=False)
    ]
    return TextBound(*(torch.cat(part).double() for part in zip(*bounds, strict=True)))


@torch.no_grad()
def baseline_nats(
    model: Autoregressive | Masked, tokens: NDArray[np.int64], draws: int, seed: int
) -> NDArray[np.float64]:
    """What a baseline pays for each row, a mean over `draws`, [R]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in tqdm(torch.from_numpy(tokens).split(BATCH), desc="baseline", leave=False):
        every = torch.stack([model.nats(part, generator) for _ in range(draws)])
        parts.append(every.double().mean(0))
    return torch.cat(parts).numpy()


def diffusion_sampler(model: MDM, self_conditions: bool, flags: Flags) -> Sampler:
    """Samples of the diffusion by its own sampler."""
    sampling = Sampling(text_steps=flags.steps, solver="ddpm")

    def sample(prompt: Tensor, length: int) -> Tensor:
        b, given = prompt.shape
        request = Request(
            ABSENT,
            GENERATED,
            torch.arange(b),
            flags.seed,
            length,
            tokens=torch.nn.functional.pad(prompt, (0, length - given), value=PAD),
            prompt=(torch.arange(length) < given).expand(b, -1),
        )
        return denoise(model, request, sampling, self_conditions=self_conditions).tokens

    return sample


def baseline_sampler(model: Autoregressive | Masked, seed: int) -> Sampler:
    """Samples of a baseline, token by token at temperature 1."""
    return lambda prompt, length: model.sample(prompt, length, torch.Generator().manual_seed(seed))


def samples(
    samplers: dict[str, Sampler], held_out: Rows, tokenizer: Tokenizer, flags: Flags
) -> dict[str, Any]:
    """Texts that each model begins, and continuations of the beginnings of held-out rows.

    With each model's, `ended` is the share of its texts that end within a row.
    """
    every = len(held_out.tokens) // flags.samples
    real = torch.from_numpy(held_out.tokens[:: max(every, 1)][: flags.samples])
    prompt = real[:, : flags.prompt]
    start = torch.full((flags.samples, 1), EOS)  # a text begins after the end of another
    begun, continued, ended = {}, {}, {}
    for name, sample in samplers.items():
        new, on = sample(start, ROW)[:, 1:], sample(prompt, ROW)[:, flags.prompt :]
        begun[name], continued[name] = (
            [tokenizer.decode(r) for r in t.tolist()] for t in (new, on)
        )
        ended[name] = float((new == EOS).any(1).float().mean())
    continued["held_out"] = [tokenizer.decode(row) for row in real[:, flags.prompt :].tolist()]
    prompts = [_last_text(row, tokenizer) for row in prompt.tolist()]
    return {"begun": begun, "prompts": prompts, "continued": continued, "ended": ended}


def _last_text(row: list[int], tokenizer: Tokenizer) -> str:
    """The text that goes on after a prompt: what follows its last EOS."""
    start = max((place + 1 for place, token in enumerate(row) if token == EOS), default=0)
    return tokenizer.decode(row[start:])


@job("text_measure", ValueError)
def main() -> None:
    """Write `measure.json` and print the bits per character."""
    flags = parse_cli(Flags, description=__doc__ or "")
    report = run(flags)
    write_json(Path(flags.run) / "measure.json", report)
    for name in ("unigram", "diffusion", *reversed(train.KINDS)):
        print(f"{name}: {report[name]:.4f} +- {report[f'{name}_se']:.4f} bits per character")


if __name__ == "__main__":
    sys.exit(main())
