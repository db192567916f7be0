"""Scoring: what each unit and layer of a (sharded) model is worth, by forward passes over calibration data."""
