"""The probe and the fine-tuned network: the better one on the validation part is published."""

from dataclasses import dataclass
from pathlib import Path

import torch

from train.data import ImageData
from train.export.calibrate import fit_temperature
from train.export.scores import Scores, negative_log_likelihood
from train.learning.probe import fit_probe
from train.learning.system import Classifier

PROBE_FILE = "probe.ckpt"


@dataclass(frozen=True)
class SavedProbe:
    """A probe in a run directory, with the weights of its whole network."""

    path: Path
    val: Scores

    def load_into(self, system: Classifier) -> None:
        """Copy the weights into the network of a system."""
        state = torch.load(self.path, map_location="cpu", weights_only=True)["state_dict"]
        system.load_state_dict(state, strict=False)


def fit_and_save_probe(system: Classifier, data: ImageData, directory: Path) -> SavedProbe:
    """Fit a probe on the embeddings of the data, load it into the network, and save both."""
    assert data.embeddings is not None
    labels = data.dataset.labels
    train = data.index["train"]
    val = data.index["val"]
    class_weights = system.class_weights
    probe = fit_probe(
        data.embeddings[train],
        labels[train],
        data.embeddings[val],
        labels[val],
        len(data.classes),
        None if class_weights is None else class_weights.numpy(),
    )
    probe.load_into(system.network)

    path = directory / PROBE_FILE
    state = {f"network.{name}": value for name, value in system.network.state_dict().items()}
    staged = path.with_suffix(".tmp")
    content = {
        "state_dict": state,
        "val_logits": torch.from_numpy(probe.val_logits),
        "data": data.digest,
    }
    torch.save(content, staged)
    staged.replace(path)
    return SavedProbe(path, Scores(probe.val_logits, labels[val]))


def load_saved_probe(data: ImageData, directory: Path) -> SavedProbe | None:
    """Return the probe that an earlier start of the run has saved; None without one of this data.

    The data may have changed since, as long as the run has no checkpoint.
    """
    path = directory / PROBE_FILE
    if not path.exists():
        return None
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if content["data"] != data.digest:
        return None
    logits = content["val_logits"].numpy()
    return SavedProbe(path, Scores(logits, data.dataset.labels[data.index["val"]]))


def is_better(one: Scores, other: Scores) -> bool:
    """Whether `one` is more accurate; where both are alike, whether it is more certain.

    The loss is compared after calibration, as label smoothing makes a network less certain.
    """
    if one.accuracy != other.accuracy:
        return one.accuracy > other.accuracy
    return _calibrated_loss(one) < _calibrated_loss(other)


def _calibrated_loss(scores: Scores) -> float:
    temperature = fit_temperature(scores.logits, scores.labels)
    return negative_log_likelihood(scores.logits, scores.labels, temperature)


def describe_choice(probe: Scores, fine_tuned: Scores, keeps_probe: bool) -> str:
    """Return a note on both candidates and which one is kept."""
    kept = "the probe" if keeps_probe else "the fine-tuned network"
    return (
        f"validation accuracy: linear probe {probe.accuracy:.4f}, fine-tuned "
        f"{fine_tuned.accuracy:.4f}, on {len(probe.labels)} images; {kept} is kept"
    )
