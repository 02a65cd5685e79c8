"""Where the time of a profiled step went."""
