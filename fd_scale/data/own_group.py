"""Imported by the fork server of a loader's workers alone: what is sent to the run's process group is the run's.

A run that is told to stop (SIGTERM of `timeout`, of a shell, of a job's end) takes its step to the end and saves; its
workers must live as long. They end with it.
"""

import os

os.setpgid(0, 0)
