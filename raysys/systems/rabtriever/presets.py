"""Settings worth a name: functions that return the values which differ from the defaults."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def paper() -> Values:
    """The paper's backbone, predictor, loss and teacher's step size on Qwen2-7B (spec 2.2 to 2.4). Give --data; needs GPUs.

    Ours in it: 15 negatives for each of 4 queries in a step instead of all documents (16 prompts a step are the paper's), and the
    student's step size and number of steps.
    """
    teacher: Values = {
        "model": "Qwen/Qwen2-7B-Instruct", "max_document": 32, "max_query": 4064, "batch": 4, "negatives": 15, "lr": 1e-6,
        "auxiliary": 0.0,
    }  # fmt: skip
    student: Values = {
        "combine": "mul", "additive": False, "standardise": False, "kl": "reverse", "kl_weight": 0.25, "rollout": "all",
        "hidden": 3584, "batch": 16,
    }  # fmt: skip
    return {"teacher": teacher, "student": student, "train": {"bf16": True}}


def paper_student() -> Values:
    """The paper's predictor and loss, w = 0.25, on the embedded teacher."""
    return {
        "student": {
            "additive": False,
            "standardise": False,
            "kl": "reverse",
            "kl_weight": 0.25,
            "rollout": "all",
            "batch": 16,
        }
    }


def listwise() -> Values:
    """Distil the teacher's scores only, as a softmax over the documents of a query."""
    return {"student": {"loss": "listwise"}}


def dpo() -> Values:
    """LaHoRe-DPO: a second stage of preferences for the teacher."""
    return {"teacher": {"objective": "sft+dpo"}}


PRESETS = {f.__name__: f for f in (paper, paper_student, listwise, dpo)}
