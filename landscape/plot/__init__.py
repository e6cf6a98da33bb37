"""Plots: functions from a result to axes."""
