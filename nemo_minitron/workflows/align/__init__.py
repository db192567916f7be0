"""Recipe align."""
