"""Ranks, links between them, and what they cost: launching, link emulation, collectives, bounds."""
