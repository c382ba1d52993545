"""EAGLE-3 drafts (arXiv 2503.01840): what this family's architecture, training and files are."""
