"""What a decode leaves: rows, tables, figures, and the comparison of runs."""
