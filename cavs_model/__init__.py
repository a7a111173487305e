"""The science of continual audio-visual segmentation: torch and numpy only, no Ray, no MLflow, no Optuna."""
