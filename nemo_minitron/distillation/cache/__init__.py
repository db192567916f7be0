"""A teacher's kept states on disk."""
