"""What runs need before they are started: memory of each rank, FLOPs, seconds, and the layouts that fit a machine."""
