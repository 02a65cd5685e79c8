"""Which layers and heads of a model look up what was asked for, measured, and the schedule that follows."""
