"""Optimizers, clipping and schedules."""
