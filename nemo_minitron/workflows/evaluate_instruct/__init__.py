"""Recipe evaluate_instruct."""
