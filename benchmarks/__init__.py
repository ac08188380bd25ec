"""xq beside other libraries, timed in the same process: `python -m benchmarks.lookup` and so on."""
