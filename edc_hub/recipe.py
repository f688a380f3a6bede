"""The sections of a recipe as typed models: every key with its meaning, its default and its range.

A key's help text is its `Field(description=...)`; `--help` prints it. Where a default is a published value the
text names the table. Nothing here imports torch: a wrong recipe is refused within a second.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from .protocol import Evaluation
from .section import (
    Above,
    Area,
    Channels,
    Count,
    Curriculum,
    Decay,
    Densification,
    Deviations,
    Flatness,
    Fraction,
    Name,
    Networks,
    Numbered,
    Positive,
    Rate,
    Residual,
    Section,
    Threads,
    Train,
    ViewSettings,
)


class Source(Section):
    """The real image-classification set."""

    path: str = Field("sklearn/digits", description="what load_dataset takes, a Hub id or a folder; or sklearn/digits")
    name: str | None = Field(None, description="configuration of the set")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub set")
    image_column: str | None = Field(None, description="image column; found by its feature when not given")
    label_column: str | None = Field(None, description="label column; found by its feature when not given")
    train_split: str = Field("train", description="split that is condensed")
    test_split: str = Field("test", description="split that accuracies are measured on; never used for a choice")
    streaming: bool = Field(False, description="read the set as a stream; only the rows in use are kept")
    classes: list[str | int] | None = Field(None, description="names or numbers of the classes to keep, in this order")
    size: Positive = Field(16, description="side in pixels of the square images that everything works on")
    resize: Literal["shorter_side_center_crop", "squash"] = Field(
        "shorter_side_center_crop", description="how an image of another size becomes square where no crop is drawn"
    )
    mean: Channels = Field([0.5, 0.5, 0.5], description="per-channel mean in [0, 1], which networks subtract")
    std: Deviations = Field([0.5, 0.5, 0.5], description="per-channel standard deviation, which networks divide by")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each class of the training split kept apart, to make choices on (--split holdout)"
    )
    holdout_seed: Count = Field(0, description="seed of the hold-out; keep it the same in all runs that are compared")

    @property
    def face(self) -> dict[str, Any]:
        """What a network is told of the images: arguments of `networks.described`."""
        return {"image_size": self.size, "mean": self.mean, "std": self.std}


class Observers(Section):
    """The networks that see the real set. Stages pick from them by name or name@epoch."""

    seed: Count = Field(0, description="seed of their training; not `seed`, so that sets of many seeds share them")
    train: Train = Field(Train(), description="training of every network without weights; a network's train overrides")
    networks: Networks = Field([], description="the observers, with unique names")
    check_images: Positive = Field(2000, description="training images that an observer's accuracy is checked on")

    @model_validator(mode="before")
    @classmethod
    def _share_training(cls, data):
        if not isinstance(data, dict) or not isinstance(data.get("networks"), list):
            return data
        shared = data.get("train", {})
        shared = shared.model_dump() if isinstance(shared, Train) else shared
        networks = []
        for net in data["networks"]:
            if isinstance(net, dict) and isinstance(shared, dict):
                own = net.get("train")
                if isinstance(own, dict) or (own is None and net.get("weights") is None):
                    net = {**net, "train": {**shared, **(own or {})}}
            networks.append(net)
        return {**data, "networks": networks}


class Moments(Section):
    """Per-class moments of the inputs of the observers' layers over the real set (EDC section 3.2, Eq. 2 and 5)."""

    batch: Positive = Field(64, description="images a forward pass; target reference is of batches of this size")
    rows: Positive = Field(4096, description="rows in a unit of work: what a process takes, and loses when stopped")
    augment: Literal["none", "pad_crop", "rrc"] = Field("none", description="crop of each image, seeded by its row")
    pad: Count = Field(4, description="zero padding in pixels for pad_crop")
    crop_area: Area = Field([0.08, 1.0], description="area range of rrc")
    flip: bool = Field(True, description="mirror half of the images, where augment is not none")
    patch: Positive = Field(4, description="side of a tile in the maps of layers: patch; 16 at 224 px")
    target: Literal["reference", "exact", "finite"] = Field(
        "reference",
        description="variance of a class: within images | and between images | as far as IPC images have it",
    )
    bn_target: Literal["running", "pass"] = Field(
        "running", description="global target of BatchNorm layers: their running statistics | what this pass finds"
    )


class Initialize(Section):
    """What each condensed image starts from."""

    kind: Literal["real", "rded", "kmeans", "noise"] = Field("real", description="how images are chosen or made")
    observers: list[str] | None = Field(
        None, description="networks that score crops (rded), or the one with features (kmeans); see relabel.observers"
    )
    batch: Positive = Field(100, description="images a forward pass")
    variant: Literal["rded", "edc"] = Field("rded", description="selection of crops by RDED's code | by EDC's code")
    images_per_class: Positive = Field(
        300, description="real images of each class that are looked at (RDED's mipc); by variant edc at most 256"
    )
    crops: Positive = Field(5, description="crops drawn from an image (rded); variant edc draws 1024 a class")
    factor: Positive = Field(1, description="tiles a side (rded): 2 puts 2x2 crops on one image")
    crop_area: Area = Field([0.08, 1.0], description="area range of the scored crops")
    difficulty: Literal["easiest", "medium", "hardest"] = Field(
        "easiest", description="crops (rded) by cross-entropy: lowest first | from the middle outwards | highest first"
    )
    iterations: Positive = Field(50, description="k-means iterations")


class Synthesize(Section):
    """Optimisation of the images, EDC section 3.2."""

    observers: list[str] | None = Field(None, description="networks to match; see relabel.observers")
    block: Positive = Field(100, description="images optimised together, with statistics taken over all of them")
    block_order: Literal["class_major", "across_class"] = Field(
        "class_major", description="class_major: all images of a class, then the next; across_class: one of each"
    )
    iterations: Count = Field(2000, description="steps of Adam; 0 publishes the initial images")
    lr: Rate = Field(0.05, description="learning rate, in units of the source's std")
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = Field([0.5, 0.9], description="betas of Adam")
    eps: Above = Field(1e-8, description="eps of Adam")
    crop_area: Area = Field([0.5, 1.0], description="area range of the crop a block shares each step; 1: whole image")
    flip: bool = Field(True, description="mirror the block in half of the steps")
    jitter: Count = Field(0, description="largest shift of the block each step, in pixels, wrapped around")
    weight: Rate = Field(0.01, description="weight (r) of the sum of layer losses; cross-entropy has 1")
    first_layer: Rate = Field(10.0, description="weight of the first matched layer; the others have 1")
    layers: list[Literal["bn", "conv", "patch"]] = Field(
        ["bn", "conv", "patch"],
        description="what matches: inputs of BatchNorm2d | of Conv2d | tiles of the inputs of Conv2d",
    )
    drop_rate: Decay = Field(0.0, description="share of the Conv2d layers left out at random each step")
    alpha: Fraction = Field(0.5, description="weight of the global form against the class form (Eq. 5)")
    class_scope: Literal["per_class", "mixture", "local"] = Field(
        "mixture",
        description="class form: each class alone | the block to its classes' mixture | to drawn real images",
    )
    local_images: Positive = Field(10, description="real images a class for class_scope local (code: 50,000 in all)")
    ema: Decay = Field(0.8, description="momentum of the average of a block's statistics over steps")
    flatness: Flatness = Field(Flatness(), description="flatness regularisation")
    densification: Densification = Field(Densification(), description="data densification (G-VBSM)")
    tv: Rate = Field(0.0, description="weight of the total variation of the images (SRe2L's code; published as 0)")
    l2: Rate = Field(0.0, description="weight of the mean norm of an image, not squared (SRe2L; published as 0)")
    curriculum: Curriculum = Field(Curriculum(), description="crops that are large at first (CDA)")
    sizes: list[Positive] | None = Field(
        None, description="sides in pixels of the view: the next after each merge, else each round of observers"
    )
    mix: Literal["none", "mixup", "cutmix", "cutout"] = Field(
        "none", description="how a step's view of the block is mixed"
    )
    mix_alpha: Above = Field(1.0, description="both parameters of the Beta law of the share, for mixup and cutmix")
    pick: Literal["turn", "random", "accuracy"] = Field(
        "turn", description="observers of a step: round-robin | drawn evenly | drawn by their accuracy"
    )
    together: Positive = Field(1, description="distinct observers a step, their losses averaged")
    residual: Residual = Field(Residual(), description="now and then a merge with the initial images")


class Relabel(ViewSettings):
    """Soft labels: the observers' mean logits of many views of each published image."""

    observers: list[str] | None = Field(
        None, description="what labels: name (its last epoch), name@epoch, *@epoch (all networks), *@* (all); null: *"
    )
    epochs: Numbered = Field(1000, description="label epochs: labelled views of each image")
    batch: Positive = Field(50, description="views a forward pass; logits depend on it where observer_mode is batch")
    observer_mode: Literal["running", "batch"] = Field("running", description="BatchNorm's statistics while labelling")
    codec: Literal["dense", "int8", "top_k", "observers"] = Field(
        "dense",
        description="float16 | int8, a scale a row | top_k logits, the rest by their mean | none: observers label",
    )
    top_k: Numbered = Field(10, description="logits that codec top_k keeps of each view")
    budget: Above | None = Field(
        None,
        description="megabytes (10^6) for all files of soft_labels; label epochs are left out until they fit",
    )
    full: bool = Field(
        False, description="also store all label epochs as float16, as the configuration soft_labels_full"
    )
    controls: bool = Field(True, description="make the controls too: initial and random real images")
    random_draws: Positive = Field(3, description="draws of random real images for the controls")


class Images(Section):
    """How images are stored."""

    format: Literal["png", "jpeg", "webp"] = Field("png", description="encoding above 64 px; below it always png")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="quality of jpeg and webp")
    grid: Annotated[int, Field(ge=1, le=4)] = Field(
        1, description="g: an image is a canvas of g x g pictures, each seen at full size (IDC: 2, ImageNet 3)"
    )


class Hub(Section):
    """Publishing the finished set."""

    push: bool = Field(False, description="publish the set once it is finished")
    id: str | None = Field(None, description="ORG/NAME of the data set on the Hub")
    tag: str | None = Field(
        None, description="vMAJOR.MINOR.PATCH; else the next: major for other columns, minor for other rows, or patch"
    )
    observers: str | None = Field(None, description="ORG/NAME: publish each observer as a model ORG/NAME-<observer>")
    private: bool = Field(False, description="make the repository private where it is new")


class Options(Section):
    """Settings that a method with code of its own reads; any names, with plain values or lists of them."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _plain(self):
        for name, value in (self.model_extra or {}).items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, bool | int | float | str | None) for item in items):
                raise ValueError(f"{name}: expected a plain value or a list of them, got {value!r}; write it flat")
        return self


class Recipe(Section):
    """A whole run."""

    owner: ClassVar[str] = "a recipe"
    name: Name = Field("digits", description="names the run folder; picks a method's values, as cifar10; else all")
    method: str = Field("edc", description="one of recipes/methods, or a function package.module:function")
    options: Options = Field(Options(), description="what a method that is a function reads: --options.NAME VALUE")
    ipc: Numbered = Field(10, description="images per class")
    seed: Count = Field(0, description="seed of the set; observers and hold-out have their own")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the networks on an accelerator; moments are always float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")
    threads: Threads | None = Field(None, description="CPU threads a process; cores / processes here when not given")
    checkpoint_seconds: Rate = Field(60.0, description="seconds between the saves inside a long unit of work")
    output_dir: str | None = Field(None, description="run folder; runs/<name>-<method>-ipc<ipc> when not given")
    source: Source = Field(Source(), description="the real set")
    observers: Observers = Field(Observers(), description="the networks that see it")
    moments: Moments = Field(Moments(), description="moments of their layers")
    initialize: Initialize = Field(Initialize(), description="initial images")
    synthesize: Synthesize = Field(Synthesize(), description="optimisation of the images")
    relabel: Relabel = Field(Relabel(), description="soft labels")
    images: Images = Field(Images(), description="encoding of the images")
    evaluation: Evaluation = Field(Evaluation(), description="protocol of the students that edc-hub evaluate trains")
    hub: Hub = Field(Hub(), description="publishing")
