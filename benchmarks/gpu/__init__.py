"""What is measured when a GPU is at hand. Not run so far: `plan.py`."""
