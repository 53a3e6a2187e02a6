"""What each choice is worth, on the task of `examples/digits/learn.py`: a table over three seeds.

Every variant trains the preset `learn` shortly, on one rank, as many at once as `jobs` says. The
solvers, their evaluations and the selection of settled tokens are compared on the weights that
`make learn` has left, if it has run. Run again, it goes on from the finished variants.
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

from examples.digits import data as learn_data
from examples.digits import report as learn_report
from examples.digits.ablation_tables import runs_table, selection_table, solver_table
from examples.digits.evaluation import evaluate
from examples.digits.learn import Setting, load, prepare
from mdm.config import doc
from mdm.diffusion.sampler import SOLVERS
from mdm.launch.processes import CPU_ENV, supervised
from mdm.report.image_grid import save_sheet
from mdm.utils.command_line import parse_cli
from mdm.utils.files import read_json, read_lines, write_json

VARIANTS = {
    "as shipped": "",
    "score entropy 0": "--objective.se_image 0",
    "score entropy 0.3": "--objective.se_image 0.3",
    "target of Theorem 1": "--objective.target theorem1 --objective.eps_image 0",
    "latents not detached": "--objective.no_detach_latents --objective.no_normalize_latents",
    "beta 0": "--objective.beta_kl 0",
    "beta 1e-3": "--objective.beta_kl 1e-3",
    "lambda 0.1": "--objective.lambda_se 0.1",
    "lambda 10": "--objective.lambda_se 10",
    "scans 12/1": "--model.scans 12/1",
    "transformer": "--model.decoder transformer --model.n_heads 4 --model.n_kv_heads 2 "
    "--model.d_ff 256",
}
ONE_SEED = ("beta 0", "beta 1e-3", "lambda 0.1", "lambda 10")  # weights of Eq. 18, for a look
EVALUATIONS = (5, 10, 20, 40)
SELECTIONS = (0.02, 0.1, 0.5)


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn/ablate", "folder for everything it writes")
    variants: str = doc("", "names of variants, separated by commas; all by default")
    seeds: int = doc(3, "seeds of each variant")
    train_steps: int = doc(1000, "optimizer steps of each variant")
    jobs: int = doc(2, "variants at once")
    guidance: float = doc(0.2, "guidance weight of images")
    joint_guidance: float = doc(1.0, "guidance weight of images and captions drawn together")
    steps: int = doc(20, "solver steps")
    solver: str = doc("dpmpp2m", f"of images: one of {', '.join(SOLVERS)}")
    text_solver: str = doc("ddpm", "of captions, and of images drawn with their captions")
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
    """Where a variant's run with a seed lies."""
    return f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"


def run_one(flags: Flags, setting: Setting, name: str, seed: int) -> dict[str, Any]:
    """Train and judge one variant with one seed, or read what was found before."""
    folder = Path(flags.out) / folder_name(name, seed)
    found = folder / "metrics.json"
    if former := read_json(found, {"sheet": dict, "loss": float}):
        return former
    command = [
        *(sys.executable, "pipelines/pretrain.py", "--preset", "learn"),
        *("--data.root", str(setting.tokenizer.parent / "encoded")),
        *("--tokenizer", str(setting.tokenizer), "--run_dir", str(folder / "train")),
        *("--train.steps", str(flags.train_steps), "--train.threads", "1", "--seed", str(seed)),
        *VARIANTS[name].split(),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        env = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
        process = supervised(command, env=env, stdout=log.fileno(), stderr=subprocess.STDOUT)
        code = process.wait()
    if code:
        raise RuntimeError(f"{name}, seed {seed}: training ended with {code}; see {folder}/log.txt")
    metrics, drawn = evaluate(
        load(folder / "train" / "export", setting),
        setting.ruler,
        guidance=flags.guidance,
        joint_guidance=flags.joint_guidance,
        steps=flags.steps,
        solver=flags.solver,
        text_solver=flags.text_solver,
    )
    shown = drawn.images[: len(learn_data.WORDS)]
    sheet = save_sheet(shown, folder / "images.png", columns=len(shown))
    rows = read_lines(folder / "train" / "metrics.jsonl", {"loss": float})
    losses = [row["loss"] for row in rows]
    last = losses[-max(1, len(losses) // 10) :]
    metrics |= {"loss": statistics.fmean(last), "sheet": vars(sheet)}
    write_json(found, metrics)
    return metrics


def solvers(flags: Flags, setting: Setting) -> dict[str, dict[str, dict[str, Any]]]:
    """Images from captions by every solver, against its evaluations of the network."""
    generator, ruler = load(Path(flags.weights), setting), setting.ruler
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in SOLVERS}
    for name in SOLVERS:
        for n in tqdm(EVALUATIONS, desc=name, unit="count"):
            images = generator.text_to_image(
                ruler.texts, guidance=flags.guidance, steps=n, solver=name
            )
            found[name][str(n)] = ruler.measure(images)[0]
    return found


def selections(flags: Flags, setting: Setting) -> dict[str, dict[str, Any]]:
    """Images from captions with settled tokens frozen and dropped, by threshold in nats."""
    generator, ruler = load(Path(flags.weights), setting, compiled=False), setting.ruler
    found = {}
    for threshold in (0.0, *SELECTIONS):
        began = time.perf_counter()
        images = generator.text_to_image(
            ruler.texts, guidance=flags.guidance, steps=flags.steps, selection=threshold
        )
        seconds = time.perf_counter() - began
        found[str(threshold)] = ruler.measure(images)[0] | {"seconds": seconds}
    return found


def run(flags: Flags, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """All variants and seeds; the seeds of a variant come last, so that the table fills evenly."""
    todo = [
        (name, seed)
        for seed in range(flags.seeds)
        for name in flags.names
        if seed == 0 or name not in ONE_SEED
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in flags.names}
    with ThreadPoolExecutor(flags.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        jobs = [(name, pool.submit(run_one, flags, setting, name, seed)) for name, seed in todo]
        for name, job in jobs:
            found[name].append(job.result())
            bar.update()
    return found


@job("learn_ablate", RuntimeError)
def main() -> int:
    """Run the job and print the table."""
    flags = parse_cli(Flags, description=__doc__ or "")
    torch.set_num_threads(1)
    setting = prepare(Path(flags.out) / "data")
    found = run(flags, setting)
    print(runs_table(found))
    out = Path(flags.out)
    sheets = {
        name: rows[0].pop("sheet") | {"file": f"{folder_name(name, 0)}/images.png"}
        for name, rows in found.items()
    }
    plain: dict[str, Any] = {"variants": found, "sheets": sheets, "flags": vars(flags)}
    if (Path(flags.weights) / "model.safetensors").is_file():
        by_solver, by_threshold = solvers(flags, setting), selections(flags, setting)
        print(f"\n{solver_table(by_solver)}\n\n{selection_table(by_threshold)}")
        plain |= {"solvers": by_solver, "selections": by_threshold}
    else:
        print(f"{flags.weights} holds no weights: solvers and selection not compared")
    write_json(out / "ablate.json", plain)
    learnt = out.parent / "report.json"
    if plain := read_json(learnt):
        learn_report.write_page(out.parent, plain)
        print(f"{out.parent}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
