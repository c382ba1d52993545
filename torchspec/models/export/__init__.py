"""A draft out (checked, as each server reads it) and in."""
