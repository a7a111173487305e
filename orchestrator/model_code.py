"""What MLflow runs to load a model of ours: stored beside the checkpoint as a script, so that no model holds a pickle.

It stands alone but for `cavs_model`, whose source is stored with it. `mlflow.pyfunc.load_model(uri).predict(clips)` takes
{"image": uint8 [B T 3 H W], "audio": float32 [B T 96 64] log-mel (cavs_model.datasets.log_mel)} and gives the class of every
pixel, uint8 [B T H W]: indices into `classes` of the model's classes.json, background first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from cavs_model import checkpoint
from cavs_model.types import IGNORE, Batch

CHECKPOINT = "checkpoint"  # the artifact's name: a folder as cavs_model.checkpoint writes it, with classes.json


class Segmenter(PythonModel):
    """A checkpoint as MLflow's pyfunc, on the CPU or the first GPU."""

    _skip_type_hint_validation = True  # MLflow knows no type hint for arrays, and warns whoever loads a model without one

    def load_context(self, context: Any) -> None:
        """Reads the checkpoint. InputError where it is damaged."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = checkpoint.load(Path(context.artifacts[CHECKPOINT])).to(self.device)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Clips {"image" [B T 3 H W], "audio" [B T 96 64]} -> classes uint8 [B T H W]. H and W are multiples of 32."""
        image = torch.from_numpy(np.array(model_input["image"], np.uint8))
        frames = torch.ones(image.shape[:2], dtype=torch.bool)
        batch = Batch(
            sample_id=tuple(str(index) for index in range(len(image))),
            image=image,
            audio=torch.from_numpy(np.array(model_input["audio"], np.float32)),
            label=torch.full((*image.shape[:2], *image.shape[3:]), IGNORE, dtype=torch.uint8),
            real_frame=frames,
            labelled_frame=torch.zeros_like(frames),
            rehearsed=torch.zeros(len(image), dtype=torch.bool),
        )
        with torch.no_grad():
            logits = self.network(batch.to(self.device)).logits
        return logits.argmax(dim=2).to(torch.uint8).cpu().numpy()


set_model(Segmenter())
