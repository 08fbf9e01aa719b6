"""SLURM: what its jobs run, how they are submitted, and what is checked before an expensive one starts.

Only `check` needs torch; the rest answers on a login node at once.
"""
