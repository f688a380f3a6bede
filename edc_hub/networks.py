"""Every network by name, behind one face: x in [0, 1] to logits.

The networks of the paper are here by plain names; `timm/…`, `torchvision/…` and `transformers/…` reach the others.
Normalisation and the size a network wants belong to the face, so nothing else ever handles them.
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .architectures import ConvNet, WideResNet, convnext_tiny, deit_tiny, mobilenet_v2, swin_tiny, vgg11_bn
from .errors import InputError, first_line


if TYPE_CHECKING:
    from .protocol import Student
    from .section import Network as Section


SMALL = 64  # pixels; up to here stem: auto is the small one


class Network(nn.Module):
    """Any classifier as `logits = network(x)`, x float (B, 3, s, s) in [0, 1].

    `module` is the network itself (what hooks and `state_dict` are for), `facts` says how it was built: arch, args,
    stem (the one in use), mean, std, input_size, image_size, classes. Nothing in `module` works in place, so a hook
    may keep the tensors it sees.
    """

    def __init__(self, module: nn.Module, facts: dict[str, Any]):
        super().__init__()
        self.module, self.facts = module, facts
        for part in module.modules():
            if hasattr(part, "inplace"):
                part.inplace = False
        self.register_buffer("mean", torch.tensor(facts["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(facts["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, s, s) in [0, 1]; resized first where the network wants another size."""
        size = self.facts["input_size"]
        if size is not None and x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        out = self.module((x - self.mean) / self.std)
        return getattr(out, "logits", out)  # transformers, Inception and GoogLeNet in training return a record

    def features(self, x: Tensor) -> Tensor:
        """The input of the classifier layer, (B, D); a map that a convolution classifies is averaged over space."""
        kept: list[Tensor] = []
        layer = self.module.get_submodule(self.classifier)
        hook = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            self(x)
        finally:
            hook.remove()
        return kept[0].mean((2, 3)) if kept[0].ndim == 4 else kept[0].flatten(1)

    @property
    def classifier(self) -> str:
        """Name in `module` of the layer that gives the logits."""
        classes = self.facts["classes"]
        for kind, width in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
            names = [n for n, m in self.module.named_modules() if isinstance(m, kind) and getattr(m, width) == classes]
            if names:
                return names[-1]
        raise InputError(
            f"arch: {self.facts['arch']} has no layer that gives {classes} classes; choose another network"
        )


_TORCHVISIONS = (
    "resnet18", "resnet50", "resnet101", "efficientnet_b0", "shufflenet_v2_x0_5", "alexnet", "densenet121",
)  # fmt: skip
OURS: dict[str, Callable[..., nn.Module]] = {
    **{name: getattr(torchvision.models, name) for name in _TORCHVISIONS},
    "shufflenet_v2": torchvision.models.shufflenet_v2_x0_5,  # the width of the paper
    "mobilenet_v2": mobilenet_v2,
    "wrn_16_2": WideResNet,
    "convnet": ConvNet,
    "convnet3": lambda **given: ConvNet(depth=3, **given),
    "convnet4": lambda **given: ConvNet(depth=4, **given),
    "vgg11_bn": vgg11_bn,
    "deit_tiny": deit_tiny,
    "swin_tiny": swin_tiny,
    "convnext_tiny": convnext_tiny,
}
ONE_STEM = ("wrn_16_2", "convnet", "convnet3", "convnet4")  # made for small images
TWO_FORMS = ("vgg11_bn", "deit_tiny", "swin_tiny", "convnext_tiny")  # stem: small builds another form of these
ONE_SIZE = ("convnet", "convnet3", "convnet4", "deit_tiny", "swin_tiny")  # made for one image size


def build(
    arch: str,
    classes: int,
    *,
    seed: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    args: dict[str, Any] | None = None,
    stem: str = "auto",
    input_size: int | None = None,
) -> Network:
    """A network with random weights that depend on `seed` alone, float32 on the CPU.

    `image_size` is the side of the images it will see, `input_size` the side it wants (None: any). A ConvNet, DeiT or
    Swin is made for one size, so it always has an `input_size`. Raises InputError for an unknown name, arguments that
    do not fit, a stem that the network has not, or images that it cannot take.
    """
    args = dict(args or {})
    size = input_size or image_size
    with torch.random.fork_rng(devices=[]):  # every library initialises from the global generator
        torch.default_generator.manual_seed(seed)
        small = stem == "small" or (stem == "auto" and size <= SMALL)
        module = _construct(arch, classes, args, size, small)
        stem = _apply_stem(module, arch, stem, small)
    facts = {"arch": arch, "args": args, "stem": stem, "classes": classes, "image_size": image_size}
    facts |= {"mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    network = Network(module, facts | {"input_size": size if arch in ONE_SIZE else input_size})
    check(network, image_size, "give it another input_size")
    return network


def described(given: "Section | Student", classes: int, *, seed: int, **face: Any) -> Network:
    """The network that a recipe describes, as `build` makes it; `face` is image_size, mean and std, the last two where
    it names none of its own."""
    face |= {key: own for key in ("mean", "std") if (own := getattr(given, key, None))}
    own = {"args": given.args, "stem": given.stem, "input_size": given.input_size}
    return build(given.arch, classes, seed=seed, **own, **face)


def _construct(arch: str, classes: int, args: dict[str, Any], size: int, small: bool) -> nn.Module:
    library, _, name = arch.rpartition("/") if not arch.startswith("transformers/") else arch.partition("/")
    try:
        if not library and name in OURS:
            extra = ({"image_size": size} if name in ONE_SIZE else {}) | (
                {"small": small} if name in TWO_FORMS else {}
            )
            return OURS[name](num_classes=classes, **extra, **args)
        if library == "torchvision" and name in (known := torchvision.models.list_models(torchvision.models)):
            return torchvision.models.get_model(name, weights=None, num_classes=classes, **args)
        if library == "timm":
            import timm

            if timm.is_model(name):
                return timm.create_model(name, pretrained=False, num_classes=classes, **args)
            known = timm.list_models()
        elif library == "transformers":
            if name == "timm_wrapper" and "architecture" not in args:  # its default is a ResNet-50
                raise InputError("names no network of timm; write e.g. args: {architecture: resnet18}")
            return transformers().AutoModelForImageClassification.from_config(_config(name, classes, args))
        elif library != "torchvision":
            known, name, library = list(OURS), arch, ""
    except InputError as error:
        raise InputError(f"{arch}: {error}") from None
    except Exception as error:  # each library says in its own way that arguments are wrong
        raise InputError(f"{arch}: args {args} do not fit: {first_line(error)}; remove or correct them") from error
    near = [f"{library}/{n}" if library else n for n in difflib.get_close_matches(name, known, 3)]
    near = near or [*OURS, "timm/…", "torchvision/…", "transformers/…"]
    raise InputError(f"arch: no network '{arch}'; did you mean one of: {', '.join(near)}")


@cache
def transformers() -> ModuleType:
    """The library, as quiet as `datasets` is. Importing it takes a second, and few networks are its."""
    import datasets
    import transformers as library

    library.utils.logging.set_verbosity(datasets.utils.logging.get_verbosity())
    library.utils.logging.disable_progress_bar()
    return library


def _config(name: str, classes: int, args: dict[str, Any]) -> Any:
    """The configuration of a model type that classifies images (no network), of a local folder or of a Hub id."""
    from huggingface_hub.errors import StrictDataclassError

    configs = transformers().AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as TYPES

    try:
        if name in TYPES:
            known = configs.for_model(name)
            if wrong := [key for key in args if not hasattr(known, key)]:  # it would take them without a word
                raise TypeError(f"a {name} has no {', '.join(wrong)}")
            return configs.for_model(name, num_labels=classes, **args)
        return configs.from_pretrained(name, num_labels=classes, **args)
    except OSError as error:
        raise InputError(
            f"no configuration in '{name}' ({first_line(error)}); give a model type, a Hub id or a local folder"
        ) from error
    except StrictDataclassError as error:
        raise TypeError(" ".join(str(error).split())) from error


def small_stem(module: nn.Module) -> bool:
    """Makes the stem right for small images, in place: first convolution 3x3 with stride 1, no max-pool behind it.

    False where there is nothing to change: the first convolution has stride 1 already, or it cuts patches (ViT).
    """
    convs = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    if not convs or convs[0][1].stride[0] == 1 or convs[0][1].kernel_size[0] <= convs[0][1].stride[0]:
        return False
    name, old = convs[0]
    if old.kernel_size == (3, 3):
        old.stride = old.padding = (1, 1)  # in place: it may be of a kind with parameters of its own
    else:
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=old.bias is not None)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        module.set_submodule(name, new)
    seen = 0
    for name, part in module.named_modules():
        seen += isinstance(part, nn.Conv2d)
        if isinstance(part, nn.MaxPool2d) and seen <= 3:  # a stem has up to three convolutions ("deep stem")
            module.set_submodule(name, nn.Identity())
            break
    return True


def _apply_stem(module: nn.Module, arch: str, stem: str, small: bool) -> str:
    """Applies the stem that is asked for and returns the one in use."""
    if arch in ONE_STEM:
        if stem == "standard":
            raise InputError(f"stem: {arch} has one stem, the small one; remove the key")
        return "small"
    if not small:
        return "standard"
    if arch in TWO_FORMS or small_stem(module):
        return "small"
    if stem == "small":
        raise InputError(
            f"stem: {arch} has no strided stem convolution to replace; use stem: standard, and input_size"
        )
    return "standard"


def check(network: Network, size: int, remedy: str) -> None:
    """One grey image of `size` pixels a side through the network, so that a size it cannot take is refused now and not
    in mid-work. Raises InputError, which ends with `remedy`."""
    facts, training = network.facts, network.training
    size = facts["input_size"] or size
    try:
        with torch.no_grad():
            shape = tuple(network.eval()(network.mean.new_full((1, 3, size, size), 0.5)).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"{facts['arch']}: cannot take {size}x{size} images ({first_line(error)}); {remedy}"
        ) from error
    finally:
        network.train(training)
    if shape != (1, facts["classes"]):
        raise InputError(f"{facts['arch']}: gives {shape} for one image, not logits; choose a classifier")
    network.classifier  # noqa: B018  raises where there is none


def identity(arch: str) -> str:
    """The name, with a digest of the configuration where the name leads to one that may change."""
    if not arch.startswith("transformers/"):
        return arch
    text = _config(arch.partition("/")[2], 2, {}).to_json_string()
    return f"transformers/{hashlib.sha256(text.encode()).hexdigest()}"
