"""Checkpoints as files: what they hold, read without running anything. Imports nothing heavy."""
