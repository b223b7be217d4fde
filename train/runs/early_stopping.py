"""Early stopping: end a run whose validation no longer improves."""

from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

NEVER = 10**9  # validations


class EarlyStopping(LightningEarlyStopping):
    """Ends the run when validation no longer improves; off unless `patience` is set.

    Args:
        patience: validations without a better value before the run ends; 0 never ends it.
        monitor: metric to watch.
        mode: min or max; auto follows the metric.
        min_delta: smallest change that counts as better.
    """

    def __init__(
        self,
        patience: int = 0,
        monitor: str = "val/loss",
        mode: str = "auto",
        min_delta: float = 0.0,
    ):
        if patience < 0:
            raise ValueError(f"early_stopping.patience: {patience} is less than 0")
        super().__init__(
            monitor,
            min_delta,
            patience or NEVER,
            mode=mode,
            verbose=patience > 0,
            strict=False,  # a run that ends within its first epoch has no validation
        )
