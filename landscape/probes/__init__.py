"""Probes: functions from (model, data) to a frozen result, one method a file."""
