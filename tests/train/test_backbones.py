"""Networks of timm that start from pretrained weights, a bundle or a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import networks
from models.bundle import Bundle
from models.bundle.files import file_sha256
from models.image import decode
from models.image.resize import resize_to_input
from models.networks.pretrained import fetch_pretrained_file, pretrained_preprocessing
from models.networks.weights import load_weights, read_weights
from support.forked_commands import ForkedCommands
from support.hub_server import HubServer
from support.sample_images import write_image_folder
from train.data import DataError, ImageData
from train.learning.initial_weights import InitialWeights

import timm  # isort: skip  (after models.networks, which declares what it needs on a CPU torch)

LITE0 = "tf_efficientnet_lite0"
SMALL = "test_efficientnet.r160_in1k"  # of timm, for tests
QUICK = (
    *["--progress.quiet", "true", "--audit.enabled", "false", "--logger", "none"],
    *["--export.report", "false", "--export.quantize.enabled", "false"],
)
DAISY = 985  # of ImageNet's classes
PALACE = 698


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 images of 48x48 pixels."""
    return write_image_folder(tmp_path_factory.mktemp("photos") / "photos", 12, 48)


@pytest.fixture(scope="module")
def hub_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the hub has them: weights of a small model, random but of the right names."""
    directory = tmp_path_factory.mktemp("hub")
    repository = directory / "timm" / SMALL
    repository.mkdir(parents=True)
    torch.manual_seed(7)
    model = timm.create_model(SMALL)
    save_file(model.state_dict(), repository / "model.safetensors", {"format": "pt"})
    return directory


def hub_environment(url: str, cache: Path, **more: str) -> dict[str, str | None]:
    return {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": None, **more}


def train(
    commands: ForkedCommands, photos: Path, directory: Path, *flags: object, **options: object
) -> str:
    """Train for a step and publish; return what was printed."""
    return commands.run(
        *["run", photos, *QUICK, "--data.batch_size", 8, "--trainer.max_steps", 1],
        *["--store", directory / "store", "--trainer.default_root_dir", directory / "runs"],
        *flags,
        **options,
    ).text


def test_the_default_network_knows_imagenet():
    from sklearn.datasets import load_sample_image

    network = networks.build(LITE0, 1000, 3, 224).eval()
    weights = read_weights(fetch_pretrained_file(LITE0))
    assert load_weights(network, weights) == []

    preprocessing = pretrained_preprocessing(LITE0)
    data = ImageData("digits", channels=3)
    data.use_preprocessing(preprocessing)
    data.setup()
    images = [load_sample_image(name) for name in ("flower.jpg", "china.jpg")]
    pixels = np.stack([resize_to_input(image, data.input) for image in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    mean = torch.tensor(data.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.std).view(1, -1, 1, 1)
    with torch.no_grad():
        logits = network((x - mean) / std)

    flower, china = logits.topk(5).indices.tolist()
    assert DAISY in flower
    assert PALACE in china


def test_weights_of_the_hub_are_fetched_once(commands, photos, hub_weights, tmp_path):
    hub = HubServer(hub_weights)
    environment = hub_environment(hub.url, tmp_path / "cache")
    flags = ("--model.network", SMALL, "--data.size", 32, "--model.optimizer.lr", 1e-9)
    try:
        train(commands, photos, tmp_path, *flags, env=environment)
        served = list(hub.requests)
    finally:
        hub.close()
    assert any(request.startswith("GET") for request in served)
    expected = load_file(hub_weights / "timm" / SMALL / "model.safetensors")
    trained = load_file(tmp_path / "store/photos/1/weights.safetensors")
    kernels = trained["model.conv_stem.weight"]
    torch.testing.assert_close(kernels, expected["conv_stem.weight"], atol=1e-4, rtol=0)

    # From the hub's cache: no server listens on the port any more.
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        flags = ("--model.network", SMALL, "--data.size", 32, "--trainer.fast_dev_run", 1)
        commands.run("run", photos, *QUICK, *flags, env=environment | variables, cwd=tmp_path)


@pytest.mark.parametrize("failure", ["closed port", "overloaded", "offline", "unknown repository"])
def test_weights_that_cannot_be_had_name_three_ways_out(commands, photos, tmp_path, failure):
    (tmp_path / "empty").mkdir()
    hub = HubServer(tmp_path / "empty", 503 if failure == "overloaded" else None)
    environment = hub_environment(hub.url, tmp_path / "cache")
    if failure == "offline":
        environment["HF_HUB_OFFLINE"] = "1"
    if failure == "closed port":
        hub.close()
    refused = commands.start(
        *["run", photos, *QUICK, "--model.network", SMALL],
        *["--store", tmp_path / "store", "--trainer.default_root_dir", tmp_path / "runs"],
        env=environment,
    )

    assert refused.status() == 2
    if failure != "closed port":
        hub.close()
    (line,) = refused.text.strip().splitlines()
    assert f"no pretrained weights for {SMALL}" in line
    assert f"--model.network {LITE0}" in line
    assert "--model.weights FILE" in line
    assert "--model.weights none" in line
    assert len(hub.requests) <= 3  # of which each would take the time that the hub takes to answer
    assert not (tmp_path / "runs").exists()


def test_a_small_network_has_no_pretrained_weights(commands, photos, tmp_path):
    refused = commands.start("run", photos, *QUICK, "--model.network", "lenet", cwd=tmp_path)
    assert refused.status() == 2
    (line,) = refused.text.strip().splitlines()
    assert "no pretrained weights for lenet: none are published; give --model.network" in line


@pytest.fixture(scope="module")
def first(commands: ForkedCommands, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store of one bundle, whose images are resized in a way of its own."""
    directory = tmp_path_factory.mktemp("first")
    flags = ("--model.network", "convnet", "--model.weights", "none", "--data.size", 40)
    train(commands, photos, directory, *flags, "--data.short_side", 44, "--data.resize", "pad")
    return directory


def test_a_bundle_is_continued_with_other_classes_as_it_was_prepared(commands, first, tmp_path):
    other = write_image_folder(tmp_path / "other", 12, 48)
    (other / "red").rename(other / "yellow")
    text = commands.run(
        *["run", other, *QUICK, "--model.network", "convnet", "--trainer.max_steps", 1],
        *["--model.weights", "photos", "--name", "other"],
        *["--store", first / "store", "--trainer.default_root_dir", tmp_path / "runs"],
    ).text

    assert "loaded all but the rows of the head for yellow" in text
    before = Bundle(first / "store/photos/1").manifest
    after = Bundle(first / "store/other/latest").manifest
    assert after.classes == ["blue", "green", "yellow"]
    assert after.input == before.input
    assert after.input.height == 40
    assert after.input.short_side == 44
    assert after.input.resize == "pad"


@pytest.mark.parametrize("weights", ["photos", "photos/1", "{}/store/photos/1"])
def test_a_bundle_is_named_with_or_without_its_version_or_by_its_path(first, weights):
    bundle = InitialWeights(weights.format(first), "convnet", str(first / "store")).bundle
    assert bundle is not None
    assert bundle.samefile(first / "store/photos/1")


@pytest.mark.parametrize(
    ("weights", "store", "problem"),
    [
        ("photos/7", "{}/store", "photos has no version 7; it has 1"),
        ("s3:///photos/1", "{}/store", "s3://: no bucket; write s3://bucket/path"),
    ],
)
def test_a_missing_bundle_is_refused(commands, photos, first, tmp_path, weights, store, problem):
    refused = commands.start(
        *["run", photos, *QUICK, "--model.weights", weights, "--store", store.format(first)],
        *["--trainer.default_root_dir", tmp_path / "runs"],
        cwd=tmp_path,
    )
    assert refused.status() == 2
    assert problem in refused.text.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_digest_of_weights_is_that_of_their_file(first):
    file = first / "store/photos/1/weights.safetensors"
    assert read_weights(file).digest == file_sha256(file)
    store = str(first / "store")
    assert InitialWeights("photos", "convnet", store).read().digest == file_sha256(file)


def open_photos(photos: Path, tmp_path: Path, network: str, **settings: object) -> ImageData:
    data = ImageData(str(photos), cache=str(tmp_path), workers=0, **settings)
    data.use_preprocessing(pretrained_preprocessing(network))
    data.setup()
    return data


@pytest.mark.parametrize(
    ("network", "size", "resize", "short_side", "mean"),
    [
        (LITE0, 224, "crop", 256, 127.5),
        ("resnet18.tv_in1k", 224, "crop", 256, 255 * 0.485),
        ("vit_small_patch14_dinov2", 518, "crop", None, 255 * 0.485),
        ("convnext_tiny.in12k_ft_in1k_384", 384, "stretch", None, 255 * 0.485),
    ],
)
def test_images_are_prepared_as_for_the_pretrained_weights(
    photos, tmp_path, network, size, resize, short_side, mean
):
    data = open_photos(photos, tmp_path, network)
    assert (data.input.height, data.input.width) == (size, size)
    assert data.input.resize == resize
    assert data.input.short_side == short_side
    assert data.mean[0] == pytest.approx(mean)
    expected = timm.get_pretrained_cfg(network).interpolation
    assert data.input.interpolation == {"bicubic": "cubic", "bilinear": "linear"}[expected]


def test_settings_of_the_data_come_before_those_of_the_weights(photos, tmp_path):
    data = open_photos(photos, tmp_path, "resnet18.tv_in1k", size=32)
    assert (data.input.height, data.input.short_side) == (32, None)
    assert data.mean == pytest.approx([123.675, 116.28, 103.53])

    measured = open_photos(photos, tmp_path, "resnet18.tv_in1k", size=32, normalization="data")
    pixels = measured.decoded.pixels[measured.index["train"]].astype(float)
    assert measured.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=0.01)

    gray = open_photos(photos, tmp_path, "resnet18.tv_in1k", size=32, channels=1, resize="pad")
    assert gray.input.resize == "pad"
    assert gray.mean == pytest.approx([(123.675 + 116.28 + 103.53) / 3])

    with pytest.raises(DataError, match="normalization: pretrained needs weights"):
        open_photos(photos, tmp_path, "lenet", size=32, normalization="pretrained")


# Kinds of networks, each at its own size unless that takes minutes.
BACKBONES = {
    LITE0: 224,
    "resnet18": 224,
    "resnet50": 224,
    "mobilenetv3_small_100": 224,
    "mobilenetv4_conv_small": 224,
    "convnext_tiny": 224,
    "vit_tiny_patch16_224": 224,
    "vit_small_patch14_dinov2": 518,
}
WITH_MAPS = {LITE0, "resnet18", "resnet50"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", BACKBONES)
def test_each_kind_of_backbone_is_certified_at_its_own_size(commands, photos, tmp_path, network):
    import onnxruntime

    commands.run(
        *["run", photos, "--model.network", network, "--model.weights", "none"],
        *["--data.size", BACKBONES[network], "--data.batch_size", 2, "--trainer.max_steps", 1],
        *["--data.val_fraction", 0.2, "--data.test_fraction", 0.2, "--audit.enabled", "false"],
        *["--progress.quiet", "true", "--export.report", "false", "--logger", "none"],
        *["--export.quantize.images", 8, "--export.quantize.gate_images", 8],
        *["--store", tmp_path / "store", "--trainer.default_root_dir", tmp_path / "runs"],
    )
    bundle = Bundle(tmp_path / "store/photos/1")
    manifest = bundle.manifest
    assert manifest.network == network
    assert manifest.variants["fp32"].parity.max_abs_diff <= 1e-4
    assert ("cam" in manifest.outputs) == (network in WITH_MAPS)
    if "int8" not in manifest.variants:
        assert any(note.startswith("int8 is not shipped") for note in manifest.notes)

    images = np.stack([decode(content, manifest.input) for content in bundle.read_samples()[:2]])
    session = onnxruntime.InferenceSession(bundle.variant_path("fp32"))
    outputs = session.run(manifest.outputs, {"image": images})
    expected = bundle.read_expected()
    for name, values in zip(manifest.outputs, outputs, strict=True):
        np.testing.assert_allclose(values, expected[name][:2], atol=1e-3, rtol=1e-3)
