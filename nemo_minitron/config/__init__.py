"""The schemas of every recipe's configuration."""
