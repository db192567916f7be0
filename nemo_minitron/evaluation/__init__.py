"""Losses on held-out text."""
