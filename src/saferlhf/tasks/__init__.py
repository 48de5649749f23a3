"""The tasks: one LightningModule per kind of model."""
