"""Recipe preference."""
