"""Families of models as data: what their weights are called in every spelling, and which modules share one."""
