"""Measuring library: run records, traces, timing, emulated links, figures. Knows no feature and no Trainer."""
