"""Models out: Hugging Face directories, GGUF files, their cards."""
