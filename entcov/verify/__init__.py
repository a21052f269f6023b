"""Float64 oracles and the comparison of every op with them; for tests, benchmarks and `entcov check`."""
