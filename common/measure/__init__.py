"""Stopwatch, memory and peaks."""
