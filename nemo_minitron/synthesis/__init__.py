"""Text that a teacher writes: what it starts from, what of it is kept, and how good it is."""
