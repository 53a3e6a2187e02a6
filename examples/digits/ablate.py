"""Ablations of the model and the loss on the task of `examples/digits/learn.py`, over three seeds.

Each variant trains the preset `learn` briefly on one rank; `jobs` variants train at once. Models
differ in how far their conditions already act without guidance, so that the images of each are
those of the weight at which they are nearest to the real ones; captions and pairs have none.
Solvers, numbers of evaluations and the selection of settled tokens are compared on the weights of
`make learn`, if it has run. Run again, it skips the finished variants.
"""

from mdm.launch.job import job

import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.digits import report as learn_report
from examples.digits.ablation_tables import runs_table, selection_table, solver_table
from examples.digits.data import WORDS
from examples.digits.evaluation import Sampling, evaluate
from examples.digits.learn import Setting, load, prepare, training_job
from mdm.config import doc
from mdm.diffusion.sampler import SOLVERS
from mdm.generate import Generator
from mdm.launch.processes import CPU_ENV, supervised
from mdm.report.image_grid import save_sheet
from mdm.utils.command_line import parse_cli
from mdm.utils.files import read_json, read_lines, write_json

VARIANTS = {
    "as shipped": "",
    "image weights of 16": "--objective.eps_image 16 --objective.se_image 1",
    "image weights of 1": "--objective.eps_image 1 --objective.se_image 0.06",
    "score entropy 0": "--objective.se_image 0",
    "score entropy as printed": "--objective.image_candidates latents",
    "target of Theorem 1": "--objective.target theorem1 --objective.eps_image 0 "
    "--objective.image_candidates latents",
    "not silent": "--model.no_silent",
    "no adaLN": "--model.no_adaln",
    "text summary latents": "--model.text_summary latents",
    "text summary tokens": "--model.text_summary tokens",
    "text head of rank 16": "--model.text_head latent",
    "no unigram bias": "--objective.no_unigram_bias",
    "beginnings given": "--objective.p_prefix 0.25",
    "self-conditioning 0": "--objective.p_self_condition 0",
    "self-conditioning 0.5": "--objective.p_self_condition 0.5",
    "latents not detached": "--objective.no_detach_latents --objective.no_normalize_latents",
    "levels logit-normal": "--objective.image_levels logit_normal",
    "levels of EDM": "--objective.image_levels edm",
    "levels shifted by 3": "--objective.image_shift 3",
    "text levels even": "--objective.text_shift 1",
    "text levels learned": "--objective.text_shift 1 --objective.text_warp",
    "weight min-SNR": "--objective.image_weight min_snr",
    "beta 0": "--objective.beta_kl 0",
    "beta 1e-3": "--objective.beta_kl 1e-3",
    "lambda 0.1": "--objective.lambda_se 0.1",
    "lambda 10": "--objective.lambda_se 10",
    "scans 12/1": "--model.scans 12/1",
    "transformer": "--model.decoder transformer --model.n_heads 4 --model.n_kv_heads 2 "
    "--model.d_ff 256",
}
ONE_SEED = (  # a first look: they differ by nothing, or by far more than seeds do
    "image weights of 1",
    "target of Theorem 1",
    "latents not detached",
    "text levels learned",
    "beta 0",
    "beta 1e-3",
    "lambda 0.1",
    "lambda 10",
)
GUIDANCES = (0.0, 0.25, 1.0)
EVALUATIONS = (5, 10, 20, 40)
SELECTIONS = (0.02, 0.1, 0.5)


@dataclass(frozen=True)
class Flags(Sampling):
    """Flags of this job."""

    out: str = doc("runs/learn/ablate", "folder for everything it writes")
    text_guidance: float = doc(0.0, "guidance weight of captions")
    joint_guidance: float = doc(0.0, "guidance weight of images and captions drawn together")
    joint_steps: int = doc(20, "solver steps of images and captions drawn together")
    variants: str = doc("", "names of variants, separated by commas; all by default")
    seeds: int = doc(3, "seeds of each variant")
    train_steps: int = doc(600, "optimizer steps of each variant")
    jobs: int = doc(2, "variants at once")
    weights: str = doc("runs/learn/train/export", "long-trained weights, to compare solvers on")

    def __post_init__(self) -> None:
        if unknown := set(self.names) - set(VARIANTS):
            raise ValueError(
                f"unknown variants {', '.join(sorted(unknown))}; choose of {', '.join(VARIANTS)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The variants to compare."""
        return tuple(self.variants.split(",")) if self.variants else tuple(VARIANTS)


def folder_name(variant: str, seed: int) -> str:
    """The folder of a variant's run with one seed."""
    return f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"


def run_one(flags: Flags, setting: Setting, variant: str, seed: int) -> dict[str, Any]:
    """Train and evaluate a variant with one seed, or read the metrics of an earlier run."""
    folder = Path(flags.out) / folder_name(variant, seed)
    path = folder / "metrics.json"
    if former := read_json(path, {"sheet": dict, "loss": float}):
        return former
    more = f"--train.steps {flags.train_steps} --train.threads 1 {VARIANTS[variant]}"
    command = training_job(setting, folder / "train", seed, more)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        env = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
        process = supervised(command, env=env, stdout=log.fileno(), stderr=subprocess.STDOUT)
        code = process.wait()
    if code:
        raise RuntimeError(
            f"{variant}, seed {seed}: training ended with exit code {code}; see {folder}/log.txt"
        )
    generator = load(folder / "train" / "export", setting)
    # Variants differ by more than one draw of captions and pairs errs, which take the longest.
    metrics, images, _ = evaluate(generator, setting.ruler, flags, draws=1, guidances=GUIDANCES)
    shown = images["drawn"][: len(WORDS)]
    sheet = save_sheet(shown, folder / "images.png", columns=len(shown))
    rows = read_lines(folder / "train" / "metrics.jsonl", {"loss": float})
    losses = [row["loss"] for row in rows]
    last = losses[-max(1, len(losses) // 10) :]
    metrics |= {"loss": statistics.fmean(last), "sheet": vars(sheet)}
    write_json(path, metrics)
    return metrics


def run(flags: Flags, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each seed, by variant; all variants run with a seed before the next seed."""
    runs = [
        (variant, seed)
        for seed in range(flags.seeds)
        for variant in flags.names
        if seed == 0 or variant not in ONE_SEED
    ]
    metrics: dict[str, list[dict[str, Any]]] = {variant: [] for variant in flags.names}
    with ThreadPoolExecutor(flags.jobs) as pool:
        results = pool.map(lambda run: run_one(flags, setting, *run), runs)
        results = tqdm(results, total=len(runs), unit="run")
        for (variant, _), result in zip(runs, results, strict=True):
            metrics[variant].append(result)
    return metrics


def compare(flags: Flags, setting: Setting) -> dict[str, dict[str, Any]]:
    """Metrics of images from captions, generated by the weights of a long training.

    `solvers` are by solver and number of evaluations, `selections` by the threshold in nats below
    which settled tokens are dropped.
    """
    ruler, weights = setting.ruler, Path(flags.weights)

    def measure(generator: Generator, **options: Any) -> dict[str, Any]:
        began = time.perf_counter()
        images = generator.text_to_image(ruler.prompts, guidance=flags.guidance, **options)
        seconds = time.perf_counter() - began
        return ruler.measure(images)[0] | {"seconds": seconds}

    compiled, eager = load(weights, setting), load(weights, setting, compiled=False)
    solvers = {
        solver: {str(n): measure(compiled, steps=n, solver=solver) for n in EVALUATIONS}
        for solver in tqdm(SOLVERS, desc="solvers", unit="solver")
    }
    selections = {
        str(threshold): measure(eager, steps=flags.steps, selection=threshold)
        for threshold in (0.0, *SELECTIONS)
    }
    return {"solvers": solvers, "selections": selections}


@job("learn_ablate", RuntimeError)
def main() -> None:
    """Run the job and print the tables."""
    flags = parse_cli(Flags, description=__doc__ or "")
    torch.set_num_threads(1)
    out = Path(flags.out)
    setting = prepare(out / "data")
    runs = run(flags, setting)
    print(runs_table(runs))
    sheets = {
        variant: seeds[0].pop("sheet") | {"file": f"{folder_name(variant, 0)}/images.png"}
        for variant, seeds in runs.items()
    }
    ablation: dict[str, Any] = {"variants": runs, "sheets": sheets, "flags": vars(flags)}
    if (Path(flags.weights) / "model.safetensors").is_file():
        ablation |= compare(flags, setting)
        tables = solver_table(ablation["solvers"]), selection_table(ablation["selections"])
        print("\n" + "\n\n".join(tables))
    else:
        print(f"{flags.weights} holds no weights: solvers and selection not compared")
    write_json(out / "ablate.json", ablation)
    if report := read_json(out.parent / "report.json"):
        learn_report.write_page(out.parent, report)
        print(f"{out.parent}/report.html")


if __name__ == "__main__":
    sys.exit(main())
