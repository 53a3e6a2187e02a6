"""Cost of one denoising step by sequence length: Mamba and Transformer with equal parameters.

Each point runs in a process of its own, so that its peak memory can be measured.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.timing import THREADS, Result
from mdm.config import ModelConfig
from mdm.model.decoder import Decoder
from mdm.model.inputs import ImageInput, TextInput

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # image tokens; the text adds a dozen
TEXT = 8
PLOT = Path("runs/bench/decoder_scaling.png")
MAMBA = ModelConfig(
    d_model=256,
    n_layer=8,
    d_state=64,
    chunk_size=128,
    vocab_size=100,
    n_classes=10,
    text_length=TEXT,
)


def sized(config: ModelConfig, length: int) -> ModelConfig:
    """`config` with a grid of `length` image tokens, a power of two."""
    rows = 2 ** (int(math.log2(length)) // 2)
    return dataclasses.replace(config, image_height=rows, image_width=length // rows)


def parameters(config: ModelConfig) -> int:
    """Parameters of the blocks, without the position embeddings, which grow with the image."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).trunk.parameters())


def decoders() -> dict[str, ModelConfig]:
    """Both decoders; the Transformer's MLP is sized to give it as many parameters as Mamba."""
    transformer = dataclasses.replace(MAMBA, decoder="transformer", n_heads=8, n_kv_heads=2)
    return {"mamba": MAMBA, "transformer": transformer}


def resident(field: str) -> int:
    """Resident bytes of this process: `VmRSS` for now, `VmHWM` for its peak."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if field in s)
    return 1024 * int(line.split()[1])


def point(config: ModelConfig, length: int) -> dict[str, float]:
    """Median milliseconds of one step at batch 1, and its peak memory in MiB beyond the weights."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    network = Decoder(sized(config, length)).eval()
    prompt = torch.zeros(1, TEXT, dtype=torch.bool)
    text = TextInput(torch.randn(1, TEXT, config.latent_dim), torch.zeros(1), prompt)
    image = ImageInput(torch.randn(1, length, config.latent_dim), torch.zeros(1, 1))
    step = text, torch.zeros(1, dtype=torch.long), image
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    times: list[float] = []
    with torch.no_grad():
        network(*step)
        peak = resident("VmHWM") - before
        while len(times) < 3 or (sum(times) < 3.0 and len(times) < 30):
            start = time.perf_counter()
            network(*step)
            times.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(times), "mib": peak / 2**20}


def slope(lengths: list[int], values: list[float]) -> float:
    """Exponent of the growth between the first and the last value: 1 linear, 2 quadratic."""
    return math.log(values[-1] / values[0]) / math.log(lengths[-1] / lengths[0])


def crossing(lengths: list[int], ours: list[float], theirs: list[float]) -> float | None:
    """The length beyond which ours is lower, interpolated on logarithmic axes; None if never."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if gaps[-1] >= 0:
        return None
    last_behind = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last_behind is None:
        return float(lengths[0])
    i = last_behind
    share = gaps[i] / (gaps[i] - gaps[i + 1])
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


def plot(points: dict[str, list[dict[str, float]]]) -> None:
    """Latency and memory of both decoders, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("ms", "mib"), ("ms a step", "MiB at the peak"), strict=True):
        for name, series in points.items():
            axis.loglog(LENGTHS, [p[key] for p in series], marker="o", label=name)
        axis.set_xlabel("image tokens")
        axis.set_ylabel(label)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS], rotation=45)
        axis.grid(alpha=0.3)
    axes[0].legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def run() -> Result:
    """Both decoders at every length; `ours` is Mamba at the longest."""
    both = decoders()
    points: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for length in LENGTHS:
        for name in both:
            command = [sys.executable, "-m", "benchmarks.decoder_scaling", name, str(length)]
            output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            points[name].append(json.loads(output.splitlines()[-1]))
    plot(points)
    lengths = list(LENGTHS)
    ms = {name: [p["ms"] for p in series] for name, series in points.items()}
    mib = {name: [p["mib"] for p in series] for name, series in points.items()}
    return Result(
        "decoder_scaling",
        "ms",
        ms["mamba"][-1],
        {"transformer": ms["transformer"][-1]},
        f"one denoising step, batch 1, {LENGTHS[-1]} image tokens, fp32, {THREADS} thread",
        more={
            "parameters": {name: parameters(config) for name, config in both.items()},
            "lengths": lengths,
            "ms_by_length": ms,
            "mib_by_length": mib,
            "slope_from_2048": {
                name: slope(lengths[3:], series[3:]) for name, series in ms.items()
            },
            "crossing_tokens": crossing(lengths, ms["mamba"], ms["transformer"]),
            "crossing_tokens_of_the_paper": 1280,
            "plot": str(PLOT),
        },
    )


if __name__ == "__main__":
    print(json.dumps(point(decoders()[sys.argv[1]], int(sys.argv[2]))))
