"""Frozen models whose features are targets."""

from fd_scale.teachers.teacher import Target, Teacher

__all__ = ["Target", "Teacher"]
