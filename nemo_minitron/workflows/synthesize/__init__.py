"""Recipe synthesize."""
