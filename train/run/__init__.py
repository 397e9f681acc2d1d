"""The life of a training run: the loop, what it resumes from, what it exports."""
