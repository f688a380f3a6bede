"""Every network by name, behind one face: x in [0, 1] to logits.

The networks of the paper are here by plain names; `timm/…`, `torchvision/…` and `transformers/…` reach the others.
Normalisation and the size a network wants belong to the face, so nothing else ever handles them.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .errors import InputError


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


class ConvNet(nn.Module):
    """ConvNet-D of dataset condensation: D x (3x3 convolution, norm, ReLU, 2x2 pooling), then a linear layer.

    `norm` instance is GroupNorm with one channel a group and affine weights, as in every repository of the field.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        depth: int = 3,
        width: int = 128,
        norm: str = "instance",
        pooling: str = "avg",
    ):
        super().__init__()
        norms: dict[str, Callable[[int], list[nn.Module]]] = {
            "instance": lambda side: [nn.GroupNorm(width, width)],
            "batch": lambda side: [nn.BatchNorm2d(width)],
            "group": lambda side: [nn.GroupNorm(4, width)],
            "layer": lambda side: [nn.LayerNorm([width, side, side])],
            "none": lambda side: [],
        }
        pools = {"avg": [nn.AvgPool2d(2)], "max": [nn.MaxPool2d(2)], "none": []}
        if norm not in norms or pooling not in pools:
            raise InputError(
                f"args: norm {norm}, pooling {pooling}; norm is one of {', '.join(norms)}, "
                f"pooling one of {', '.join(pools)}"
            )
        if pooling != "none" and image_size < 2**depth:
            most = image_size.bit_length() - 1
            raise InputError(f"args: depth {depth} pools {image_size}px images away; use depth {most} or less")
        layers: list[nn.Module] = []
        channels, side = 3, image_size
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norms[norm](side), nn.ReLU(), *pools[pooling]]
            channels, side = width, side // 2 if pooling != "none" else side
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet; where the width changes, the shortcut starts from the activation."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(h))))


class WideResNet(nn.Module):
    """WRN-depth-width for small images (Zagoruyko and Komodakis): three groups of (depth - 4) / 6 blocks."""

    def __init__(self, num_classes: int, depth: int = 16, width: int = 2):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"args: depth {depth} is no depth of a wide ResNet; use 10, 16, 22, 28, 40, …")
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks = []
        for group in range(3):
            for index in range((depth - 4) // 6):
                first = index == 0
                stride = 2 if first and group else 1
                blocks.append(
                    WideBlock(channels[group] if first else channels[group + 1], channels[group + 1], stride)
                )
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


def _mobilenet_v2(num_classes: int, width: float = 1.0, expansion: int = 6, **args: Any) -> nn.Module:
    stages = [[1, 16, 1, 1], [24, 2, 2], [32, 3, 2], [64, 4, 2], [96, 3, 1], [160, 3, 2], [320, 1, 1]]
    setting = [stage if len(stage) == 4 else [expansion, *stage] for stage in stages]
    return torchvision.models.mobilenet_v2(
        num_classes=num_classes, width_mult=width, inverted_residual_setting=setting, **args
    )


OURS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "alexnet": torchvision.models.alexnet,
    "densenet121": torchvision.models.densenet121,
    "wrn_16_2": WideResNet,
    "convnet": ConvNet,
}
ONE_STEM = ("wrn_16_2", "convnet")  # made for small images


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

    `image_size` is the side of the images it will see, `input_size` the side it wants (None: any). A ConvNet is made
    for one size, so it always has an `input_size`. Raises InputError for an unknown name, arguments that do not fit,
    a stem that the network has not, or images that it cannot take.
    """
    args = dict(args or {})
    size = input_size or image_size
    with torch.random.fork_rng(devices=[]):  # every library initialises from the global generator
        torch.default_generator.manual_seed(seed)
        module = _construct(arch, classes, args, size)
        stem = _apply_stem(module, arch, stem, size)
    facts = {"arch": arch, "args": args, "stem": stem, "classes": classes, "image_size": image_size}
    facts |= {"mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    network = Network(module, facts | {"input_size": size if arch == "convnet" else input_size})
    _check(network)
    return network


def _construct(arch: str, classes: int, args: dict[str, Any], size: int) -> nn.Module:
    library, _, name = arch.rpartition("/") if not arch.startswith("transformers/") else arch.partition("/")
    try:
        if not library and name in OURS:
            extra = {"image_size": size} if name == "convnet" else {}
            return OURS[name](num_classes=classes, **extra, **args)
        if library == "torchvision" and name in (known := torchvision.models.list_models(torchvision.models)):
            return torchvision.models.get_model(name, weights=None, num_classes=classes, **args)
        if library == "timm":
            import timm

            if timm.is_model(name):
                return timm.create_model(name, pretrained=False, num_classes=classes, **args)
            known = timm.list_models()
        elif library == "transformers":
            return _from_config(name, classes, args)
        elif library != "torchvision":
            known, name, library = list(OURS), arch, ""
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{arch}: {error}") from None
        raise InputError(f"{arch}: args {args} do not fit: {_line(error)}; remove or correct them") from error
    near = [f"{library}/{n}" if library else n for n in difflib.get_close_matches(name, known, 3)]
    near = near or [*OURS, "timm/…", "torchvision/…", "transformers/…"]
    raise InputError(f"arch: no network '{arch}'; did you mean one of: {', '.join(near)}")


def _from_config(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(name, num_labels=classes, **args)
    except OSError as error:
        raise InputError(f"no configuration in '{name}' ({_line(error)}); give a Hub id or a local folder") from error
    return AutoModelForImageClassification.from_config(config)


def small_stem(module: nn.Module) -> bool:
    """Makes the stem right for small images, in place: first convolution 3x3 with stride 1, no max-pool behind it.

    False where there is nothing to change: the first convolution has stride 1 already, or it cuts patches (ViT).
    """
    convs = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    if not convs or convs[0][1].stride[0] == 1 or convs[0][1].kernel_size[0] <= convs[0][1].stride[0]:
        return False
    name, old = convs[0]
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=old.bias is not None)
    if old.kernel_size == (3, 3):
        new.load_state_dict(old.state_dict())
    else:
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(name, new)
    seen = 0
    for name, part in module.named_modules():
        seen += isinstance(part, nn.Conv2d)
        if isinstance(part, nn.MaxPool2d) and seen <= 3:  # a stem has up to three convolutions ("deep stem")
            module.set_submodule(name, nn.Identity())
            break
    return True


def _apply_stem(module: nn.Module, arch: str, stem: str, size: int) -> str:
    """Applies the stem that is asked for and returns the one in use."""
    if arch in ONE_STEM:
        if stem == "standard":
            raise InputError(f"stem: {arch} has one stem, the small one; remove the key")
        return "small"
    if stem == "standard" or (stem == "auto" and size > SMALL):
        return "standard"
    if small_stem(module):
        return "small"
    if stem == "small":
        raise InputError(
            f"stem: {arch} has no strided stem convolution to replace; use stem: standard, and input_size"
        )
    return "standard"


def _check(network: Network) -> None:
    """One grey image through the network, so that a size it cannot take is refused now and not in mid-work."""
    facts, training = network.facts, network.training
    size = facts["input_size"] or facts["image_size"]
    try:
        with torch.no_grad():
            shape = tuple(network.eval()(torch.full((1, 3, size, size), 0.5)).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"{facts['arch']}: cannot take {size}x{size} images ({_line(error)}); give it another input_size"
        ) from error
    finally:
        network.train(training)
    if shape != (1, facts["classes"]):
        raise InputError(f"{facts['arch']}: gives {shape} for one image, not logits; choose a classifier")
    network.classifier  # noqa: B018  raises where there is none


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
