"""Recipe plan_run."""
