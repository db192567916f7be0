"""What runs a recipe: Hydra, the run directory, its lock, the job spec of a launcher."""
