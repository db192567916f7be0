"""Recipe search."""
