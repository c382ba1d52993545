"""From conversation files to packed batches: conversations → tokens and loss mask → plan → packs, and the LightningDataModule that runs it."""
