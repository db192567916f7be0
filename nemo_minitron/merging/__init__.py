"""Several models of one architecture as one: merge methods, their settings by layer, and what is written."""
