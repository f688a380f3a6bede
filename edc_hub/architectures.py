"""Networks that no library has as they are needed: ConvNet-D, wide ResNets, MobileNet-V2 by expansion, small forms."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .errors import InputError


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


def mobilenet_v2(num_classes: int, width: float = 1.0, expansion: int = 6, **args: Any) -> nn.Module:
    """torchvision's MobileNet-V2 with a width multiplier and the expansion t of its inverted residuals."""
    stages = [[1, 16, 1, 1], [24, 2, 2], [32, 3, 2], [64, 4, 2], [96, 3, 1], [160, 3, 2], [320, 1, 1]]
    setting = [stage if len(stage) == 4 else [expansion, *stage] for stage in stages]
    return torchvision.models.mobilenet_v2(
        num_classes=num_classes, width_mult=width, inverted_residual_setting=setting, **args
    )


# The four below cut patches or pool five times, so a 3x3 stem is no remedy for small images: each has a `small` form.


def deit_tiny(num_classes: int, image_size: int, small: bool, **args: Any) -> nn.Module:
    """timm's DeiT-Tiny for one image size."""
    form = {"patch_size": 4} if small else {}  # 32 px: 8x8 tokens, 64 px: 16x16, beside 14x14 at 224 px
    return _timm("deit_tiny_patch16_224", num_classes, {"img_size": image_size}, form, args)


def swin_tiny(num_classes: int, image_size: int, small: bool, **args: Any) -> nn.Module:
    """timm's Swin-Tiny for one image size."""
    form = {"patch_size": 2, "window_size": 4} if small else {}  # 32 px: maps of 16, 8, 4, 2, whole windows of 4
    return _timm("swin_tiny_patch4_window7_224", num_classes, {"img_size": image_size}, form, args)


def convnext_tiny(num_classes: int, small: bool, **args: Any) -> nn.Module:
    """timm's ConvNeXt-Tiny."""
    network = _timm("convnext_tiny", num_classes, {"stem_type": "patch"} if small else {}, {}, args)
    if small:  # the stem cuts 2x2 for 4x4, 32 px: maps of 16, 8, 4, 2 (with its patch_size 2 timm halves once more)
        old = network.stem[0]
        network.stem[0] = nn.Conv2d(old.in_channels, old.out_channels, 2, 2)
        nn.init.trunc_normal_(network.stem[0].weight, std=0.02)
        nn.init.zeros_(network.stem[0].bias)
    return network


def _timm(name: str, num_classes: int, fixed: dict[str, Any], form: dict[str, Any], args: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=num_classes, **fixed, **(form | args))


def vgg11_bn(num_classes: int, small: bool, **args: Any) -> nn.Module:
    """torchvision's VGG-11-BN."""
    if not small:
        return torchvision.models.vgg11_bn(num_classes=num_classes, **args)
    if args:
        raise InputError(f"args: the small VGG-11 has none, got {', '.join(args)}; remove them or use stem: standard")
    # the form of CIFAR: 32 px end as 512 numbers, so one linear layer classifies them in place of three of 4096
    body = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    parts = {"features": body, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    network = nn.Sequential(OrderedDict(parts, classifier=nn.Linear(512, num_classes)))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(part.bias)
    nn.init.normal_(network.classifier.weight, 0, 0.01)
    nn.init.zeros_(network.classifier.bias)
    return network
