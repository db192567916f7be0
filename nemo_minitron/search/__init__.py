"""Candidates of a search and its report."""
