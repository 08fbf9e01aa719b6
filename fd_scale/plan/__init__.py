"""Memory, time and cost of a recipe before it runs.

`measure` is imported where it is used: it needs DeepSpeed, which a plan does not.
"""

from fd_scale.plan.counts import Counts, NotCountedError, Policy, count
from fd_scale.plan.estimate import Choice, Plan, plan, present_gpu
from fd_scale.plan.report import memory_table, plot, require_fit, show, to_json, write_json

__all__ = [
    "Choice",
    "Counts",
    "NotCountedError",
    "Plan",
    "Policy",
    "count",
    "memory_table",
    "plan",
    "plot",
    "present_gpu",
    "require_fit",
    "show",
    "to_json",
    "write_json",
]
