"""The distillation loss."""
