"""Recipe export."""
