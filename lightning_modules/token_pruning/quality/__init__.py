"""What dropping prompt tokens costs in quality, scorer by scorer, at the same budget."""
