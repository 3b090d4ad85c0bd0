"""The heavy parts: one folder per op, the same file names in each."""
