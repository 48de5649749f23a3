"""Data: from any source to canonical rows, through checks and splits, to tokens and batches."""
