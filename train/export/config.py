"""The `export` section of a recipe: settings of the steps after the fit."""

from dataclasses import dataclass, field
from pathlib import Path

from models.comparison import GateConfig
from train.export.calibrate import CalibrateConfig
from train.export.quantize import QuantizeConfig


@dataclass
class ExportConfig:
    """Settings of the steps after the fit.

    Args:
        enabled: test the best weights and write a bundle.
        samples: validation images in the bundle, with which every server checks itself.
        calibrate: temperature, abstaining, prediction sets.
        quantize: the int8 variant and its accuracy gate.
        report: write report.html and README.md.
        purpose: what the model is for, in a sentence, for the report.
        limits: what the model is not for, in a sentence, for the report.
        license: license of the model, as Hugging Face spells it, for README.md.
        sign_key: PEM file of an elliptic curve private key that signs the bundle; needs the extra
            `signing`.
        promote: make the new version the latest.
        gate: comparison with the latest version; one that is worse is not promoted.
    """

    enabled: bool = True
    samples: int = 16
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    report: bool = True
    purpose: str | None = None
    limits: str | None = None
    license: str = "unknown"
    sign_key: str | None = None
    promote: bool = True
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"export.samples: {self.samples} is less than 1")
        if self.sign_key and not Path(self.sign_key).is_file():
            raise ValueError(f"export.sign_key: {self.sign_key}: no such file")
