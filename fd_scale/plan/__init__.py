"""Memory, time and cost of a recipe before it runs.

`measure` is imported where it is used: it needs DeepSpeed, which a plan does not.
"""

from fd_scale.plan.counts import Counts, NotCountedError, Policy, count
from fd_scale.plan.estimate import IMAGES_PER_CORE, Choice, Plan, plan, present_gpu
from fd_scale.plan.report import input_needed, memory_table, plot, require_fit, show, to_json, write_json

__all__ = [
    "IMAGES_PER_CORE",
    "Choice",
    "Counts",
    "NotCountedError",
    "Plan",
    "Policy",
    "count",
    "input_needed",
    "memory_table",
    "plan",
    "plot",
    "present_gpu",
    "require_fit",
    "show",
    "to_json",
    "write_json",
]
