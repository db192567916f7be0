"""A page about a run and the runs before it: one HTML file, which loads nothing."""
