"""Typed configuration: frozen dataclasses with cross-field checks, to and from JSON."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from mdm.utils.fields import DECAY, NOT_NEGATIVE, POSITIVE, SHARE, check, check_fields, one_of
from mdm.utils.fields import doc as doc

PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the diffusion decoder (Appendix C) and of the sequence it reads."""

    d_model: int = doc(2048, "width of the residual stream", POSITIVE)
    n_layer: int = doc(49, "number of blocks", POSITIVE)
    decoder: str = doc(
        "mamba", "Mamba-2 blocks, or attention as in MonoFormer", one_of("mamba", "transformer")
    )
    long_skip: bool = doc(False, "add block i's output to block n_layer - 1 - i, as in U-ViT")
    d_state: int = doc(128, "state size of the scan, per head channel", POSITIVE)
    headdim: int = doc(64, "channels of one head", POSITIVE)
    expand: int = doc(2, "inner width of a mixer as a multiple of d_model", POSITIVE)
    d_conv: int = doc(4, "taps of the causal convolution before the scan", POSITIVE)
    dt_min: float = doc(1e-3, "smallest initial step size (log-uniform)")
    dt_max: float = doc(1e-1, "largest initial step size")
    a_min: float = doc(1.0, "smallest initial decay rate (uniform)")
    a_max: float = doc(16.0, "largest initial decay rate")
    chunk_size: int = doc(256, "tokens that the scan handles as one matrix product", POSITIVE)
    scan_mode: str = doc(
        "alternate",
        "one mixer per block, which the scans take in turn, or one per scan",
        one_of("alternate", "separate"),
    )
    scans: str = doc("1234/12", "image scans / text scans", one_of("1234/12", "12/1"))
    discretization: str = doc("zoh", "Eq. 13, or as in mamba_ssm", one_of("zoh", "euler"))
    n_heads: int = doc(32, "query heads of the transformer", POSITIVE)
    n_kv_heads: int = doc(4, "key and value heads, shared by the query heads", POSITIVE)
    d_ff: int = doc(0, "inner width of its MLP; 0: as large as a Mamba-2 block", NOT_NEGATIVE)
    kernel: str = doc(
        "torch", "compiled: torch.compile; fused: CUDA", one_of("torch", "compiled", "fused")
    )
    adaln: bool = doc(
        True, "noise levels and labels also scale, shift and gate every block (adaLN-single)"
    )
    silent: bool = doc(True, "what is dropped adds nothing to the sequence")
    text_summary: str = doc(
        "none",
        "what is added to every patch: the maximum over the text's tokens, before their positions "
        "and levels are added or after it",
        one_of("latents", "tokens", "none"),
    )
    text_head: str = doc(
        "full",
        "text scores from <h, mu_v>, of rank latent_dim; full: plus weights of each piece",
        one_of("latent", "full"),
    )
    eq17_logits: bool = doc(False, "add g(t) x Eq. 17 (App.) to text scores; g is learned")
    latent_dim: int = doc(16, "width of one token's latent, both modalities", POSITIVE)
    vocab_size: int = doc(32_000, "pieces of the tokenizer", POSITIVE)
    n_classes: int = doc(1000, "class labels; one more embedding means 'no class'", POSITIVE)
    image_height: int = doc(16, "rows of image tokens", POSITIVE)
    image_width: int = doc(16, "columns of image tokens", POSITIVE)
    text_length: int = doc(512, "longest text in tokens", POSITIVE)

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        for name in ("dt", "a"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            pair = f"model.{name}_min {low} and model.{name}_max {high}"
            check(0 < low <= high, f"{pair} must be positive and in this order")
        inner = self.expand * self.d_model
        check(
            inner % self.headdim == 0,
            f"model.headdim {self.headdim} does not divide expand x d_model = {inner}",
        )
        for part, whole in (("n_heads", "d_model"), ("n_kv_heads", "n_heads")):
            low, high = getattr(self, part), getattr(self, whole)
            check(
                self.decoder == "mamba" or high % low == 0,
                f"model.{part} {low} does not divide model.{whole} {high}",
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the loss (Eq. 18) and how noise levels are drawn."""

    target: str = doc(
        "one_hot",
        "target of the score entropy: the true z_0, or Theorem 1, which ignores context",
        one_of("one_hot", "theorem1"),
    )
    lambda_se: float = doc(1.0, "weight of the score entropy, lambda of Eq. 18", NOT_NEGATIVE)
    eps_image: float = doc(
        16.0,
        "weight of the image's noise prediction, a mean over a token's numbers; latent_dim: their "
        "sum, in nats for each token as for text",
        NOT_NEGATIVE,
    )
    se_image: float = doc(1.0, "weight of the image's score entropy", NOT_NEGATIVE)
    beta_kl: float = doc(1e-5, "weight of the KL term, beta of Eq. 18", NOT_NEGATIVE)
    image_candidates: str = doc(
        "noises",
        "of the image's score entropy: what a grid of noises makes of each number, less their "
        "density; or latents of the batch and of the trajectory, which bias the prediction",
        one_of("noises", "latents"),
    )
    se_noises: int = doc(32, "candidates of each number, with noises", POSITIVE)
    se_trajectory: int = doc(
        6, "candidates from the token's trajectory, with latents", NOT_NEGATIVE
    )
    se_in_batch: int = doc(32, "candidates from other samples, with latents", NOT_NEGATIVE)
    p_text_to_image: float = doc(0.3, "share of samples with clean text, noised image", SHARE)
    p_image_to_text: float = doc(0.15, "share of samples with clean image, noised text", SHARE)
    answer_prompts: bool = doc(
        True, "questions about an image are answered; false: images are drawn from them too"
    )
    p_image: float = doc(0.2, "share without text: class to image, or unconditional", SHARE)
    p_text: float = doc(0.05, "share without image: unconditional text", SHARE)
    condition_noise: float = doc(0.0, "noise given images up to this share of steps", SHARE)
    p_class: float = doc(0.8, "share of p_image's labelled samples that see their class", SHARE)
    p_self_condition: float = doc(0.25, "share of texts that also see their estimate", SHARE)
    p_prefix: float = doc(
        0.0,
        "share of replies and captions whose beginning is given, of random length, so that they "
        "can be drawn in text_blocks",
        SHARE,
    )
    image_levels: str = doc(
        "uniform",
        "noise levels of images: even in t, t = sigmoid(N(0, 1)), or ln sigma ~ N(-1.2, 1.2^2)",
        one_of("uniform", "logit_normal", "edm"),
    )
    image_shift: float = doc(
        1.0, "s: times t / T of images become s t / (1 + (s - 1) t); above 1: more noise", POSITIVE
    )
    text_shift: float = doc(1.0, "the same of texts", POSITIVE)
    image_weight: str = doc(
        "v",
        "weight of noise errors: 1 / abar, as an error of v; at most 20; or 1 up to an SNR of 5",
        one_of("v", "v_capped", "min_snr"),
    )
    unigram_bias: bool = doc(True, "text scores start at the unigram of the tokenizer's corpus")
    text_warp: bool = doc(False, "draw text noise levels where the loss changes (CDCD)")
    detach_latents: bool = doc(True, "keep the image diffusion loss from the image encoder")
    normalize_latents: bool = doc(True, "normalize image latents by running mean and variance")
    pad_weight: float = doc(0.1, "weight of the padding after the end of a text", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self, "objective.")
        tasks = ("p_text_to_image", "p_image_to_text", "p_image", "p_text")
        total = sum(getattr(self, name) for name in tasks)
        check(
            total <= 1.0,
            f"objective's {', '.join(tasks)} add up to {total:g}; at most 1 (the rest noises both)",
        )
        check(
            not self.text_warp or self.text_shift == 1.0,
            f"objective.text_warp learns where to draw levels; set objective.text_shift 1, not "
            f"{self.text_shift:g}",
        )
        check(
            self.target == "one_hot" or not self.se_image or self.image_candidates == "latents",
            f"objective.target {self.target} compares latents; set objective.image_candidates "
            f"latents, not {self.image_candidates}",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One encoded data set of the mixture: its folder under `data.root` and its share."""

    name: str
    weight: float

    def __post_init__(self) -> None:
        check(
            0 < self.weight < math.inf,
            f"weight of source {self.name!r} is {self.weight}; it must be positive and finite",
        )


def _check_unique(sources: tuple[SourceConfig, ...], where: str) -> None:
    names = [source.name for source in sources]
    check(len(set(names)) == len(names), f"{where} names one twice: {names}")


@dataclass(frozen=True)
class MixtureStageConfig:
    """A mixture stage: the mixture from a step on; data sets that it does not name are unused."""

    step: int
    sources: tuple[SourceConfig, ...]

    def __post_init__(self) -> None:
        check(
            self.step > 0,
            f"a mixture stage begins at step {self.step}; data.sources is the mixture of step 0, "
            "data.mixture_stages begin later",
        )
        check(bool(self.sources), f"the mixture stage from step {self.step} on names no data set")
        _check_unique(self.sources, f"the mixture stage from step {self.step} on")


@dataclass(frozen=True)
class DataConfig:
    """The mixture of encoded data sets."""

    root: str = doc("s3://mdm-demo/encoded", "folder or s3:// prefix of the encoded data sets")
    sources: tuple[SourceConfig, ...] = doc((), "name:weight, separated by commas")
    global_batch: int = doc(64, "samples per step over all ranks; packed: rows", POSITIVE)
    shuffle_window: int = doc(4, "record batches shuffled together", POSITIVE)
    caption_length: int = doc(16, "longest text in tokens beside an image", POSITIVE)
    dialogue_length: int = doc(48, "text tokens of a text-only sample or packed row", POSITIVE)
    images_per_row: int = doc(1, "samples with an image per row; above 1 they are packed", POSITIVE)
    texts_per_row: int = doc(1, "text-only samples per row; above 1 they are packed", POSITIVE)
    mixture_stages: tuple[MixtureStageConfig, ...] = doc(
        (), "other mixtures from later steps on: step=name:weight,name:weight;step=..."
    )
    cache_dir: str = doc("", "local folder that caches S3 objects, shared by a node's ranks")
    cache_gb: float = doc(50.0, "largest size of cache_dir, in GB of 10^9 bytes", POSITIVE)

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        _check_unique(self.sources, "data.sources")
        steps = [stage.step for stage in self.mixture_stages]
        check(
            all(a < b for a, b in itertools.pairwise(steps)),
            f"data.mixture_stages begin at steps {steps}; they must increase",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The run. Batch, clipping and rate are owned here, not by the DeepSpeed JSON."""

    steps: int = doc(500_000, "optimizer steps", POSITIVE)
    lr: float = doc(1e-4, "learning rate of AdamW", POSITIVE)
    warmup: int = doc(0, "steps over which the rate rises to lr", NOT_NEGATIVE)
    decay: str = doc("constant", "cosine falls to a tenth of lr", one_of("constant", "cosine"))
    weight_decay: float = doc(0.0, "decoupled weight decay", NOT_NEGATIVE)
    beta1: float = doc(0.9, "AdamW's first-moment decay", DECAY)
    beta2: float = doc(0.95, "AdamW's second-moment decay", DECAY)
    grad_clip: float = doc(1.0, "largest gradient norm", POSITIVE)
    ema: float = doc(0.9999, "decay of the averaged weights after warm-up", DECAY)
    ema2: float = doc(0.0, "decay of a second average; 0 for none", DECAY)
    checkpoint_every: int = doc(1000, "steps between committed checkpoints", POSITIVE)
    checkpoints: str = doc("", "folder or s3:// prefix of checkpoints; run_dir/checkpoints if none")
    keep: int = doc(2, "newest checkpoints kept", POSITIVE)
    keep_every: int = doc(0, "also keep a checkpoint every so many steps; 0: none", NOT_NEGATIVE)
    keep_best: bool = doc(False, "also keep the checkpoint with the smallest loss")
    snapshots: int = doc(0, "evenly spaced exports, for image grids over training", NOT_NEGATIVE)
    images: int = doc(
        0,
        "images per kind that rank 0 draws with each snapshot while the others wait",
        NOT_NEGATIVE,
    )
    log_every: int = doc(10, "steps between lines of metrics", POSITIVE)
    gather: str = doc(
        "block", "what ZeRO-3 gathers at once; trunk: all blocks", one_of("block", "trunk")
    )
    activation_checkpointing: bool = doc(False, "recompute a block's activations for its gradient")
    precision: str = doc(
        "auto",
        "of matrix products; auto: bf16 where the hardware has it; a resumed run keeps its own",
        one_of(*PRECISIONS),
    )
    deepspeed: str = doc("deepspeed_configs/zero3.json", "DeepSpeed JSON: ZeRO and offload only")
    threads: int = doc(0, "CPU threads per rank; 0 divides the cores evenly")
    hang_seconds: float = doc(180.0, "a step this long, and ten times the mean, hangs", POSITIVE)
    peak_tflops: float = doc(0.0, "a rank's peak in 1e12 FLOP/s, for MFU; 0: by the GPU's name")

    def __post_init__(self) -> None:
        check_fields(self, "train.")
        check(
            not self.images or self.snapshots > 0,
            f"train.images is {self.images}, to be drawn with every snapshot, but "
            f"train.snapshots is {self.snapshots}",
        )


@dataclass(frozen=True)
class GuardConfig:
    """When a step is skipped, besides one whose loss is not finite, and what follows."""

    sigma: float = doc(
        6.0, "deviations above its mean at which a loss or norm is a spike; 0: never", NOT_NEGATIVE
    )
    window: int = doc(100, "steps of the running mean; the first ones are never spikes")
    skips: int = doc(3, "skipped steps in a window before a rollback", NOT_NEGATIVE)
    suspects: int = doc(1, "steps before the first skipped one, excluded with it", NOT_NEGATIVE)
    rollbacks: int = doc(3, "rollbacks over the same trouble before the run ends", NOT_NEGATIVE)
    replay_boxes: int = doc(3, "skipped steps kept with their weights, to replay", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self, "guard.")
        check(self.window > 1, f"guard.window is {self.window}; it must be at least 2")


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
        check(
            longest <= self.model.text_length,
            f"data asks for texts of {longest} tokens but model.text_length is "
            f"{self.model.text_length}; raise it or shorten the texts",
        )
        others = self.objective.se_image and self.objective.image_candidates == "latents"
        check(
            self.data.images_per_row == 1 or not others,
            f"data.images_per_row {self.data.images_per_row} packs samples, of which ranks hold "
            "different numbers, but objective.image_candidates latents compares them across ranks; "
            "set data.images_per_row 1 or objective.image_candidates noises",
        )
        for name in ("tokenizer", "autoencoder"):
            check(
                not self.train.images or bool(getattr(self, name)),
                f"train.images is {self.train.images}, but --{name} is missing to draw them",
            )


def suggest(word: str, words: Iterable[str]) -> str:
    """What a message adds if one of `words` was meant."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def config_of(flags: Config) -> Config:
    """The run's configuration alone, without the fields that a subclass adds."""
    return Config(**{spec.name: getattr(flags, spec.name) for spec in dataclasses.fields(Config)})
