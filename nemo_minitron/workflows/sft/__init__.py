"""Recipe sft."""
