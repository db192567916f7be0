"""Recipe pretrain."""
