"""What is made of finished runs: matched comparisons, tables and plots."""
