"""Run records: what a run measured, on which machine, from which code."""
