"""What can be known before a run begins: its values, files, size, and its programs compiled for a topology."""
