"""Accuracy on validation rows while a model is trained, as `metro evaluate` measures it."""

from __future__ import annotations

import torch

from metro.data.jsonl_rows import UnusableRow
from metro.evaluation.scoring.metrics import measure
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.tasks.examples import EvaluationExample
from metro.finetuning.data import PromptData
from metro.finetuning.objectives import scoring_method
from metro.models.projection import unwrap
from metro.processes import Processes


class ValidationRows:
    """Validation examples with answer choices; others are left out.

    Args:
        data: of the split "valid".
        processes: share the work.
    """

    def __init__(self, data: PromptData, processes: Processes):
        self.encoder, self.processes = data.encoder, processes
        self.method = scoring_method(data.objective)
        self.examples: list[EvaluationExample] = []
        for task, index in zip(*data.plan(0), strict=True):
            try:
                example = EvaluationExample.of(data.examples[task][int(index)])
            except UnusableRow:
                continue
            if self.method != "flipped" or example.instruction:
                self.examples.append(example)

    def accuracy(self, model: torch.nn.Module) -> float:
        """Measure how often the right answer choice is the most probable one."""
        inner = unwrap(model)
        scorer = PairScorer(
            inner,
            batch_tokens=4096 if inner.device.type == "cpu" else 65536,
            rank=self.processes.rank,
            num_processes=self.processes.count,
            gather=self.processes.add_up if self.processes.count > 1 else None,
        )
        rankings = RankClassifier(scorer, self.encoder, self.method).rank(self.examples)
        predictions = [ranking.prediction or 0 for ranking in rankings]
        return measure(self.examples, predictions).accuracy
