"""Recipe chat."""
