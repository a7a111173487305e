"""Do CMR's two choices rest on what they should? `python benchmarks/why_cmr.py OUTPUTS NAME ...`, names of comparisons there.

CSR: whether the old classes with many collisions before a task (F) are those that the task then mixes up with the new ones:
rank correlation of F with the test pixels of new classes called this old class (new as old) and of this old class called any
new one (old as new), after the task. MSS: whether the visual-only network is a fair twin: both networks' mean score S on the
samples they were trained on, the mean |S_av - S_v|, and the share of samples that the sound helps. And of every stream, where
its errors lie after its last task: shares of the background called an old or a new class, and of new classes called an old one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.tracking import MlflowClient
from scipy.stats import spearmanr


def artifact(client: MlflowClient, run: str, path: str) -> Any:
    """A JSON artifact of a run."""
    return json.loads(Path(client.download_artifacts(run, path)).read_text())


def collisions(client: MlflowClient, run: str, task: int, split: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names of the old foreground classes, F, and pixels "new as old" and "old as new" after the task, per old class."""
    before = artifact(client, run, f"task_{task}/collisions.json")["classes"]
    after = artifact(client, run, f"task_{task}/confusion_{split}.json")
    names, counts = after["classes"], np.array(after["counts"])
    old = [names.index(record["class"]) for record in before]
    new = [index for index in range(1, len(names)) if index not in old]
    found = np.array([record["collisions"] for record in before])
    return [names[index] for index in old], found, counts[np.ix_(new, old)].sum(0), counts[np.ix_(old, new)].sum(1)


def errors(client: MlflowClient, run: str, split: str) -> list[float]:
    """After the third task: shares of background pixels called old and new, and of new classes' pixels called old."""
    old = len(artifact(client, run, f"task_0/confusion_{split}.json")["classes"])
    counts = np.array(artifact(client, run, f"task_2/confusion_{split}.json")["counts"])
    background, new = counts[0], counts[old:]
    return [
        background[1:old].sum() / background.sum(),
        background[old:].sum() / background.sum(),
        new[:, 1:old].sum() / new.sum(),
    ]


def main() -> None:
    outputs = Path(sys.argv[1])
    client = MlflowClient(f"sqlite:///{outputs.absolute()}/mlflow.db")
    print("| stream | task | split | F and new as old | F and old as new | most collisions | most new as old |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[2:]:
        ledger = json.loads((outputs / "comparisons" / name / "comparison.json").read_text())
        for stream in ledger["done"]:
            if not stream.startswith("cmr"):
                continue
            for task in (1, 2):
                for split in ("test_seen", "test_unseen"):
                    classes, found, as_old, as_new = collisions(client, ledger["runs"][stream], task, split)
                    if not found.any():
                        continue
                    first, second = spearmanr(found, as_old).statistic, spearmanr(found, as_new).statistic
                    most = ", ".join(classes[index] for index in np.argsort(-found, kind="stable")[:3])
                    confused = ", ".join(classes[index] for index in np.argsort(-as_old, kind="stable")[:3])
                    print(f"| {stream} | {task + 1} | {split} | {first:.2f} | {second:.2f} | {most} | {confused} |")
    print("\n| stream | background called old | background called new | new called old |\n|---|---|---|---|")
    for name in sys.argv[2:]:
        ledger = json.loads((outputs / "comparisons" / name / "comparison.json").read_text())
        for stream in ledger["done"]:
            shares = errors(client, ledger["runs"][stream], "test_seen")
            print(f"| {stream} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    print("\n| samples scored | S_av | S_v | mean of abs(delta) | share with S_av > S_v | share with S_av = S_v |")
    print("|---|---|---|---|---|---|")
    for path in sorted((outputs / "store" / "scores").glob("*.json")):
        columns = json.loads(path.read_text())["value"]["columns"]
        if "delta" in columns:
            delta = np.array(columns["delta"])
            means = [
                np.mean(columns["audio_visual"]),
                np.mean(columns["visual_only"]),
                np.abs(delta).mean(),
                (delta > 0).mean(),
            ]
            print(f"| {len(delta)} | " + " | ".join(f"{value:.3f}" for value in [*means, (delta == 0).mean()]) + " |")


if __name__ == "__main__":
    main()
