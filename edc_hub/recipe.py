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
    Network,
    Numbered,
    Positive,
    Rate,
    Residual,
    Section,
    Threads,
    Train,
    ViewSettings,
    refuse_twins,
)


class Source(Section):
    """The real image-classification set."""

    path: str = Field("sklearn/digits", description="what load_dataset takes: a Hub id, a folder; or sklearn/digits")
    name: str | None = Field(None, description="configuration of the set")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub set")
    image_column: str | None = Field(None, description="image column; found by its feature when not given")
    label_column: str | None = Field(None, description="label column; found by its feature when not given")
    train_split: str = Field("train", description="split that is condensed")
    test_split: str = Field("test", description="split that accuracies are measured on; never used for a choice")
    streaming: bool = Field(False, description="read the set as a stream; nothing but the rows in use is kept")
    classes: list[str | int] | None = Field(None, description="names or numbers of the classes to keep, in this order")
    size: Positive = Field(16, description="side in pixels of the square images that everything works on")
    resize: Literal["shorter_side_center_crop", "squash"] = Field(
        "shorter_side_center_crop", description="how an image of another size becomes square where no crop is drawn"
    )
    mean: Channels = Field([0.5, 0.5, 0.5], description="per-channel mean that defines the normalised space")
    std: Deviations = Field([0.5, 0.5, 0.5], description="per-channel standard deviation of the normalised space")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="stratified fraction of the training split kept from everything but choices"
    )
    holdout_seed: Count = Field(0, description="seed of that split; the same for every run that is compared")

    @property
    def face(self) -> dict[str, Any]:
        """What a network is told of the images: arguments of `networks.described`."""
        return {"image_size": self.size, "mean": self.mean, "std": self.std}


class Observers(Section):
    """The networks that see the real set. Stages pick from them by name or name@epoch."""

    seed: Count = Field(0, description="seed of their training; not `seed`, so that sets of many seeds share them")
    train: Train = Field(Train(), description="training of every network without weights; a network's train overrides")
    networks: list[Network] = Field([], description="the observers, with unique names")
    check_images: Positive = Field(2000, description="training images an observer's accuracy is measured on")

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

    @model_validator(mode="after")
    def _unique(self):
        refuse_twins(self.networks, "networks", "observers")
        return self


class Moments(Section):
    """Per-class moments of the inputs of the observers' layers over the real set (EDC section 3.2, Eq. 2 and 5)."""

    batch: Positive = Field(64, description="images a forward pass; target reference means the variances of such")
    rows: Positive = Field(4096, description="rows a unit of work")
    augment: Literal["none", "pad_crop", "rrc"] = Field("none", description="crop of each image, seeded by its row")
    pad: Count = Field(4, description="zero padding in pixels for pad_crop")
    crop_area: Area = Field([0.08, 1.0], description="area range of rrc")
    flip: bool = Field(True, description="mirror half of the images, where augment is not none")
    patch: Positive = Field(4, description="side of a tile of the patch moments; 16 at 224 px")
    target: Literal["reference", "exact", "finite"] = Field(
        "reference", description="variance target: within images | plus between images | what IPC images can have"
    )
    bn_target: Literal["running", "pass"] = Field(
        "running", description="global target of BatchNorm layers: their running buffers, or this pass"
    )


class Initialize(Section):
    """What each condensed image starts from."""

    kind: Literal["real", "rded", "kmeans", "noise"] = Field("real", description="how images are chosen or made")
    observers: list[str] | None = Field(
        None, description="scoring networks (rded) or the feature network (kmeans), as in relabel"
    )
    batch: Positive = Field(100, description="images a forward pass")
    variant: Literal["rded", "edc"] = Field("rded", description="RDED's own selector, or the one of EDC's code")
    images_per_class: Positive = Field(300, description="real images a class that are looked at (mipc)")
    crops: Positive = Field(5, description="crops an image (rded); the edc variant draws 1024 a class")
    factor: Positive = Field(1, description="tiles a side: 2 puts 2x2 crops on one image")
    crop_area: Area = Field([0.08, 1.0], description="area range of the scored crops")
    difficulty: Literal["easiest", "medium", "hardest"] = Field(
        "easiest", description="crops (rded) by cross-entropy: lowest first, from the middle outwards, highest first"
    )
    iterations: Positive = Field(50, description="k-means iterations")


class Synthesize(Section):
    """Optimisation of the images, EDC section 3.2."""

    observers: list[str] | None = Field(None, description="networks whose statistics are matched, as in relabel")
    block: Positive = Field(100, description="images optimised and measured together")
    block_order: Literal["class_major", "across_class"] = Field(
        "class_major", description="class_major: all images of a class, then the next; across_class: one of each"
    )
    iterations: Count = Field(2000, description="steps of Adam; 0 publishes the initial images")
    lr: Rate = Field(0.05, description="learning rate, in units of the source's std")
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = Field([0.5, 0.9], description="betas of Adam")
    eps: Above = Field(1e-8, description="eps of Adam")
    crop_area: Area = Field([0.5, 1.0], description="area range of the crop the block shares each step")
    flip: bool = Field(True, description="mirror the block in half of the steps")
    jitter: Count = Field(0, description="largest roll in pixels of the block each step")
    weight: Rate = Field(0.01, description="r: weight of the sum of layer losses against cross-entropy")
    first_layer: Rate = Field(10.0, description="weight of the first matched layer; the others have 1")
    layers: list[Literal["bn", "conv", "patch"]] = Field(
        ["bn", "conv", "patch"], description="inputs of BatchNorm2d, of Conv2d, and tiles of the inputs of Conv2d"
    )
    drop_rate: Decay = Field(0.0, description="share of the Conv2d layers left out at random each step")
    alpha: Fraction = Field(0.5, description="weight of the global form against the class form (Eq. 5)")
    class_scope: Literal["per_class", "mixture", "local"] = Field(
        "mixture", description="class form: each class by itself | the block's mixture | freshly drawn real images"
    )
    local_images: Positive = Field(10, description="real images a class for class_scope local (code: 50,000 in all)")
    ema: Decay = Field(0.8, description="momentum of the running statistic of the block")
    flatness: Flatness = Field(Flatness(), description="flatness regularisation")
    densification: Densification = Field(Densification(), description="data densification")
    tv: Rate = Field(0.0, description="weight of the total variation of the images (SRe2L's code; published as 0)")
    l2: Rate = Field(0.0, description="weight of the mean norm of an image, not squared (SRe2L; published as 0)")
    curriculum: Curriculum = Field(Curriculum(), description="crop curriculum")
    sizes: list[Positive] | None = Field(
        None, description="sides in pixels of the view: the next after each merge, else each round of observers"
    )
    mix: Literal["none", "mixup", "cutmix", "cutout"] = Field(
        "none", description="how a step's view of the block is mixed"
    )
    mix_alpha: Above = Field(1.0, description="parameters of the Beta law of mixup, cutmix")
    pick: Literal["turn", "random", "accuracy"] = Field(
        "turn", description="observers of a step: round-robin | drawn evenly | drawn by their accuracy"
    )
    together: Positive = Field(1, description="distinct observers a step, their losses averaged")
    residual: Residual = Field(Residual(), description="merge with the initial images")


class Relabel(ViewSettings):
    """Soft labels: the observers' mean logits of many views of each published image."""

    observers: list[str] | None = Field(
        None, description="networks whose logits are averaged: name, name@epoch, *@epoch, *@*; null: each at its last"
    )
    epochs: Numbered = Field(1000, description="label epochs: views of each image")
    batch: Positive = Field(50, description="views a forward pass; logits depend on it where observer_mode is batch")
    observer_mode: Literal["running", "batch"] = Field("running", description="statistics that BatchNorm uses")
    codec: Literal["dense", "int8", "top_k", "observers"] = Field(
        "dense",
        description="label columns: float16 | int8, a scale a row | largest logits, the rest by their mean | none",
    )
    top_k: Numbered = Field(10, description="logits that codec top_k keeps of each view")
    budget: Above | None = Field(
        None,
        description="megabytes (10^6) of the soft_labels files, views counted; label epochs are left out to fit it",
    )
    full: bool = Field(
        False, description="all label epochs, dense, as configuration soft_labels_full beside soft_labels"
    )
    controls: bool = Field(True, description="label the initial images and random real images too")
    random_draws: Positive = Field(3, description="draws of random real images")


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
    tag: str | None = Field(None, description="v1.0.0; by the rules when not given: schema, data, card or results")
    observers: str | None = Field(None, description="ORG/NAME: a model repository ORG/NAME-<observer> for each")
    private: bool = Field(False, description="where the repository is made, only its owner sees it")


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

    called: ClassVar[str] = "a recipe"
    name: Name = Field("digits", description="short name of the data set; picks the method's block and names the run")
    method: str = Field("edc", description="a file of recipes/methods, or package.module:function")
    options: Options = Field(Options(), description="of a method that is a function: whatever it reads, options.NAME")
    ipc: Numbered = Field(10, description="images per class")
    seed: Count = Field(0, description="seed of the set")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the networks on an accelerator; moments are always float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")
    threads: Threads | None = Field(None, description="CPU threads a process; cores / local processes when not given")
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
