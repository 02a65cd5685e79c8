"""Text in, fixed-length blocks of tokens out: Lightning DataModules and the pure functions below them."""
