"""Recipe evolve."""
