"""Recipe pipeline."""
