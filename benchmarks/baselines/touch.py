"""A label from measured numbers, such as whether an object slips out of a hand.

The numbers are `body_state` at the first tick of a recording, normalised as the creature's; the label is the text of
the recording. Settings of each model (the strength of its regularisation) are those with the highest accuracy on the
validation split, over all seeds.
"""

import argparse
from collections import Counter

import numpy as np

from benchmarks.baselines.common import need_scikit_learn, open_clips, print_table, text_ids

STRENGTHS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)  # C of logistic regression
LEAVES = (2, 8, 32, 128)  # fewest samples in a leaf of the forest
TREES = 500


def report(options: argparse.Namespace) -> None:
    """Print the accuracy of every model on the validation split."""
    need_scikit_learn()
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    splits, config = open_clips(options.folders[0], options.cache_dir, "body_state")
    (numbers, labels), (held_out, truth) = (to_table(splits[name], config) for name in ("train", "validation"))
    majority = Counter(labels.tolist()).most_common(1)[0][0]
    rows = {"most frequent label": [{"accuracy": float((truth == majority).mean())}]}

    def accuracies(models) -> list[dict]:
        return [{"accuracy": model.fit(numbers, labels).score(held_out, truth)} for model in models]

    regressions = {C: accuracies([LogisticRegression(C=C, max_iter=5000)]) for C in STRENGTHS}
    strength = max(regressions, key=lambda C: median(regressions[C]))
    rows[f"logistic regression, C {strength:g}"] = regressions[strength]
    forests = {
        leaf: accuracies(
            RandomForestClassifier(TREES, min_samples_leaf=leaf, random_state=seed, n_jobs=-1) for seed in options.seeds
        )
        for leaf in LEAVES
    }
    leaf = max(forests, key=lambda leaf: median(forests[leaf]))
    rows[f"random forest, {TREES} trees, leaves of {leaf}"] = forests[leaf]
    print(f"{len(labels)} recordings to train, {len(truth)} to validate, {numbers.shape[1]} numbers")
    print_table(["accuracy"], rows)


def median(figures: list[dict]) -> float:
    return float(np.median([figure["accuracy"] for figure in figures]))


def to_table(clips: list[dict], config) -> tuple[np.ndarray, np.ndarray]:
    """The numbers [N, size] and labels [N] of recordings that have both."""
    clips = [clip for clip in clips if clip["body_mask"][0] and text_ids(clip, config)]
    numbers = np.stack([clip["body_state"][0, -1] for clip in clips])
    return numbers, np.array([str(text_ids(clip, config)) for clip in clips])
