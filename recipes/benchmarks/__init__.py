"""What `benchmark_attention.py` times, how it is checked, and the tables of it."""
