"""Recipe distill."""
