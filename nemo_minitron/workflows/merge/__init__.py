"""Recipe merge."""
