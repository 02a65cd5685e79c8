"""Token pruning: learn which prompt tokens matter and skip the rest during prefill."""
