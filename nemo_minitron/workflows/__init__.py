"""What the recipes do, one folder each."""
