"""What is measured when a GPU is at hand."""
