"""Scripts that measure, one a question: `python -m benchmarks.<name> [--short] [--write]`. Results lie in results/."""
