"""The LightningModule and what it learns with: optimizers, schedules, averages, precision."""
