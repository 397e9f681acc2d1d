"""What can be known before a decode begins: its files, its slots, and its programs compiled for a topology."""
