"""Ahead-of-time compilation for GPUs and TPUs that are not attached: does it compile, and in how much memory?"""

from jattn.aot.compiling import Report, compile_for
from jattn.aot.targets import TARGETS, Target, devices, find_target

__all__ = ["TARGETS", "Report", "Target", "compile_for", "devices", "find_target"]
