"""`RunConfig`: the sections of a run file, and which keys of different sections exclude one another.

The keys of each section, with defaults and bounds, are in `data`, `model`, `task` and `training` beside this module.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ddpm_lmk.config.data import DataConfig
from ddpm_lmk.config.model import EncoderUNetConfig, Network, UNetConfig
from ddpm_lmk.config.renamed import under_new_names
from ddpm_lmk.config.task import (
    AnyTask,
    ContourCodecConfig,
    DiscCodecConfig,
    EncoderTaskConfig,
    LandmarksConfig,
)
from ddpm_lmk.config.training import (
    EvaluateConfig,
    InitConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from ddpm_lmk.config.values import Section

LONGEST_NAME = 80
TEACHER_SUFFIX = "-teacher"


class RunConfig(Section):
    """Everything about one run."""

    name: str = Field(
        "run", min_length=1, max_length=LONGEST_NAME, pattern=r"^[A-Za-z0-9._+-]+$", description="shown in reports"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="root of all randomness")
    data: DataConfig
    model: Annotated[Network, Field(description="network")] = Field(default_factory=UNetConfig)
    task: Annotated[AnyTask, Field(description="what is learnt")]
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @property
    def is_time_conditioned(self) -> bool:
        """Is the network conditioned on a timestep? Where it is not, layers that only a timestep reaches do not learn."""
        return self.task.is_time_conditioned

    @property
    def teacher(self) -> RunConfig | None:
        """The run whose pseudo-labels this one learns from: one round less. None where it learns from labels alone.

        It is scored on nothing, so that no test image is looked at on the way.
        """
        propagate = self.data.propagate
        if propagate is None:
            return None
        before = propagate.model_copy(update={"rounds": propagate.rounds - 1}) if propagate.rounds > 1 else None
        protect = () if before is None else self.data.protect
        name = self.name[: LONGEST_NAME - len(TEACHER_SUFFIX)] + TEACHER_SUFFIX
        return self.model_copy(
            update={
                "name": name,
                "data": self.data.model_copy(update={"propagate": before, "protect": protect}),
                "train": self.train.model_copy(update={"snapshot_every": None}),
                "evaluate": self.evaluate.model_copy(update={"split": None}),
            }
        )

    @property
    def teachers(self) -> tuple[RunConfig, ...]:
        """The teacher, its own teacher, and so on."""
        teacher = self.teacher
        return () if teacher is None else (teacher, *teacher.teachers)

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        """Settings stored by an earlier version: in a checkpoint, a snapshot, the job of a sweep's worker."""
        return under_new_names(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        self._check_data()
        self._check_training()
        self._check_network()
        return self

    def _check_data(self) -> None:
        needs_validation = {
            "optim.plateau": self.optim.plateau is not None,
            "train.patience": self.train.patience is not None,
            "train.select=best": self.train.select == "best",
        }
        if any(needs_validation.values()) and self.data.validation_split is None:
            raise ValueError(
                f"{', '.join(key for key in needs_validation if needs_validation[key])} needs data.validation_split"
            )
        if self.task.stage == "pretrain":
            # The default is the split of fine-tuning; another one was asked for, and nothing would read it.
            if self.evaluate.split not in (None, "test"):
                raise ValueError(
                    f"evaluate.split={self.evaluate.split} is for task landmarks; pre-training is scored on "
                    "data.validation_split"
                )
            if self.data.shots is not None:
                raise ValueError(
                    "data.shots is for labelled training (task landmarks); pre-training uses every image of data.splits"
                )
        elif self.data.protect and self.data.propagate is None:
            raise ValueError(
                "data.protect is for images without labels; a fine-tuning run without data.propagate trains on one set's "
                "splits"
            )
        self._check_crops()
        self._check_propagation()
        codec = self.task.codec if isinstance(self.task, LandmarksConfig) else None
        if codec is None and self.data.hold_out is not None:
            raise ValueError("data.hold_out keeps labelled shots from training; it is for task landmarks")
        if isinstance(codec, ContourCodecConfig) and codec.temperatures == "fitted" and len(self.data.path) > 1:
            raise ValueError("task.codec.temperatures=fitted is for one labelled set; a mixture goes without: use none")

    def _check_propagation(self) -> None:
        """Pseudo-labels are what two looks agree on, at images that may be like those of one labelled set."""
        if self.data.propagate is None:
            return
        if not isinstance(self.task, LandmarksConfig) or self.task.refine is None:
            raise ValueError(
                "data.propagate takes for labels what two looks at an image agree on; set task.refine (of task "
                "landmarks), or data.propagate=null"
            )
        if len(self.data.path) > 1:
            raise ValueError(
                f"data.propagate is for one labelled set, data.path has {len(self.data.path)}; fine-tune on each by itself"
            )

    def _check_crops(self) -> None:
        """Crops are cut from finer pixels, which nothing else uses."""
        task, fine_size = self.task, self.data.fine_size
        zooms, refines = getattr(task, "zoom", None) is not None, getattr(task, "refine", None) is not None
        if fine_size is None and (zooms or refines):
            raise ValueError(
                f"task.{'zoom' if zooms else 'refine'} cuts crops from finer pixels than the network's; set "
                f"data.fine_size, e.g. {4 * self.data.image_size}, of images packed with that --size"
            )
        if fine_size is not None and not (zooms or refines):
            raise ValueError(
                f"data.fine_size={fine_size} would load pixels that nothing uses; set "
                f"{'task.refine' if task.stage == 'finetune' else 'task.zoom (of task denoise)'}, or fine_size=null"
            )
        if not isinstance(task, LandmarksConfig) or task.refine is None:
            return
        size = task.refine.size or self.data.image_size
        if size % self.model.side_multiple:
            raise ValueError(f"task.refine.size={size} must be a multiple of {self.model.side_multiple}, as image_size")
        for codec in task.codecs:
            if isinstance(codec, ContourCodecConfig) and codec.temperatures == "fitted":
                raise ValueError("temperatures=fitted are those of one look; with task.refine use none")
        if isinstance(codec, DiscCodecConfig) and codec.masks == "warped":
            raise ValueError(
                "masks=warped draws discs on the whole picture and warps them with it, which a crop of task.refine has "
                "not; use masks=drawn, or give task.refine a codec of its own"
            )

    def _check_training(self) -> None:
        """Where something depends on the size of a micro-batch, neither the device nor the number of ranks chooses it."""
        train = self.train
        depends = {
            "train.exactness=exact": train.exactness == "exact",
            f"train.gradient={train.gradient}": train.gradient != "mean",
            "train.epoch_boundary=epoch in pre-training": train.epoch_boundary == "epoch"
            and self.task.stage == "pretrain",
            f"model.kind={self.model.kind}": self.model.kind != "ddpm_unet",
        }
        if train.micro_batch == "auto" and any(depends.values()):
            name = next(name for name, is_so in depends.items() if is_so)
            raise ValueError(f"train.micro_batch=auto would change what {name} computes; give a number, or null")
        if train.gradient != "mean" and train.micro_batch is None:
            raise ValueError(
                f"train.gradient={train.gradient} adds up means of micro-batches; it needs train.micro_batch, a size "
                "that does not depend on the number of processes"
            )
        if train.exactness == "exact" and (train.micro_batch is None or train.compile):
            raise ValueError(
                "train.exactness=exact needs train.micro_batch, a size that does not depend on the number of processes, "
                "and train.compile=false, since kernels are compiled per process"
            )
        if self.optim.kind == "muon" and self.model.kind != "ddpm_unet":
            raise ValueError(f"optim.kind=muon is for model.kind=ddpm_unet, found {self.model.kind}; use adamw")
        if self.model.couples_images and train.exactness == "exact":
            raise ValueError(
                f"model.kind={self.model.kind} normalises over the images of a micro-batch, so bits depend on the number "
                "of processes; use train.exactness=ordered"
            )

    def _check_network(self) -> None:
        model, task = self.model, self.task
        if self.data.image_size % model.side_multiple:
            raise ValueError(
                f"data.image_size={self.data.image_size} must be a multiple of {model.side_multiple} for this "
                f"model.kind={model.kind}, which halves its maps"
            )
        if not model.takes_time and task.is_time_conditioned:
            if isinstance(task, LandmarksConfig):
                raise ValueError(f"model.kind={model.kind} takes no timestep; set task.timestep=null")
            raise ValueError(f"model.kind={model.kind} takes no timestep, which task {task.kind} needs; use ddpm_unet")
        if isinstance(model, EncoderUNetConfig) and model.frozen and self.init.weights is None:
            raise ValueError(
                "model.frozen=true keeps an encoder that nobody has trained; name its file in init.weights"
            )
        if not isinstance(task, EncoderTaskConfig):
            return
        if not isinstance(model, EncoderUNetConfig):
            raise ValueError(f"task {task.kind} learns an encoder, which {model.kind} has not; use encoder_unet")
        if not model.is_of_the_paper or model.frozen:
            raise ValueError(
                f"task {task.kind} trains densenet161, vgg19 or resnext50, found {model.encoder}"
                f"{', frozen' if model.frozen else ''}; fine-tune it with task landmarks"
            )
        if len(task.std) not in (1, model.in_channels):
            raise ValueError(f"task.std has {len(task.std)} numbers for model.in_channels={model.in_channels}")
        batch = self.train.global_batch_size
        if (
            min(self.train.given_micro_batch or batch, batch) < 2
        ):  # BatchNorm of the heads, and a negative to compare with
            raise ValueError(f"task {task.kind} normalises over a micro-batch; wanted at least 2 images in one")
