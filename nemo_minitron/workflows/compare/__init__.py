"""Recipe compare."""
