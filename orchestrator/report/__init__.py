"""`python -m orchestrator.report`: what a sweep, a comparison or a run found, as one HTML file that needs nothing else."""
