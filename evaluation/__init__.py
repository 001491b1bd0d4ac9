"""Runs tasks on a model: controls, chance, ceilings, intervals, and the report. It knows `Task` and no task."""
