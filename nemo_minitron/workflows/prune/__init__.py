"""Recipe prune."""
