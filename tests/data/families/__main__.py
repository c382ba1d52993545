"""Writes ``golden.json``: ids and mask of every family and case."""

from tests.data.families import write_golden

write_golden()
