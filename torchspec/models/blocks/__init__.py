"""Block drafts: DFlash, DSpark and DFlash 2, one backbone with different heads."""
