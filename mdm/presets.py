"""Named configurations: values only."""

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig, SourceConfig, TrainConfig

# Two CPU cores, about ten minutes: digits, emoji and dialogues at 32 x 32 pixels.
DEMO = Config(
    model=ModelConfig(
        d_model=192,
        n_layer=8,
        d_state=32,
        headdim=64,
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
        p_text_to_image=0.3,
        p_image=0.17,
        p_image_to_text=0.13,
        p_class=0.9,
        p_self_condition=0.1,
    ),
    data=DataConfig(
        sources=(
            SourceConfig("digits", 0.75),
            SourceConfig("emoji", 0.17),
            SourceConfig("dialogues", 0.08),
        ),
        global_batch=64,
        caption_length=10,
        dialogue_length=28,  # with its two pads as long as a caption and a picture
    ),
    train=TrainConfig(
        steps=3600,
        lr=2e-3,
        warmup=100,
        decay="cosine",
        ema=0.998,
        checkpoint_every=500,
        snapshots=5,
        gather="trunk",
        deepspeed="deepspeed_configs/cpu.json",
    ),
    run_dir="runs/demo/train",
    tokenizer="runs/demo/tokenizer/tokenizer.model",
    autoencoder="runs/demo/autoencoder",
    experiment="demo",
)

# 8 x 8 digits with captions, as pixel patches: what `make learn` trains on two CPU cores.
LEARN = Config(
    model=ModelConfig(
        d_model=128,
        n_layer=8,
        d_state=32,
        headdim=32,
        expand=1,
        chunk_size=64,
        dt_min=0.03,
        dt_max=0.5,
        a_min=0.05,
        a_max=1.0,
        vocab_size=96,
        n_classes=10,
        image_height=2,
        image_width=2,
        text_length=10,
        kernel="compiled",
    ),
    objective=ObjectiveConfig(
        p_text_to_image=0.35, p_image=0.15, p_image_to_text=0.15, p_class=0.0, p_self_condition=0.1
    ),
    data=DataConfig(
        root="runs/learn/data/encoded",
        sources=(SourceConfig("digits", 1.0),),
        global_batch=64,
        window=16,
        caption_length=10,
        dialogue_length=10,
    ),
    train=TrainConfig(
        steps=8000,
        lr=2e-3,
        warmup=200,
        decay="cosine",
        ema=0.999,
        checkpoint_every=2000,
        log_every=20,
        gather="trunk",
        deepspeed="deepspeed_configs/cpu.json",
    ),
    run_dir="runs/learn/train",
    tokenizer="runs/learn/data/tokenizer.model",
    experiment="learn",
)

# The paper's decoder: 49 blocks, width 2048, one mixer a scan.
MDM_7B = Config(
    model=ModelConfig(scan_mode="separate", kernel="fused"),
    data=DataConfig(
        root="s3://mdm/encoded",
        sources=(
            SourceConfig("imagenet", 0.4),
            SourceConfig("journeydb", 0.4),
            SourceConfig("ultrachat", 0.2),
        ),
        global_batch=1024,
        caption_length=108,
        dialogue_length=512,
    ),
)

PRESETS: dict[str, Config] = {"demo": DEMO, "learn": LEARN, "mdm_7b": MDM_7B}
