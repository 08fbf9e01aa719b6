"""Frozen models whose features are targets."""

from fd_scale.teachers.teacher import Target, Teacher, targets_of

__all__ = ["Target", "Teacher", "targets_of"]
