"""The probe, the fine-tuned network and means of their weights: the best one is published.

Fine-tuning from the probe moves the weights so little that a mean of both is a network, too, and
often better than both (Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", 2022).
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from train.data import ImageData
from train.export.calibrate import fit_temperature
from train.export.evaluate import score_part
from train.export.pipeline import TrainedModel
from train.export.scores import Scores, negative_log_likelihood
from train.export.steps import Advance
from train.learning.fit_config import MIXED_SHARES
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


def choose_model(
    probe: TrainedModel,
    fine_tuned: TrainedModel,
    probe_val: Scores,
    data: ImageData,
    device: torch.device,
    advance: Advance,
) -> tuple[TrainedModel, str]:
    """Return the best candidate on the validation part, and a note on all of them."""
    best = probe
    best_share = 0.0
    best_val = probe_val
    accuracies = {0.0: probe_val.accuracy}
    for share in MIXED_SHARES:
        model = _mix_weights(probe, fine_tuned, share)
        val = score_part(model.graph, data, "val", device, advance)
        accuracies[share] = val.accuracy
        if is_better(val, best_val):
            best = model
            best_share = share
            best_val = val
    return best, _describe_choice(accuracies, best_share, len(probe_val.labels))


def _mix_weights(probe: TrainedModel, fine_tuned: TrainedModel, share: float) -> TrainedModel:
    """Return the mean of two networks, with this share of the fine-tuned one, 0..1."""
    graph = copy.deepcopy(fine_tuned.graph).cpu()
    probe_state = probe.graph.state_dict()
    with torch.no_grad():
        for name, value in graph.state_dict().items():
            if value.is_floating_point():
                value.lerp_(probe_state[name].to(value), 1 - share)
    return replace(fine_tuned, graph=graph)


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


def _describe_choice(accuracies: dict[float, float], best_share: float, images: int) -> str:
    """Return a note on all candidates and which one is kept; the keys are shares of fine-tuning."""
    kept = f"a mean of their weights, {best_share:.0%} fine-tuned ({accuracies[best_share]:.4f}),"
    if best_share == 0:
        kept = "the probe"
    if best_share == 1:
        kept = "the fine-tuned network"
    return (
        f"validation accuracy: linear probe {accuracies[0.0]:.4f}, fine-tuned "
        f"{accuracies[1.0]:.4f}, on {images} images; {kept} is kept"
    )
