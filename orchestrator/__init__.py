"""The logistics: Ray, Optuna, MLflow, storage and the command line around `cavs_model`."""
