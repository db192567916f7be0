"""Recipe instruct_data."""
