import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from edc_hub import architectures, networks
from edc_hub.errors import InputError
from edc_hub.section import ARCH


PLAIN = {"seed": 0, "image_size": 32, "mean": [0.0] * 3, "std": [1.0] * 3}

# 10 classes, small stem. ResNets, WRN and ConvNet as published for CIFAR-10; the others have torchvision's or timm's
# count, less what the small form saves (DenseNet 7x7 -> 3x3, AlexNet 11x11 -> 3x3, VGG without its wide layers; DeiT
# smaller patches and fewer positions, Swin smaller patches and windows, ConvNeXt a 2x2 stem).
SMALL = {
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "mobilenet_v2": 2_236_682,
    "efficientnet_b0": 4_020_358,
    "shufflenet_v2_x0_5": 352_042,
    "alexnet": 57_044_810 - 64 * 3 * (121 - 9),
    "densenet121": 6_964_106 - 64 * 3 * (49 - 9),
    "wrn_16_2": 691_674,
    "convnet": 320_010,
    "convnet3": 320_010,
    "convnet4": 857_160 - 128 * (4 * 4 * 200 - 2 * 2 * 10) - 190,
    "shufflenet_v2": 352_042,
    "vgg11_bn": 132_868_840 - (25_089 * 4096 + 4097 * 4096 + 4097 * 1000) + 5130,
    "deit_tiny": 5_717_416 - 192 * 3 * (256 - 16) - 192 * (196 - 64) - 193 * 990,
    "swin_tiny": 28_288_354 - 96 * 3 * (16 - 4) - 90 * (13**2 - 7**2) - 48 * (13**2 - 3**2) - 769 * 990,
    "convnext_tiny": 28_589_128 - 96 * 3 * (16 - 4) - 769 * 990,
}
TORCHVISION = list(SMALL)[:8]


def test_help_names_every_plain_network():
    assert {name for name in ARCH.split(", ") if "/" not in name} == {*networks.OURS} - {
        "shufflenet_v2_x0_5"
    }  # a twin


def parameters(network):
    return sum(p.numel() for p in network.module.parameters())


@pytest.mark.parametrize("arch", SMALL)
def test_every_student_takes_small_images_has_its_published_size_and_learns_in_all_its_parameters(arch):
    network = networks.build(arch, 10, **PLAIN).eval()
    assert parameters(network) == SMALL[arch]
    assert network.facts["stem"] == "small"
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = network(x), network.features(x)
        layer = network.module.get_submodule(network.classifier)
        assert logits.shape == (2, 10)
        torch.testing.assert_close(F.linear(features, layer.weight, layer.bias), logits, rtol=1e-5, atol=1e-5)
    F.cross_entropy(network.train()(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.module.parameters())


def test_every_plain_name_is_among_the_tested():
    assert set(SMALL) == set(networks.OURS)


@pytest.mark.parametrize("arch", TORCHVISION)
def test_imagenet_networks_have_torchvisions_parameters_and_forward(arch):
    network = networks.build(arch, 1000, **{**PLAIN, "image_size": 96}).eval()
    meta = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].meta
    assert parameters(network) == meta["num_params"]
    assert network.facts["stem"] == "standard"
    if arch in ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"):  # the same weights in torchvision's own network
        other = torchvision.models.get_model(arch, weights=None).eval()
        other.load_state_dict(network.module.state_dict())
        x = torch.rand(1, 3, 96, 96)
        with torch.no_grad():
            assert torch.equal(network(x), other(x))


@pytest.mark.parametrize(
    ("arch", "origin", "count"),
    [
        ("deit_tiny", "deit_tiny_patch16_224", 5_717_416),
        ("swin_tiny", "swin_tiny_patch4_window7_224", 28_288_354),
        ("convnext_tiny", "convnext_tiny", 28_589_128),
    ],
)
def test_transformers_of_the_paper_are_timms_where_images_are_large(arch, origin, count):
    network = networks.build(arch, 1000, **{**PLAIN, "image_size": 224})
    assert parameters(network) == count and network.facts["stem"] == "standard"
    if arch == "deit_tiny":  # the same weights in timm's own network
        other = timm.create_model(origin).eval()
        other.load_state_dict(network.module.state_dict())
        x = torch.rand(1, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(network.eval()(x), other(x))


def test_a_vgg_is_torchvisions_where_images_are_large():
    with torch.device("meta"):  # 132 million weights that nobody needs
        network, other = architectures.vgg11_bn(1000, small=False), torchvision.models.vgg11_bn()
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize(
    ("arch", "size", "maps"),
    [
        ("deit_tiny", 32, {"patch_embed.proj": 8}),
        ("deit_tiny", 64, {"patch_embed.proj": 16}),
        ("swin_tiny", 32, {"patch_embed.proj": 16}),
        ("convnext_tiny", 32, {"stages.0": 16, "stages.1": 8, "stages.2": 4, "stages.3": 2}),
        ("vgg11_bn", 32, {"features.0": 32, "features": 1}),
        ("shufflenet_v2", 32, {"conv1": 32}),
        ("efficientnet_b0", 32, {"features.0": 32}),
    ],
)
def test_small_forms_leave_small_images_room(arch, size, maps):
    network, seen = networks.build(arch, 10, **{**PLAIN, "image_size": size}).eval(), {}
    for name in maps:
        part = network.module.get_submodule(name)
        part.register_forward_hook(lambda _, x, out, name=name: seen.update({name: out.shape[-1]}))
    with torch.no_grad():
        network(torch.rand(1, 3, size, size))
    assert seen == maps


def test_networks_made_for_one_size_resize_others():
    network = networks.build("deit_tiny", 10, **PLAIN).eval()
    assert network.facts["input_size"] == 32 and network(torch.rand(1, 3, 48, 48)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "classes", "args", "size", "count"),
    [
        ("convnet", 100, {}, 32, 504_420),
        ("convnet", 200, {"depth": 4}, 64, 857_160),
        ("convnet4", 200, {}, 64, 857_160),
        ("convnet3", 10, {"width": 32, "norm": "group", "pooling": "max"}, 32, 24_714),
        ("convnet", 10, {"norm": "none"}, 32, 320_010 - 3 * 256),
        ("convnet", 10, {"width": 32, "norm": "group", "pooling": "max"}, 32, 24_714),
        ("convnet", 10, {"depth": 1, "width": 8, "norm": "layer"}, 16, 224 + 2 * 8 * 256 + 5130),
        ("convnet", 10, {"depth": 1, "width": 8, "norm": "batch", "pooling": "none"}, 16, 224 + 16 + 20490),
        ("wrn_16_2", 100, {}, 32, 703_284),
        ("mobilenet_v2", 1000, {"width": 0.5}, 96, 1_968_680),
        ("timm/resnet18", 10, {}, 32, 11_173_962),
        ("torchvision/resnet18", 10, {}, 32, 11_173_962),
    ],
)
def test_arguments_and_libraries_give_the_published_size(arch, classes, args, size, count):
    assert parameters(networks.build(arch, classes, args=args, **{**PLAIN, "image_size": size})) == count


def test_normalisation_and_resizing_are_inside_the_network():
    x = torch.rand(2, 3, 40, 40)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    plain = networks.build("wrn_16_2", 10, **PLAIN).eval()
    face = networks.build("wrn_16_2", 10, **{**PLAIN, "mean": mean, "std": std, "input_size": 24}).eval()
    small = F.interpolate(x, (24, 24), mode="bilinear", antialias=True)
    normal = (small - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(face(x), plain(normal))
        assert plain(x).shape == (2, 10)  # no input_size: any size
    assert face.facts["mean"] == mean and face.facts["input_size"] == 24


def test_a_convnet_resizes_other_sizes_to_its_own():
    network = networks.build("convnet", 10, **PLAIN).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 10)


def test_convnet_follows_the_formula_of_dataset_condensation():
    network = networks.build("convnet", 3, args={"depth": 2, "width": 4}, **{**PLAIN, "image_size": 8}).double()
    state, x = network.module.state_dict(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for key in state:  # so that the affine part of the norm counts
        state[key].add_(torch.rand(state[key].shape, dtype=torch.float64))
    h = x
    for conv, norm in (("features.0", "features.1"), ("features.4", "features.5")):
        h = F.conv2d(h, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        mean = h.mean((2, 3), keepdim=True)
        h = (h - mean) / ((h - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        h = h * state[f"{norm}.weight"][:, None, None] + state[f"{norm}.bias"][:, None, None]
        h = h.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    logits = h.flatten(1) @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(network(x), logits, rtol=1e-6, atol=1e-9)


def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    first = networks.build("shufflenet_v2_x0_5", 10, **PLAIN).module.state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(2)
    again = networks.build("shufflenet_v2_x0_5", 10, **PLAIN).module.state_dict()
    other = networks.build("shufflenet_v2_x0_5", 10, **{**PLAIN, "seed": 1}).module.state_dict()
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "wrn_16_2", "densenet121", "timm/resnet18"])
def test_a_hook_may_keep_what_a_layer_is_given(arch):
    network = networks.build(arch, 10, **{**PLAIN, "image_size": 16}).eval()
    kept = []
    for part in network.module.modules():
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda _, inputs: kept.append((inputs[0], inputs[0].clone())))
    with torch.no_grad():
        network(torch.rand(2, 3, 16, 16))
    assert len(kept) > 10
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize(
    ("arch", "layer"), [("resnet18", "layer1"), ("densenet121", "features.denseblock1"), ("timm/resnet18", "layer1")]
)
def test_small_stem_keeps_the_resolution_of_the_image(arch, layer):
    network, seen = networks.build(arch, 10, **{**PLAIN, "image_size": 16}), []
    network.module.get_submodule(layer).register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-1]))
    network(torch.rand(2, 3, 16, 16))
    assert seen == [16]


@pytest.mark.parametrize(
    ("arch", "options", "stem"),
    [
        ("resnet18", {"image_size": 65}, "standard"),
        ("resnet18", {"input_size": 96}, "standard"),  # the size that it sees decides
        ("resnet18", {"stem": "standard"}, "standard"),
        ("resnet18", {"image_size": 96, "stem": "small"}, "small"),
        ("torchvision/squeezenet1_1", {}, "small"),
        ("timm/vit_tiny_patch16_224", {"input_size": 32, "args": {"img_size": 32}}, "standard"),
        ("deit_tiny", {"stem": "standard"}, "standard"),
        ("deit_tiny", {"image_size": 96}, "standard"),
        ("convnext_tiny", {"image_size": 96, "stem": "small"}, "small"),
        ("timm/test_nfnet", {}, "small"),  # its convolutions have weights of their own kind
    ],
)
def test_the_stem_in_use_is_recorded(arch, options, stem):
    assert networks.build(arch, 10, **{**PLAIN, **options}).facts["stem"] == stem


def test_a_network_that_starts_at_full_resolution_keeps_its_stem():
    vgg = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    assert not networks.small_stem(vgg) and isinstance(vgg[2], nn.MaxPool2d)


def test_features_of_a_convolutional_classifier_are_averaged_over_space():
    network = networks.build("torchvision/squeezenet1_1", 10, **PLAIN).eval()
    x = torch.rand(2, 3, 32, 32)
    assert network.classifier == "classifier.1" and network.features(x).shape == (2, 512)


def test_transformers_networks_come_from_a_local_configuration(tmp_path):
    config = {"model_type": "resnet", "layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16]}
    config |= {"embedding_size": 8, "num_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = networks.build(f"transformers/{tmp_path}", 7, **PLAIN).eval()
    x = torch.rand(2, 3, 32, 32)
    assert network(x).shape == (2, 7) and network.facts["stem"] == "small"
    layer = network.module.get_submodule(network.classifier)
    torch.testing.assert_close(layer(network.features(x)), network(x))
    before = networks.identity(f"transformers/{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [1, 2]}))
    assert networks.identity(f"transformers/{tmp_path}") != before


VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "args", "stem"),
    [
        ("vit", VIT | {"intermediate_size": 32}, "standard"),
        ("resnet", {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}, "small"),
        ("timm_wrapper", {"architecture": "resnet18"}, "small"),
        ("timm_wrapper", {"architecture": "deit_tiny_patch16_224", "model_args": {"img_size": 32}}, "standard"),
    ],
)
def test_transformers_networks_come_by_model_type_without_a_network(name, args, stem):
    network = networks.build(f"transformers/{name}", 7, args=args, **PLAIN).eval()
    assert type(network.module).__name__.lower() == f"{name.replace('_', '')}forimageclassification"
    assert network.facts["stem"] == stem
    x = torch.rand(2, 3, 32, 32)
    layer = network.module.get_submodule(network.classifier)
    torch.testing.assert_close(layer(network.features(x)), network(x))
    network(x).square().sum().backward()
    assert all(p.grad is not None for p in network.module.parameters())


def test_the_wrapper_of_transformers_computes_what_timm_computes():
    args = {"architecture": "resnet18"}
    plain = networks.build("timm/resnet18", 5, **PLAIN).eval()
    wrapped = networks.build("transformers/timm_wrapper", 5, args=args, **PLAIN).eval()
    wrapped.module.timm_model.load_state_dict(plain.module.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain(x), wrapped(x))


def test_an_identity_tells_model_types_apart_and_leaves_other_names_alone():
    known = [networks.identity(f"transformers/{name}") for name in ("vit", "resnet", "timm_wrapper")]
    assert len(set(known)) == 3 and known[0] == networks.identity("transformers/vit")
    assert networks.identity("deit_tiny") == "deit_tiny"


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("resnet19", {}, "no network 'resnet19'; did you mean one of: resnet"),
        ("timm/resnet18x", {}, "timm/resnet18"),
        ("torchvision/rsnet18", {}, "torchvision/resnet18"),
        ("torchvision/fcn_resnet50", {}, "no network"),  # no classifier
        ("keras/resnet18", {}, "no network 'keras/resnet18'"),
        ("transformers/no/such-network", {}, "transformers/no/such-network"),
        ("resnet18", {"args": {"widht": 2}}, "widht"),
        ("resnet18", {"args": {"num_classes": 2}}, "num_classes"),
        ("convnet", {"args": {"depth": 6}}, "use depth 5 or less"),
        ("convnet", {"args": {"norm": "spectral"}}, "instance, batch, group, layer, none"),
        ("convnet", {"args": {"width": 6, "norm": "group"}}, "args"),
        ("convnet", {"args": {"width": 0}}, "args {'width': 0} do not fit"),
        ("wrn_16_2", {"args": {"depth": 18}}, "depth 18"),
        ("wrn_16_2", {"stem": "standard"}, "stem"),
        ("timm/vit_tiny_patch16_224", {}, "input_size"),
        ("timm/vit_tiny_patch16_224", {"stem": "small", "input_size": 224}, "stem: standard"),
        ("alexnet", {"stem": "standard"}, "cannot take 32x32 images"),
        ("vgg11_bn", {"image_size": 16}, "cannot take 16x16 images"),
        ("vgg11_bn", {"args": {"dropout": 0.1}}, "use stem: standard"),
        ("deit_tiny", {"image_size": 3}, "cannot take 3x3 images"),
        ("deit_tiny", {"args": {"patchsize": 4}}, "patchsize"),
        ("convnext_tiny", {"image_size": 8}, "give it another input_size"),
        ("convnet3", {"args": {"depth": 2}}, "depth"),
        ("convnet4", {"image_size": 8}, "use depth 3 or less"),
        ("transformers/vit", {"args": {"num_hidden_layers": 1}}, "cannot take 32x32 images"),
        ("transformers/vit", {"args": {"patchsize": 4}}, "has no patchsize"),
        ("transformers/vit", {"args": {"hidden_size": "wide"}}, "hidden_size"),
        ("transformers/bert", {}, "give a model type"),
        ("transformers/timm_wrapper", {}, "args: {architecture: resnet18}"),
        ("transformers/timm_wrapper", {"args": {"architecture": "rsnet18"}}, "rsnet18"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(arch, options, words):
    with pytest.raises(InputError) as error:
        networks.build(arch, 10, **{**PLAIN, **options})
    assert words in str(error.value) and "\n" not in str(error.value)
