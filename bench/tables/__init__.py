"""Records as tables: side by side, by row and column, and figures in documents."""
