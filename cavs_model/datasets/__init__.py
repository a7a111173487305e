"""Benchmarks, one file each. A new one is one new file with one subclass of `base.Benchmark`."""
