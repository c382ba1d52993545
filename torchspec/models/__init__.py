"""The mathematics: draft networks, losses, metrics, optimizer, checkpoints, export, and the LightningModule. docs/map.md has a line for each file."""
