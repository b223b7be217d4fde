"""Fine-tune a timm network by another program and print its test accuracy.

    python finetune_peers.py timm|fastai|autogluon DATA --weights FILE [--size 224] [--seed 0]

finetune_recipes.py runs this with the repository on the path, in the virtual environment of the
peers. DATA has the folders train, val and test, with class folders in each. FILE is a state dict in
timm's names. Prints one JSON line: accuracy on test, and the versions of what was used.

timm: a plain loop of 5 epochs over all layers: AdamW, cosine schedule with warm-up, crops and
mirror images. fastai: `vision_learner` and `fine_tune`, with its own defaults. autogluon:
`MultiModalPredictor` with its defaults and this network.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import models.networks  # noqa: F401  (declares operators that torchvision needs on a CPU torch)

NETWORK = "tf_efficientnet_lite0"
EPOCHS = 5
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of all steps
LABEL_SMOOTHING = 0.1
CROP_AREA = (0.5, 1.0)  # as in Imago's recipe


def train_timm(options: argparse.Namespace) -> float:
    """Train a bare loop around a timm model."""
    import timm
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    overlay = {"file": options.weights}
    train_folder = ImageFolder(options.data / "train")
    network = timm.create_model(
        NETWORK,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=len(train_folder.classes),
    )
    config = timm.data.resolve_model_data_config(network)
    config["input_size"] = (3, options.size, options.size)
    train_folder.transform = timm.data.create_transform(
        **config, is_training=True, scale=CROP_AREA, color_jitter=0.2
    )
    test_folder = ImageFolder(options.data / "test", timm.data.create_transform(**config))
    loader = DataLoader(train_folder, BATCH_SIZE, shuffle=True)

    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=WARMUP, cycle_momentum=False
    )
    network.to(memory_format=torch.channels_last).train()
    for _ in range(EPOCHS):
        for images, labels in loader:
            logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(
                logits, labels, label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    network.eval()
    correct = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test_folder, BATCH_SIZE):
            correct += int((network(images).argmax(1) == labels).sum())
    return correct / len(test_folder)


def train_fastai(options: argparse.Namespace) -> float:
    """Train fastai's learner with its defaults."""
    from fastai.vision.all import (
        ImageDataLoaders,
        Normalize,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    set_seed(options.seed)
    loaders = ImageDataLoaders.from_folder(
        options.data,
        train="train",
        valid="test",
        bs=BATCH_SIZE,
        item_tfms=Resize(options.size),
        batch_tfms=[*aug_transforms(), Normalize.from_stats([0.5] * 3, [0.5] * 3)],
        num_workers=0,
        seed=options.seed,
    )
    learner = vision_learner(
        loaders,
        NETWORK,
        metrics=accuracy,
        normalize=False,
        pretrained_cfg_overlay={"file": options.weights},
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(EPOCHS)
        loss_and_accuracy = learner.validate()
    return float(loss_and_accuracy[1])


def train_autogluon(options: argparse.Namespace) -> float:
    """Train AutoGluon's predictor on this network, from a checkpoint directory on disk."""
    import pandas
    import timm
    from autogluon.multimodal import MultiModalPredictor

    def list_images(part: str) -> pandas.DataFrame:
        files = sorted((options.data / part).glob("*/*"))
        labels = [file.parent.name for file in files]
        return pandas.DataFrame({"image": [str(file) for file in files], "label": labels})

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "checkpoint"
        checkpoint.mkdir()
        network = timm.create_model(NETWORK)
        config = {
            "architecture": NETWORK,
            "num_features": network.num_features,
            "pretrained_cfg": network.default_cfg,
        }
        (checkpoint / "config.json").write_text(json.dumps(config))
        state = torch.load(options.weights, weights_only=True)
        backbone = {name: value for name, value in state.items() if "classifier" not in name}
        torch.save(backbone, checkpoint / "pytorch_model.bin")

        predictor = MultiModalPredictor(
            label="label", path=str(Path(directory) / "model"), verbosity=1
        )
        settings = {
            "model.names": ["timm_image"],
            "model.timm_image.checkpoint_name": str(checkpoint),
        }
        predictor.fit(
            list_images("train"),
            tuning_data=list_images("val"),
            hyperparameters=settings,
            seed=options.seed,
        )
        scores = predictor.evaluate(list_images("test"), metrics=["accuracy"])
    return float(scores["accuracy"])


PEERS = {
    "timm": (train_timm, "timm"),
    "fastai": (train_fastai, "fastai"),
    "autogluon": (train_autogluon, "autogluon.multimodal"),
}


def run_peer() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, package = PEERS[options.peer]
    accuracy = train(options)
    versions = {name: version(name) for name in ("torch", "timm", package)}
    print(json.dumps({"accuracy": accuracy, "versions": versions}))


if __name__ == "__main__":
    run_peer()
