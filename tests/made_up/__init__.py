"""A draft family and an engine of somebody else: what docs/extending.md shows. Neither is known to the package."""
