"""Named configurations: values only."""

import dataclasses

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig, SourceConfig, TrainConfig

# Digits, scenes of digits and dialogues at 32 x 32 pixels: what `make demo` trains on CPU cores.
DEMO = Config(
    model=ModelConfig(
        d_model=128,
        n_layer=6,
        d_state=64,
        headdim=32,
        expand=1,  # a wide stream costs little beside the elementwise work of the inner width
        chunk_size=64,
        dt_min=0.03,
        dt_max=0.5,
        a_min=0.05,
        a_max=1.0,
        vocab_size=1000,
        n_classes=10,
        image_height=4,
        image_width=4,
        text_length=28,
        kernel="compiled",
    ),
    objective=ObjectiveConfig(
        p_text_to_image=0.57,  # what is learned last; questions are answered instead
        p_image_to_text=0.28,
        p_image=0.05,
        p_text=0.01,
        p_class=0.9,
        p_self_condition=0.1,
        p_prefix=0.25,  # texts are drawn token by token; with more they are read more slowly
        image_shift=3.0,  # texts shape an image at the upper half of the noise levels
        text_shift=3.0,  # at the lower third every piece of a text is obvious
    ),
    data=DataConfig(
        sources=(
            SourceConfig("digits", 0.12),
            SourceConfig("journeydb", 0.61),
            SourceConfig("coco", 0.1),
            SourceConfig("vqav2", 0.08),
            SourceConfig("llava", 0.04),
            SourceConfig("dialogues", 0.05),
        ),
        global_batch=64,
        caption_length=17,  # the last two exchanges of a dialogue about an image
        dialogue_length=28,
    ),
    train=TrainConfig(
        steps=7000,
        lr=4e-3,
        beta2=0.99,
        warmup=200,
        decay="cosine",
        ema=0.999,
        checkpoint_every=2000,
        snapshots=4,
        gather="trunk",
        deepspeed="deepspeed_configs/cpu_small_model.json",
    ),
    run_dir="runs/demo/train",
    tokenizer="runs/demo/tokenizer/tokenizer.model",
    autoencoder="runs/demo/autoencoder",
    experiment="demo",
)

# 8 x 8 digits with captions, as pixel patches: what `make learn` trains on two CPU cores.
LEARN = Config(
    model=dataclasses.replace(
        DEMO.model,
        n_layer=8,
        d_state=32,
        vocab_size=96,
        image_height=2,
        image_width=2,
        text_length=10,
    ),
    objective=ObjectiveConfig(
        p_text_to_image=0.3,
        p_image_to_text=0.25,
        p_image=0.1,
        p_class=0.0,
        condition_noise=0.2,
        p_self_condition=0.1,
        text_shift=3.0,
        eps_image=4.0,  # more would leave even training images partly misread
        se_image=0.25,
    ),
    data=DataConfig(
        root="runs/learn/data/encoded",
        sources=(SourceConfig("digits", 1.0),),
        global_batch=64,
        shuffle_window=16,
        caption_length=10,
        dialogue_length=10,
    ),
    train=dataclasses.replace(
        DEMO.train,
        steps=9000,
        lr=2e-3,
        beta2=0.95,
        warmup=200,
        ema=0.999,
        checkpoint_every=2000,
        snapshots=0,
        log_every=20,
    ),
    run_dir="runs/learn/train",
    tokenizer="runs/learn/data/tokenizer.model",
    experiment="learn",
)

# Scenes of coloured digits with captions, questions and dialogues: what `make learn-scenes` trains
# on two CPU cores.
SCENES = Config(
    model=dataclasses.replace(DEMO.model, n_layer=8, text_length=17),
    objective=dataclasses.replace(
        DEMO.objective,
        p_text_to_image=0.55,
        p_image_to_text=0.3,
        p_class=0.0,
        eps_image=8.0,
        se_image=0.5,
    ),
    data=DataConfig(
        root="runs/learn-scenes/encoded",
        sources=(
            SourceConfig("journeydb", 0.5),
            SourceConfig("coco", 0.24),
            SourceConfig("vqav2", 0.18),
            SourceConfig("llava", 0.08),
        ),
        global_batch=64,
        caption_length=17,  # the last two exchanges of a dialogue
        dialogue_length=17,
    ),
    train=dataclasses.replace(
        DEMO.train, steps=18_000, warmup=400, ema=0.9995, checkpoint_every=3000, snapshots=0
    ),
    run_dir="runs/learn-scenes/train",
    tokenizer="runs/learn-scenes/tokenizer/tokenizer.model",
    autoencoder="runs/learn-scenes/autoencoder",
    experiment="scenes",
)

# English text alone, in full rows: what `make learn-text` trains on two CPU cores.
LEARN_TEXT = Config(
    model=dataclasses.replace(
        DEMO.model,
        d_model=192,
        n_layer=8,
        d_state=32,
        n_classes=1,
        image_height=1,
        image_width=1,
        text_length=124,  # with the four tokens that frame a text 128, two chunks of the scan
    ),
    objective=ObjectiveConfig(p_self_condition=0.25),
    data=DataConfig(
        root="runs/learn-text/data/encoded",
        sources=(SourceConfig("text", 1.0),),
        global_batch=32,
        shuffle_window=16,
        caption_length=124,
        dialogue_length=124,
    ),
    train=dataclasses.replace(
        DEMO.train,
        steps=2500,
        lr=2e-3,
        beta2=0.95,
        warmup=200,
        ema=0.998,
        checkpoint_every=250,
        snapshots=0,
        log_every=20,
    ),
    run_dir="runs/learn-text/train",
    tokenizer="runs/learn-text/data/tokenizer.model",
    experiment="learn_text",
)

# A label is a weak condition that captions do not replace: it gets a share of its own.
_OBJECTIVE = ObjectiveConfig(
    p_text_to_image=0.3, p_image_to_text=0.15, p_image=0.35, p_class=0.9, p_prefix=0.25
)

# At 1e-4 the first steps of Adam would move a branch's weights by a tenth each.
_WARMUP = 5000

# Sources and texts of all presets beyond the demo. Captions have the paper's 512 tokens at most;
# rows as long as the longest of them and its image hold two others, of 250 tokens together.
_DATA = DataConfig(
    root="s3://mdm/encoded",
    sources=(
        SourceConfig("imagenet", 0.4),
        SourceConfig("journeydb", 0.4),
        SourceConfig("ultrachat", 0.2),
    ),
    global_batch=512,
    caption_length=512,
    dialogue_length=512,
    images_per_row=2,
)

# The paper's parameters: 49 blocks of width 2048 with a mixer for each of six scans.
MDM_7B = Config(
    model=ModelConfig(scan_mode="separate", kernel="fused"),
    objective=_OBJECTIVE,
    data=_DATA,
    train=TrainConfig(
        warmup=_WARMUP,
        activation_checkpointing=True,
        deepspeed="deepspeed_configs/zero3_multinode.json",
    ),
)

# The paper's GFLOPs: the same 49 blocks with one mixer each, scans in turn, and long skips.
MDM_1B = Config(
    model=ModelConfig(scan_mode="alternate", long_skip=True, kernel="fused"),
    objective=_OBJECTIVE,
    data=_DATA,
    train=TrainConfig(warmup=_WARMUP),
)

# One GPU of 24 GB or more: 0.19 B parameters, weights and averages whole on it.
DEV_1GPU = Config(
    model=ModelConfig(d_model=1024, n_layer=24, long_skip=True, kernel="fused"),
    objective=_OBJECTIVE,
    data=dataclasses.replace(_DATA, global_batch=32, dialogue_length=256),
    train=TrainConfig(
        steps=200_000,
        lr=3e-4,
        warmup=2000,
        activation_checkpointing=True,
        deepspeed="deepspeed_configs/zero2.json",
    ),
)

PRESETS: dict[str, Config] = {
    "demo": DEMO,
    "learn": LEARN,
    "scenes": SCENES,
    "learn_text": LEARN_TEXT,
    "dev_1gpu": DEV_1GPU,
    "mdm_1b": MDM_1B,
    "mdm_7b": MDM_7B,
}
