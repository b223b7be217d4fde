"""The networks by name: shapes, outputs, weights from disk, and errors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import networks
from models.networks.weights import WeightsFile, load_weights, read_weights

import timm  # isort: skip  (after models.networks, which declares what it needs on a CPU torch)

SMALL = list(networks.SMALL_NETWORKS)
# A small model of each kind that timm has, and sizes that it takes.
FAMILIES = {
    "convnext_atto": (32,),
    "deit_tiny_distilled_patch16_224": (64,),
    "densenet121": (28, 32),
    "efficientnet_b0": (28, 32),
    "inception_v3": (128,),
    "levit_128s": (224,),
    "maxvit_rmlp_pico_rw_256": (256,),
    "mobilenetv2_100": (32,),
    "mobilenetv3_small_100": (28, 32),
    "mobilenetv4_conv_small": (32,),
    "regnetx_002": (32,),
    "resnet18": (8, 28, 32, 224),
    "resnetv2_50": (32,),
    "swin_tiny_patch4_window7_224": (224,),
    "tf_efficientnet_lite0": (32, 224),
    "vgg11": (32,),
    "vit_small_patch14_dinov2": (56,),
    "vit_tiny_patch16_224": (32,),
}
CASES = []
for family, sizes in FAMILIES.items():
    CASES += [(family, size) for size in sizes]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def check_outputs(network: networks.Network, channels: int, size: int, classes: int) -> None:
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        network.eval()
        outputs = network.outputs(x)
        logits = network(x)
        embedding = network.embed(x)
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(outputs["logits"], logits)
    torch.testing.assert_close(outputs["embedding"], embedding)
    torch.testing.assert_close(network.classify(embedding), logits)
    assert embedding.ndim == 2
    assert ("cam" in outputs) == network.spatial
    if network.spatial:
        assert outputs["cam"].shape[:2] == (2, classes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, size, channels):
    check_outputs(networks.build(name, 5, channels, size), channels, size, 5)


def test_speednet_takes_the_smallest_size_it_names():
    check_outputs(networks.build("speednet", 5, 1, 9), 1, 9, 5)
    check_outputs(networks.build("speednet", 5, 1, 8, widths=[8, 16]), 1, 8, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_family_of_timm(name, size):
    check_outputs(networks.build(name, 7, 3, size), 3, size, 7)


def test_all_names_are_listed():
    known = networks.list_networks()
    assert set(SMALL) | {"resnet152", "vit_tiny_patch16_224", "convnext_large"} <= set(known)
    assert len(known) == len(set(known)) > 800


def test_mean_of_the_activation_map_is_the_logit():
    network = networks.build("resnet18", 4, 3, 32).eval()
    with torch.no_grad():
        outputs = network.outputs(torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(outputs["cam"].mean((2, 3)) + network.head.bias, outputs["logits"])


def test_a_gray_image_has_the_outputs_of_its_rgb_copy(tmp_path):
    colour = networks.build("resnet18", 4, 3, 224).eval()
    file = tmp_path / "weights.safetensors"
    save_file(colour.state_dict(), file)
    gray = networks.build("resnet18", 4, 1, 224).eval()
    assert load_weights(gray, read_weights(file)) == []
    x = torch.randn(2, 1, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(gray(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "stem", "kernel", "stride", "pooled"),
    [
        (32, "auto", 3, 1, False),
        (64, "auto", 3, 1, False),
        (96, "auto", 7, 2, True),
        (32, "original", 7, 2, True),
        (224, "small", 3, 1, False),
    ],
)
def test_the_stem_depends_on_the_size(size, stem, kernel, stride, pooled):
    model = networks.build("resnet18", 4, 3, size, stem=stem).model
    assert model.conv1.kernel_size == (kernel, kernel)
    assert model.conv1.stride == (stride, stride)
    assert isinstance(model.maxpool, torch.nn.MaxPool2d) == pooled


def test_weights_of_timm_keep_a_new_head(tmp_path):
    pretrained = timm.create_model("resnet18")
    file = tmp_path / "resnet18.pth"
    torch.save(pretrained.state_dict(), file)
    network = networks.build("resnet18", 6, 3, 224)
    kept = load_weights(network, read_weights(file))
    assert sorted(kept) == ["head.bias", "head.weight"]
    torch.testing.assert_close(
        network.model.layer3[0].conv1.weight, pretrained.layer3[0].conv1.weight
    )


def test_weights_of_a_bundle_set_the_head_for_as_many_classes(tmp_path):
    first = networks.build("lenet", 5, 3, 32)
    second = networks.build("lenet", 5, 3, 32)
    file = tmp_path / "weights.safetensors"
    save_file(first.state_dict(), file)
    assert load_weights(second, read_weights(file)) == []
    torch.testing.assert_close(second.head.weight, first.head.weight)


def take_weights(network: networks.Network, classes: list[str] | None = None) -> WeightsFile:
    """The weights of a network, as if they were read from a file."""
    return WeightsFile(Path("weights.pt"), network.state_dict(), classes=classes)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (("resnet50", 64), ("resnet18", 64)),
        (("resnet18", 64), ("resnet34", 64)),
        (("resnet34", 64), ("resnet18", 64)),
        (("mobilenetv3_large_100", 64), ("mobilenetv3_small_100", 64)),
        (("lenet", 28), ("lenet", 32)),
        (("convnet", 32), ("convnet4", 32)),
        (("speednet", 32, {"widths": [8, 8]}), ("speednet", 32, {"widths": [8, 8, 8]})),
        (("speednet", 32, {"widths": [8, 8, 8]}), ("speednet", 32, {"widths": [8, 8]})),
    ],
)
def test_weights_of_another_network_are_refused(there, here):
    networks_of_both: list[networks.Network] = []
    for name, size, *options in (there, here):
        networks_of_both.append(networks.build(name, 5, 3, size, **dict(*options)))
    other, network = networks_of_both
    before = {name: value.clone() for name, value in network.state_dict().items()}

    with pytest.raises(ValueError, match=r"weights.pt: weights of another network, .*; give"):
        load_weights(network, take_weights(other))

    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "convnet"])
def test_weights_are_taken_from_images_of_another_size(name):
    """Only the first convolution, or the head, depends on the size."""
    other = networks.build(name, 5, 3, 128)
    network = networks.build(name, 5, 3, 32)
    kept = load_weights(network, take_weights(other))
    assert set(kept) <= {"model.conv1.weight", "head.weight"} | {"head.bias"}


def test_position_embeddings_are_fitted_to_another_size():
    pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=9)
    weights = WeightsFile(Path("vit.pth"), pretrained.state_dict())
    network = networks.build("vit_tiny_patch16_224", 5, 1, 64)

    assert load_weights(network, weights) == ["head.weight", "head.bias"]

    assert network.model.pos_embed.shape[1] == 1 + (64 // 16) ** 2
    kernels = pretrained.patch_embed.proj.weight
    torch.testing.assert_close(network.model.patch_embed.proj.weight, kernels.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("resnet18", 32, "model.conv1.weight", "model.layer4.1.bn2.bias"),
        ("tf_efficientnet_lite0", 32, "model.conv_stem.weight", "model.bn2.bias"),
        ("vit_tiny_patch16_224", 32, "model.cls_token", "model.norm.bias"),
        ("lenet", 32, "layers.0.weight", "layers.9.bias"),
        ("speednet", 32, "whiten.weight", "blocks.3.second.1.bias"),
    ],
)
def test_layer_groups_hold_all_parameters_from_the_first_layer_to_the_head(name, size, first, last):
    network = networks.build(name, 5, 3, size)
    name_of_id = {id(parameter): path for path, parameter in network.named_parameters()}
    groups: list[list[str]] = []
    for group in network.layer_groups():
        groups.append([name_of_id.pop(id(parameter)) for parameter in group])

    assert not name_of_id
    assert len(groups) > 3
    assert first in groups[0]
    assert last in groups[-2]
    assert all(path.startswith("head.") for path in groups[-1])


@pytest.mark.parametrize("name", ["lenet", "speednet"])
@pytest.mark.parametrize(
    ("classes", "kept"),
    [
        (["ant", "bee", "cat", "dog"], ["the rows of the head for dog"]),
        (["bee", "ant", "cat"], []),
        (["cat", "ant"], []),
        (["dog", "cat", "bee"], ["the rows of the head for dog"]),
        (["elk", "dog", "fox"], ["head.weight", "head.bias"]),
    ],
)
def test_classes_of_the_same_name_keep_their_rows_of_the_head(name, classes, kept):
    known = ["ant", "bee", "cat"]
    first = networks.build(name, len(known), 3, 32)
    torch.nn.init.normal_(first.head.weight)
    second = networks.build(name, len(classes), 3, 32)
    before = second.head.weight.detach().clone()

    unchanged = load_weights(second, take_weights(first, known), classes)

    assert unchanged == [
        tensor for tensor in kept if tensor in second.state_dict() or " " in tensor
    ]
    for row, label in enumerate(classes):
        expected = first.head.weight[known.index(label)] if label in known else before[row]
        assert torch.equal(second.head.weight[row], expected), label


def test_whitened_patches_are_uncorrelated():
    network = networks.build("speednet", 5, 3, 32)
    noise = torch.randn(500, 3, 34, 34)
    images = torch.nn.functional.avg_pool2d(noise, 3, 1)  # neighbours are correlated, as in photos
    network.prepare(images)
    assert not network.whiten.weight.requires_grad
    with torch.no_grad():
        outputs = network.whiten(images)[:, :12].permute(1, 0, 2, 3).reshape(12, -1)
    torch.testing.assert_close(torch.cov(outputs), torch.eye(12), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("resnet81", 32, {}, "did you mean resnet"),
        ("resnet18.a9_in1k", 32, {}, "no such weights of resnet18; it has .*tv_in1k"),
        ("lenet.a1", 32, {}, "unknown network 'lenet.a1'"),
        ("inception_v3", 32, {}, "give another size"),
        ("vit_tiny_patch16_224", 8, {}, "8 pixels"),
        ("lenet", 8, {}, "too small"),
        ("speednet", 4, {}, "too few"),
        ("speednet", 8, {}, "give 9 or more"),
        ("speednet", 32, {"depth": 1}, "depth: 1 is not a whole number of 2 or more"),
        ("lenet", 32, {"widths": [1]}, "unknown option 'widths'"),
        ("speednet", 32, {"width": [1]}, "it has widths, depth"),
        ("resnet18", 32, {"stemm": "small"}, "stemm"),
        ("resnet18", 32, {"stem": "tiny"}, "stem must be"),
        ("resnet18", 32, {"num_classes": 9}, "option num_classes follows from the data"),
    ],
)
def test_invalid_arguments_are_explained(name, size, options, message):
    with pytest.raises(ValueError, match=message) as error:
        networks.build(name, 5, 3, size, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"rubbish", "not a file of weights"),
        ({"layers.0.weight": torch.zeros(2)}, "another network"),
        ([1, 2], "no state dict"),
    ],
)
def test_invalid_weights_are_explained(tmp_path, content, message):
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        load_weights(networks.build("lenet", 5, 3, 32), read_weights(file))
