"""Corpora, tokenizers, and indexed, packed datasets."""
