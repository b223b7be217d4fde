"""The LightningModule, its optimizers and schedules, weight averaging and precision."""
