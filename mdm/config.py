"""Typed configuration: frozen dataclasses with cross-field checks, and their way to JSON and back.

Their command line is `mdm.utils.command_line`'s.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

PRECISIONS = ("auto", "bf16", "fp32")


def doc(default: Any, help: str) -> Any:
    """A dataclass field with a default and the sentence that `--help` prints for it."""
    return field(default=default, metadata={"help": help})


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    _check(value in choices, f"{name} is {value!r}; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the diffusion decoder (Appendix C) and of the sequence it reads."""

    d_model: int = doc(2048, "width of the residual stream")
    n_layer: int = doc(49, "number of blocks")
    decoder: str = doc("mamba", "mamba: Mamba-2 blocks; transformer: attention, as in MonoFormer")
    long_skip: bool = doc(False, "block i also hears block n_layer - 1 - i, as in DiM and U-ViT")
    d_state: int = doc(128, "state size of the scan, per head channel")
    headdim: int = doc(64, "channels of one head")
    expand: int = doc(2, "inner width of a mixer as a multiple of d_model")
    d_conv: int = doc(4, "taps of the causal convolution before the scan")
    dt_min: float = doc(1e-3, "smallest step size at the start (log-uniform)")
    dt_max: float = doc(1e-1, "largest step size at the start")
    a_min: float = doc(1.0, "smallest decay rate at the start (uniform)")
    a_max: float = doc(16.0, "largest decay rate at the start")
    chunk_size: int = doc(256, "tokens the scan handles as one matrix product")
    scan_mode: str = doc(
        "alternate", "alternate: one mixer a block, scans take turns; separate: one mixer a scan"
    )
    scans: str = doc("1234/12", "image scans / text scans")
    discretization: str = doc("zoh", "zoh (Eq. 13) or euler (mamba_ssm)")
    n_heads: int = doc(32, "query heads of the transformer")
    n_kv_heads: int = doc(4, "key and value heads of the transformer; query heads share them")
    d_ff: int = doc(0, "inner width of the transformer's MLP; 0: as large as a Mamba-2 block")
    kernel: str = doc("torch", "torch, compiled (torch.compile), or fused (CUDA kernels)")
    eq17_logits: bool = doc(False, "add Eq. 17 to a text token's scores, by a learned g(t) from 0")
    latent_dim: int = doc(16, "numbers in one token's latent, both modalities")
    vocab_size: int = doc(32_000, "pieces of the tokenizer")
    n_classes: int = doc(1000, "class labels; one more embedding stands for 'no class'")
    image_height: int = doc(16, "rows of image tokens")
    image_width: int = doc(16, "columns of image tokens")
    text_length: int = doc(512, "longest text in tokens")

    def __post_init__(self) -> None:
        sizes = (
            *("d_model", "n_layer", "d_state", "headdim", "expand", "d_conv", "chunk_size"),
            *("n_heads", "n_kv_heads", "latent_dim", "vocab_size", "n_classes"),
            *("image_height", "image_width", "text_length"),
        )
        for name in sizes:
            _check(
                getattr(self, name) > 0,
                f"model.{name} is {getattr(self, name)}; it must be positive",
            )
        _one_of("model.decoder", self.decoder, ("mamba", "transformer"))
        _one_of("model.scan_mode", self.scan_mode, ("alternate", "separate"))
        _one_of("model.scans", self.scans, ("1234/12", "12/1"))
        _one_of("model.discretization", self.discretization, ("zoh", "euler"))
        _one_of("model.kernel", self.kernel, ("torch", "compiled", "fused"))
        for low, high in (("dt_min", "dt_max"), ("a_min", "a_max")):
            first, last = getattr(self, low), getattr(self, high)
            _check(
                0 < first <= last,
                f"model.{low} {first} and model.{high} {last} must be positive and in this order",
            )
        inner = self.expand * self.d_model
        _check(
            inner % self.headdim == 0,
            f"model.headdim {self.headdim} does not divide expand x d_model = {inner}",
        )
        if self.decoder == "transformer":
            self._check_heads()

    def _check_heads(self) -> None:
        _check(
            self.d_model % self.n_heads == 0,
            f"model.n_heads {self.n_heads} does not divide model.d_model {self.d_model}",
        )
        _check(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads {self.n_kv_heads} does not divide model.n_heads {self.n_heads}",
        )
        _check(self.d_ff >= 0, f"model.d_ff is {self.d_ff}; it is positive, or 0 to be matched")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the loss (Eq. 18) and how noise levels are drawn."""

    target: str = doc(
        "one_hot", "of the score entropy: one_hot (the true z_0), or theorem1 (hears no context)"
    )
    lambda_se: float = doc(1.0, "weight of the score-entropy terms, lambda of Eq. 18")
    eps_image: float = doc(1.0, "weight of the image's noise prediction beside its score entropy")
    se_image: float = doc(0.1, "weight of the image's score entropy beside its noise prediction")
    beta_kl: float = doc(1e-5, "weight of the KL term, beta of Eq. 18")
    se_trajectory: int = doc(6, "candidates from the token's own noisy trajectory")
    se_in_batch: int = doc(32, "candidates from other tokens of the batch")
    p_text_to_image: float = doc(0.3, "share of samples with clean text, noised image")
    p_image_to_text: float = doc(0.15, "share of samples with clean image, noised text")
    p_image: float = doc(0.2, "share with the text dropped: class to image, and no condition")
    p_text: float = doc(0.05, "share with the image dropped: text without a condition")
    condition_noise: float = doc(
        0.0, "images given for their text are noised up to this share of the steps (Ho 2021)"
    )
    p_class: float = doc(0.8, "share of labelled samples of p_image that see their class")
    p_self_condition: float = doc(0.25, "share of steps that also see their own last estimate")
    text_warp: bool = doc(False, "draw text noise levels where the loss changes (CDCD)")
    detach_latents: bool = doc(True, "keep the image diffusion loss from the image encoder")
    normalize_latents: bool = doc(True, "image latents by their running mean and variance")
    pad_weight: float = doc(0.1, "weight of the padding after the end of a text")

    def __post_init__(self) -> None:
        _one_of("objective.target", self.target, ("one_hot", "theorem1"))
        for name in (
            *("lambda_se", "eps_image", "se_image", "beta_kl", "pad_weight"),
            *("se_trajectory", "se_in_batch"),
        ):
            value = getattr(self, name)
            _check(
                0 <= value < math.inf,
                f"objective.{name} is {value}; it must be finite and not negative",
            )
        tasks = ("p_text_to_image", "p_image_to_text", "p_image", "p_text")
        for name in (*tasks, "p_class", "p_self_condition", "condition_noise"):
            p = getattr(self, name)
            _check(0.0 <= p <= 1.0, f"objective.{name} is {p}; a share lies between 0 and 1")
        total = sum(getattr(self, name) for name in tasks)
        _check(
            total <= 1.0,
            f"objective's {', '.join(tasks)} add up to {total:g}; the rest to 1 noises both",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One encoded data set of the mixture: its folder under `data.root` and its share."""

    name: str
    weight: float

    def __post_init__(self) -> None:
        _check(
            0 < self.weight < math.inf,
            f"weight of source {self.name!r} is {self.weight}; it must be positive and finite",
        )


@dataclass(frozen=True)
class StageConfig:
    """The mixture from a step on; data sets that it does not name rest."""

    step: int
    sources: tuple[SourceConfig, ...]

    def __post_init__(self) -> None:
        _check(
            self.step > 0,
            f"a stage of data.stages begins at step {self.step}; data.sources is the mixture of "
            "step 0, stages begin after",
        )
        _check(bool(self.sources), f"the stage from step {self.step} on names no data set")
        names = [s.name for s in self.sources]
        _check(
            len(set(names)) == len(names),
            f"the stage from step {self.step} on names one twice: {names}",
        )


@dataclass(frozen=True)
class DataConfig:
    """The mixture of encoded data sets."""

    root: str = doc(
        "s3://mdm-demo/encoded", "folder or s3:// prefix that holds one encoded data set a source"
    )
    sources: tuple[SourceConfig, ...] = doc((), "name:weight, separated by commas")
    global_batch: int = doc(64, "samples a step, over all ranks; of packed texts, rows")
    window: int = doc(4, "record batches shuffled together")
    caption_length: int = doc(16, "text tokens beside an image")
    dialogue_length: int = doc(48, "text tokens of a text-only sample, or of a row of packed ones")
    texts_per_row: int = doc(1, "text-only samples a row; above 1 they are packed, unpadded")
    stages: tuple[StageConfig, ...] = doc(
        (), "other mixtures from later steps on: step=name:weight,name:weight;step=..."
    )
    cache_dir: str = doc(
        "", "folder on a local disk that keeps what is read from S3, shared by a node's ranks"
    )
    cache_gb: float = doc(50.0, "largest size of cache_dir, in GB of 10^9 bytes")

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        _check(len(set(names)) == len(names), f"data.sources names one twice: {names}")
        steps = [s.step for s in self.stages]
        _check(
            all(a < b for a, b in itertools.pairwise(steps)),
            f"data.stages begin at steps {steps}; they must go up",
        )
        for name in (
            *("global_batch", "window", "caption_length", "dialogue_length"),
            *("texts_per_row", "cache_gb"),
        ):
            _check(
                getattr(self, name) > 0,
                f"data.{name} is {getattr(self, name)}; it must be positive",
            )


@dataclass(frozen=True)
class TrainConfig:
    """The run. Batch, clipping and rate are owned here, not by the DeepSpeed JSON."""

    steps: int = doc(500_000, "optimizer steps")
    lr: float = doc(1e-4, "learning rate of AdamW")
    warmup: int = doc(0, "steps over which the rate rises to lr")
    decay: str = doc("constant", "constant, or cosine (to a tenth of lr)")
    weight_decay: float = doc(0.0, "decoupled weight decay")
    beta1: float = doc(0.9, "AdamW's first-moment decay")
    beta2: float = doc(0.95, "AdamW's second-moment decay")
    grad_clip: float = doc(1.0, "largest gradient norm")
    ema: float = doc(0.9999, "decay of the averaged weights, once warmed up")
    ema2: float = doc(0.0, "decay of a second average beside it; 0 for none")
    checkpoint_every: int = doc(1000, "steps between committed checkpoints")
    checkpoints: str = doc("", "folder or s3:// prefix of checkpoints; run_dir/checkpoints if none")
    keep: int = doc(2, "newest checkpoints kept")
    keep_every: int = doc(0, "also keep checkpoints of every so many steps; 0 for none")
    keep_best: bool = doc(False, "also keep the checkpoint with the smallest loss")
    snapshots: int = doc(
        0, "evenly spaced exports of the averaged weights, for sample grids over training"
    )
    images: int = doc(
        0,
        "images of each kind that rank 0 draws with every snapshot, on its CPU while the others "
        "wait, for the run's page; 0 for none",
    )
    log_every: int = doc(10, "steps between lines of metrics")
    gather: str = doc("block", "what ZeRO-3 gathers at once: block, or trunk (all blocks)")
    activation_checkpointing: bool = doc(
        False, "keep a block's input alone and compute the block again for its gradient"
    )
    precision: str = doc(
        "auto",
        "of matrix products: bf16, fp32, or auto: bf16 where the hardware computes in it, else "
        "fp32; a resumed run keeps what it began with",
    )
    deepspeed: str = doc("deepspeed_configs/zero3.json", "DeepSpeed JSON: ZeRO and offload only")
    threads: int = doc(0, "CPU threads a rank; 0 shares the cores evenly")
    hang_seconds: float = doc(180.0, "a step that takes so long, and ten times the mean, hangs")
    peak_tflops: float = doc(0.0, "a rank's peak in 1e12 FLOP/s, for MFU; 0: by the GPU's name")

    def __post_init__(self) -> None:
        _one_of("train.decay", self.decay, ("constant", "cosine"))
        _one_of("train.gather", self.gather, ("block", "trunk"))
        _one_of("train.precision", self.precision, PRECISIONS)
        for name in (
            "steps",
            "lr",
            "checkpoint_every",
            "keep",
            "log_every",
            "grad_clip",
            "hang_seconds",
        ):
            _check(
                getattr(self, name) > 0,
                f"train.{name} is {getattr(self, name)}; it must be positive",
            )
        for name in ("warmup", "weight_decay", "keep_every", "snapshots", "images"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name} is {value}; it must not be negative")
        for name in ("ema", "ema2", "beta1", "beta2"):
            value = getattr(self, name)
            _check(0.0 <= value < 1.0, f"train.{name} is {value}; it lies in [0, 1)")
        _check(
            not self.images or self.snapshots > 0,
            f"train.images is {self.images}, to be drawn with every snapshot, but "
            f"train.snapshots is {self.snapshots}",
        )


@dataclass(frozen=True)
class GuardConfig:
    """When a step is not to be trusted, and what follows; a loss that is not finite never is."""

    sigma: float = doc(
        6.0, "deviations above its running mean at which a loss or norm is a spike; 0: never"
    )
    window: int = doc(100, "steps that the running mean looks back; the first ones are no spikes")
    skips: int = doc(3, "skipped steps in a window before the run goes back to a checkpoint")
    suspects: int = doc(1, "steps before the first skipped one whose samples go with theirs")
    rollbacks: int = doc(3, "times a run goes back over the same trouble before it gives up")
    black_boxes: int = doc(3, "skipped steps that are kept with their weights, to be replayed")

    def __post_init__(self) -> None:
        for name in ("sigma", "skips", "suspects", "rollbacks", "black_boxes"):
            value = getattr(self, name)
            _check(value >= 0, f"guard.{name} is {value}; it must not be negative")
        _check(self.window > 1, f"guard.window is {self.window}; it must be at least 2")


@dataclass(frozen=True)
class Config:
    """Everything that determines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    seed: int = doc(0, "the run's only source of randomness, with the sample's id and its epoch")
    run_dir: str = doc("runs/pretrain", "folder of checkpoints, exports and logs")
    tokenizer: str = doc("", "SentencePiece .model file that the data was encoded with")
    autoencoder: str = doc("", "folder of the autoencoder that the data was encoded with")
    experiment: str = doc("mdm", "MLflow experiment")

    def __post_init__(self) -> None:
        longest = max(self.data.caption_length, self.data.dialogue_length)
        _check(
            longest <= self.model.text_length,
            f"data asks for texts of {longest} tokens but model.text_length is "
            f"{self.model.text_length}; raise it or shorten the texts",
        )
        for name in ("tokenizer", "autoencoder"):
            _check(
                not self.train.images or bool(getattr(self, name)),
                f"train.images is {self.train.images}, but --{name} is missing to draw them",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config, as JSON would hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def fingerprint(config: Any) -> str:
    """sha256 over the sorted JSON of a config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The config that `to_dict` wrote; an unknown key raises ValueError with its name."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {where + key!r}{suggest(key, hints)}")
    made: dict[str, Any] = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            made[key] = from_dict(typing.cast(type, kind), value, f"{where}{key}.")
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            nested = dataclasses.is_dataclass(item)
            made[key] = tuple(
                from_dict(typing.cast(type, item), v, f"{where}{key}.") if nested else v
                for v in value
            )
        else:
            made[key] = value
    return cls(**made)


def suggest(word: str, words: Iterable[str]) -> str:
    """What a message adds if one of `words` was meant."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def fields_of(config: Config) -> dict[str, object]:
    """The fields of a run's configuration by name, without those that a subclass adds."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
