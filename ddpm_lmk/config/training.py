"""`optim`, `train`, `init`, `evaluate` and `runtime`: how a run learns, where it starts, what is scored, on what machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddpm_lmk.config.values import ADVANCED, Duration, NonNegative, Positive, Section


class EmaConfig(Section):
    """Exponential moving average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.995, description="decay per step (paper: 0.995)")
    warmup: bool = Field(False, description="decay min(decay, (1 + step) / (10 + step)): follows the weights early on")


class ClipConfig(Section):
    """Gradient clipping."""

    kind: Literal["norm", "value"] = Field(
        "norm", description="by global norm, or element by element (paper pre-training: value)"
    )
    limit: Positive = Field(1.0, description="largest norm or absolute value")


class PlateauConfig(Section):
    """Lower the learning rate when the validation score stands still (docs/method.md, section 3)."""

    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="multiplies the learning rate")
    patience: Annotated[int, Field(ge=0)] = Field(
        13, description="evaluations without progress that are tolerated (paper: 13)"
    )
    threshold: NonNegative = Field(1e-4, description="smallest relative progress that counts")


class OptimConfig(Section):
    """AdamW and its schedule; the learning rate is a function of the step."""

    kind: Literal["adamw", "muon", "adam", "sgd"] = Field(
        "adamw",
        description="optimizer (muon: orthogonalised updates, of ddpm_unet; adam: decay is part of the gradient, GU2Net; "
        "sgd: plain, for tests of scale)",
    )
    lr: Positive = Field(1e-4, description="learning rate (paper: 1e-4 pre-training, 1e-5 fine-tuning)")
    head_lr: Positive | None = Field(
        None, description="learning rate of the output layer; null: lr", json_schema_extra=ADVANCED
    )
    freeze: Literal["trunk"] | None = Field(
        None,
        description="weights that stay as they start; trunk: all but the output layer",
        json_schema_extra=ADVANCED,
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW betas"
    )
    eps: Positive = Field(1e-8, description="AdamW epsilon", json_schema_extra=ADVANCED)
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay")
    decay_all: bool = Field(
        True,
        description="decay norms and biases too (paper), or only weights of two and more dimensions",
        json_schema_extra=ADVANCED,
    )
    schedule: Literal["constant", "cosine", "linear", "triangular2"] = Field(
        "constant",
        description="shape of the learning rate after the warm-up (paper: constant; GU2Net: triangular2, see cycle)",
    )
    cycle: Duration | None = Field(
        None,
        description="triangular2: length of a way up and down; each peak is half as high as the one before",
        json_schema_extra=ADVANCED,
    )
    lr_low: NonNegative = Field(
        0.0, description="triangular2: learning rate between the peaks", json_schema_extra=ADVANCED
    )
    warmup: Duration = Field(Duration(0), description="linear warm-up of the learning rate")
    clip: ClipConfig | None = Field(None, description="gradient clipping; null: none")
    plateau: PlateauConfig | None = Field(
        None, description="plateau rule; needs data.validation_split", json_schema_extra=ADVANCED
    )

    @model_validator(mode="after")
    def _cycles_belong_together(self) -> OptimConfig:
        if (self.schedule == "triangular2") != (self.cycle is not None):
            raise ValueError("schedule=triangular2 and cycle go together; set both or neither")
        if self.lr_low and (self.cycle is None or self.lr_low > self.lr):
            raise ValueError(f"lr_low={self.lr_low} is for schedule=triangular2 and must not be above lr={self.lr}")
        return self


class SpikeConfig(Section):
    """Leave out an update whose loss or gradient norm is far above those before it."""

    sigma: Positive = Field(6.0, description="standard deviations above the mean of the window")
    window: Annotated[int, Field(ge=16, le=4096)] = Field(128, description="accepted steps the mean is taken over")
    after: Annotated[int, Field(ge=0)] = Field(
        1000, description="first steps without the rule; a shorter run (few-shot fine-tuning) never meets it"
    )


class TrainConfig(Section):
    """How long, in what batches and precision, and which weights are kept."""

    duration: Duration = Field(Duration(1000), description="length of training: steps, epochs or images")
    global_batch_size: Annotated[int, Field(ge=1)] = Field(
        32, description="images per optimizer step, over all processes (paper: 4 x 8 and 2 x 8)"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="images a device computes at once; null: its whole share of the batch; auto: as many as fit this device",
    )
    epoch_boundary: Literal["straddle", "epoch"] = Field(
        "straddle",
        description="may a batch reach over the end of an epoch (straddle), or is the last of an epoch short (paper)",
    )
    gradient: Literal["mean", "sum", "nominal"] = Field(
        "mean",
        description="mean over the batch; or the sum of micro-batch means (released pre-training code), or that sum "
        "over the number of micro-batches of a full batch, also in a short one (released fine-tuning code)",
        json_schema_extra=ADVANCED,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="autocast type; auto: bf16 on GPUs and CPUs with instructions for it, else fp32; fp16 scales the loss",
    )
    exactness: Literal["exact", "ordered", "none"] = Field(
        "ordered",
        description="same bits at any number of processes (needs micro_batch); bits up to the order of sums; or kernels chosen by speed",
    )
    channels_last: bool = Field(
        True,
        description="lay out weights as maps are (NHWC; those of ddpm_unet are either way)",
        json_schema_extra=ADVANCED,
    )
    weight_standardization: Literal["auto", "step", "pass"] = Field(
        "auto",
        description="standardize 3x3 weights once per optimizer step (equal but for rounding), or in every forward pass; auto: step, with ZeRO pass",
        json_schema_extra=ADVANCED,
    )
    group_norm: Literal["auto", "native", "fused"] = Field(
        "auto",
        description="GroupNorm, scale and shift, SiLU: PyTorch's three operations, or one that keeps less (Triton on CUDA); auto: one on CUDA, unless compiled",
        json_schema_extra=ADVANCED,
    )
    compile: bool | Literal["auto"] = Field(
        False,
        description="torch.compile the model; auto: on CUDA in a run long enough to make up for the minutes it takes",
    )
    cuda_graphs: bool = Field(
        False,
        description="launch the compiled passes as CUDA graphs, for networks so small that launching takes longer than "
        "computing; needs compile=true and one micro-batch per process (off: not measured yet)",
        json_schema_extra=ADVANCED,
    )
    ema: EmaConfig | None = Field(default_factory=EmaConfig, description="moving average of weights; null: none")
    spikes: SpikeConfig | None = Field(
        default_factory=SpikeConfig,
        description="leave out updates of loss spikes; null: take all that are finite",
        json_schema_extra=ADVANCED,
    )
    # Beside what is learnt and not in `runtime`: a sweep starts from snapshots of a stage (`stage:NAME@STEP`).
    snapshot_every: Duration | None = Field(None, description="between snapshots of weights; null: only at the end")
    evaluate_every: Duration | None = Field(
        None, description="between evaluations on data.validation_split; null: only at the end"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="evaluations without improvement before stopping (paper: 27); null: never"
    )
    select: Literal["last", "best"] = Field(
        "last", description="weights that are kept and tested: the last, or the best on validation (paper)"
    )

    @model_validator(mode="after")
    def _graphs_are_compiled(self) -> TrainConfig:
        if self.cuda_graphs and self.compile is not True:  # auto may decide against it
            raise ValueError("cuda_graphs=true records what the compiler makes; set compile=true too")
        return self

    @model_validator(mode="after")
    def _intervals_have_steps(self) -> TrainConfig:
        check_intervals("train", self)
        return self

    @property
    def given_micro_batch(self) -> int | None:
        """The micro-batch, where the run file says one."""
        return None if self.micro_batch == "auto" else self.micro_batch


class RuntimeConfig(Section):
    """Facts of the machine and of this session. None of them changes what is learnt, so a resumed run may change any."""

    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        2, description="decoding threads per process; 0 decodes in the training thread"
    )
    loader: Literal["auto", "torch", "dali"] = Field(
        "auto",
        description="what decodes and warps; auto: torch on the CPU, on a GPU the faster in a second of streaming",
    )
    cache_pixels: Literal["auto", "stream", "ram", "device"] = Field(
        "auto", description="where decoded pixels are kept: nowhere (stream), in memory, or on the device"
    )
    cache_gib: NonNegative = Field(
        64.0, description="copies of remote shards kept on this machine, GiB; under two shuffle windows: read by range"
    )
    cache_dir: str | None = Field(None, description="folder of those copies; null: LMK_CACHE, or ~/.cache/ddpm-lmk")
    log_every: Duration = Field(Duration(10), description="between lines in metrics.jsonl")
    checkpoint_every: Duration = Field(Duration(500), description="between resumable checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(
        3, description="newest checkpoints kept, beside the best and the one resumed from"
    )
    keep_every: Duration | None = Field(
        None, description="checkpoints at multiples of this are kept for good; null: none", json_schema_extra=ADVANCED
    )
    compare_every: Duration = Field(
        Duration(100),
        description="between comparisons of the weights of all processes, a checksum",
        json_schema_extra=ADVANCED,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (),
        description="tools that follow the run beside metrics.jsonl (docs/tracking.md); nothing is sent by default",
        json_schema_extra=ADVANCED,
        exclude_if=lambda value: not value,
    )

    @model_validator(mode="after")
    def _intervals_have_steps(self) -> RuntimeConfig:
        check_intervals("runtime", self)
        return self


class InitConfig(Section):
    """Where the weights come from, decided once (`engine.starting_weights.starting_state`)."""

    weights: str | None = Field(
        None, description="run directory, snapshot directory, hub folder or .safetensors file; null: random"
    )
    use: Literal["ema", "model"] = Field("ema", description="which weights of a snapshot")


class EvaluateConfig(Section):
    """What is scored after training."""

    split: str | None = Field(
        "test",
        description="split a landmark run is scored on at the end; null: none (pre-training: data.validation_split)",
    )
    batch: Annotated[int, Field(ge=1)] = Field(16, description="images per forward pass")
    samples: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="images drawn from the model after pre-training"
    )


def check_intervals(name: str, section: Section) -> None:
    """Raise ValueError where an interval is zero: saving every 0 steps is a division by zero in the loop."""
    for key, value in section:
        if key.endswith("_every") and value is not None and not value.count:
            raise ValueError(f"{name}.{key}={value} is no interval; wanted at least 1 step")
