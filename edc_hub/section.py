"""What the sections of a recipe are built from: the base model, the types of its values, and what several share."""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


T = TypeVar("T")


def _ascending(area: list[float]) -> list[float]:
    low, high = area
    if low > high:
        raise ValueError(f"the smallest area comes first; write [{high:g}, {low:g}]")
    return area


def _countable(value: float) -> float:
    if value > 1e30:
        raise ValueError(f"{value:g} is more than float32 arithmetic can work with; write less")
    return value


def _plain(args: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(args, allow_nan=False)
    except (TypeError, ValueError):  # a date, as YAML reads 2024-01-01; .nan and .inf
        raise ValueError(f"expected plain values, got {args!s:.60}; write finite numbers, dates in quotes") from None
    return args


def _distinct(values: list[T]) -> list[T]:
    if not values or any(values.count(value) > 1 for value in values):
        raise ValueError(f"{values}; give at least one, and each once")
    return values


Positive = Annotated[int, Field(ge=1)]
Batch = Annotated[int, Field(ge=2)]  # of one BatchNorm has no statistics
Numbered = Annotated[int, Field(ge=1, le=32767)]  # counted by an int16 column of the published set
Count = Annotated[int, Field(ge=0)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # torch ends in a crash where there are too many
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0), AfterValidator(_countable)]
Above = Annotated[float, Field(gt=0), AfterValidator(_countable)]  # 0 itself
Decay = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[list[Fraction], Field(min_length=3, max_length=3)]  # of pixels in [0, 1]
Deviations = Annotated[list[Annotated[Above, Field(le=1)]], Field(min_length=3, max_length=3)]
Area = Annotated[
    list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2), AfterValidator(_ascending)
]
Distinct = Annotated[list[T], AfterValidator(_distinct)]
Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]
ARCH = (  # the plain names are those of networks.py, which imports torch
    "alexnet, convnet, convnet3, convnet4, convnext_tiny, deit_tiny, densenet121, efficientnet_b0, mobilenet_v2, "
    "resnet18, resnet50, resnet101, shufflenet_v2, swin_tiny, vgg11_bn, wrn_16_2, timm/…, torchvision/…, "
    "transformers/…"
)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A block of a recipe. Unknown keys and wrong types are errors; instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
    owner: ClassVar[str] = "this command"  # in errors about what it has


class Train(Section):
    """How an observer is trained (SGD with cross-entropy)."""

    epochs: Positive = Field(10, description="epochs of training")
    snapshots: list[Positive] | None = Field(
        None, description="epochs after which the weights are kept, named net@epoch; the last epoch always is"
    )
    batch: Batch = Field(64, description="images a step")
    lr: Rate = Field(0.05, description="learning rate")
    momentum: Decay = Field(0.9, description="momentum of SGD")
    weight_decay: Rate = Field(0.0, description="weight decay")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate over the steps")
    ema: Decay = Field(0.0, description="decay a step of the weight average that is kept; 0: the weights")
    augment: Literal["none", "pad_crop", "rrc"] = Field("pad_crop", description="crop of each training image")
    pad: Count = Field(4, description="zero padding in pixels for pad_crop")
    crop_area: Area = Field([0.08, 1.0], description="area range of rrc (RandomResizedCrop)")
    flip: bool = Field(True, description="mirror half of the images")

    @model_validator(mode="after")
    def _snapshots(self):
        if self.snapshots and max(self.snapshots) > self.epochs:
            raise ValueError(f"snapshots: {max(self.snapshots)} is after the last epoch; raise epochs or drop it")
        return self


class Network(Section):
    """One observer: its architecture and where its weights come from."""

    name: Name = Field(description="unique name; stages refer to it as name or name@epoch")
    arch: str = Field(description=ARCH)
    args: Arguments = Field({}, description="arguments of the architecture (width, depth, norm, …)")
    stem: Literal["auto", "small", "standard"] = Field(
        "auto", description="small: 3x3 stride-1 first convolution, no max-pool; auto: small up to 64 px"
    )
    input_size: Positive | None = Field(None, description="side it takes, in pixels; images are resized to it")
    mean: Channels | None = Field(None, description="normalisation of the network, if not the source's")
    std: Deviations | None = Field(None, description="normalisation of the network, if not the source's")
    weights: str | None = Field(None, description="Hub id, .safetensors or .pth file; trained here when not given")
    train: Train | None = Field(None, description="its training; keys not given are those of observers.train")

    @model_validator(mode="after")
    def _weights_or_training(self):
        if (self.weights is None) == (self.train is None) and self.weights is None:
            raise ValueError(f"{self.name}: give weights, or train it here")
        return self


def _no_twins(networks: list[Network]) -> list[Network]:
    names = [network.name for network in networks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two networks are called '{name}'; give each its own name")
    return networks


Networks = Annotated[list[Network], AfterValidator(_no_twins)]  # stages and files know them by their names


class ViewSettings(Section):
    """How a view of an image is drawn."""

    view_size: Positive | None = Field(None, description="side in pixels of a view; the image size when not given")
    crop_area: Area = Field([0.5, 1.0], description="area range of a view's crop, as shares of the image")
    flip: bool = Field(True, description="mirror half of the views")
    rand_augment: Count = Field(0, description="RandAugment operations a view; 0: none")
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="RandAugment magnitude, of 0 to 30")
    shuffle: Count = Field(0, description="strips across and down that are shuffled first (RDED: its factor); 0: none")
    mix: Literal["none", "cutmix", "mixup"] = Field("cutmix", description="how two views of a batch are mixed")
    mix_alpha: Above = Field(1.0, description="both parameters of the Beta law of lambda, the share of the first view")
    mix_shared: Literal["batch", "sample"] = Field("batch", description="one lambda and box a batch, or each its own")


# Choices of a method inside `synthesize` that have keys of their own


class Flatness(Section):
    """Flatness regularisation, EDC section 3.2, Eq. 7 and Table 4."""

    kind: Literal["none", "logits", "statistics", "sam"] = Field(
        "none", description="off | logits of averaged images (L'_FR) | their statistics (L_FR) | sharpness-aware steps"
    )
    weight: Rate = Field(0.25, description="weight of the term (Table 4); sam has none")
    beta: Decay = Field(0.99, description="decay of the image average (Table 4; 0.999 for some rows of statistics)")
    tau: Above = Field(4.0, description="temperature of the logits (Table 4)")
    direction: Literal["paper", "code"] = Field("paper", description="KL(X || EMA) as printed, or KL(EMA || X)")
    reduction: Literal["batchmean", "mean"] = Field("batchmean", description="sum over classes | their mean")
    rho: Rate = Field(
        0.05,
        description="radius of sam: root mean square over the block, in units of std (Table 4 names none)",
    )


class Densification(Section):
    """Data densification of G-VBSM: the Gram spectrum of a class's images, distilled from a flatter copy of itself."""

    weight: Rate = Field(0.0, description="weight of the term; 0: off")
    tau: Above = Field(4.0, description="temperature of the target spectrum")


class Curriculum(Section):
    """Crop curriculum of CDA: crops are large at first, and their smallest area comes down to `crop_area`."""

    kind: Literal["none", "cosine", "linear", "step"] = Field("none", description="way down; step: at the milestone")
    start: Fraction = Field(1.0, description="smallest area at the first step")
    milestone: Fraction = Field(1.0, description="share of the iterations after which crop_area holds")


class Residual(Section):
    """Residual connection of FADRM: now and then the images are merged with what they started from."""

    every: Count = Field(
        0,
        description="steps between merges, none after the last step; 0: never (FADRM: 500 of 2000)",
    )
    weight: Fraction = Field(0.5, description="weight of the initial image in a merge (FADRM: 0.5)")
