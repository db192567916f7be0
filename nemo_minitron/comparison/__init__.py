"""Models side by side: what was measured of each, paired differences, the table, the picture."""
