"""The `fit` section of a recipe: how pretrained weights are adapted, and in which time."""

import re
from dataclasses import dataclass
from typing import Literal

FitMode = Literal["auto", "probe", "plain"]

UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)([hms]?)")


# Of the fine-tuned weights in the means of probe and fine-tuned network that are tried, with all of
# them last.
MIXED_SHARES = (0.25, 0.5, 0.75, 1.0)

FIT_MODE_HELP = (
    "probe fits only the head, as a logistic regression on the embeddings of the frozen network, "
    "and is done in seconds; auto fits the probe, trains on from it and keeps the best on "
    "validation data of both networks and means of their weights, and is plain where the network "
    "starts with random weights; plain trains at once"
)
TIME_BUDGET_HELP = (
    "time for the whole command, the bundle included, such as 90s, 10m or 1h30m: a step is "
    "measured, and as many epochs are run as fit, at most trainer.max_epochs; also as --time-budget"
)


@dataclass
class FitConfig:
    """How weights are adapted to the data, and in which time; see the help of both settings."""

    mode: FitMode = "plain"
    time_budget: str | None = None

    def __post_init__(self) -> None:
        if self.time_budget is not None:
            parse_duration(self.time_budget)

    @property
    def budget_seconds(self) -> float | None:
        """The time budget; None without one."""
        return None if self.time_budget is None else parse_duration(self.time_budget)

    def uses_probe(self, has_weights: bool) -> bool:
        """Whether a probe is fitted. Raises ValueError for a probe of random weights."""
        if self.mode == "probe" and not has_weights:
            raise ValueError(
                "fit.mode: a probe needs pretrained weights; give --model.weights pretrained, a "
                "bundle or a file"
            )
        return self.mode != "plain" and has_weights


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 90, 90s, 10m or 1h30m. Raises ValueError."""
    parts = DURATION.findall(text)
    is_whole_text = "".join(number + unit for number, unit in parts) == text
    seconds = sum(float(number) * UNIT_SECONDS[unit or "s"] for number, unit in parts)
    if not parts or not is_whole_text or not seconds:
        raise ValueError(
            f"fit.time_budget: {text!r} is not a duration; give one such as 90s, 10m or 1h30m"
        )
    return seconds
